"""A simulated AWS with faults at named calls, and launches in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from spotfirst.market import Market, Pool
from spotfirst_airflow.fleets import LaunchRequest
from spotfirst_airflow.fleets.ec2 import Ec2Fleet
from spotfirst_airflow.fleets.ec2.prices import Prices
from spotfirst_airflow.fleets.ec2.pricetable import GpuType, PriceTable, RegionPrices
from spotfirst_airflow.fleets.ec2.watching import Watcher
from tests.fakes.clients import FakeAws
from tests.fakes.cloud import Cloud, Weather
from tests.fakes.faults import Faults

REGION = "eu-central-1"
SUBNETS = {"subnet-0a": f"{REGION}a", "subnet-0b": f"{REGION}b"}
TYPES = {"g6.xlarge": Decimal("1.006"), "g5.xlarge": Decimal("1.258")}
G6_A, G6_B, G5_A, G5_B = (
    Pool(instance_type=kind, zone=REGION + zone) for kind in TYPES for zone in "ab"
)
OPTIONS: dict[str, Any] = {
    "subnets": list(SUBNETS),
    "security_groups": ["sg-0a"],
    "instance_profile": "spotfirst-instance",
    "ami": "ami-0a",
}


class Planned(Faults):
    """Faults at the next calls of named operations: before they are applied, or after it."""

    def __init__(self) -> None:
        super().__init__()
        self.plan: list[tuple[str, bool, Exception | Callable[[], object]]] = []

    def before(self, operation: str, happens: Exception | Callable[[], object]) -> None:
        self.plan.append((operation, False, happens))

    def after(self, operation: str, happens: Exception | Callable[[], object]) -> None:
        self.plan.append((operation, True, happens))

    def around(self, what: str, apply: Callable[[], Any], **more: Any) -> Any:
        planned = next((each for each in self.plan if each[0] == what), None)
        if planned is None:
            return apply()
        self.plan.remove(planned)
        _, after, happens = planned
        answer = apply() if after else None
        if isinstance(happens, Exception):
            raise happens
        happens()
        return answer if after else apply()


_names = itertools.count()


class World:
    """One region, in which several processes may act. Its weather is calm."""

    def __init__(self, **weather: float) -> None:
        self.name = f"world-{next(_names)}"
        calm: dict[str, float] = {"up_s": 1e9, "down_s": 1.0} | weather
        self.cloud = Cloud(
            0, weather=Weather(**calm), types=dict(TYPES), subnets=dict(SUBNETS), region=REGION
        )
        self.faults = Planned()
        self.table = PriceTable(
            types={
                name: GpuType(vcpus=4, memory_gib=16, gpus=1, gpu_name="L4", gpu_memory_mib=22888)
                for name in TYPES
            },
            regions={
                REGION: RegionPrices(at=self.cloud.clock.now, source="a test's", usd_h=dict(TYPES))
            },
        )

    def aws(self, process: str = "") -> FakeAws:
        return FakeAws(self.cloud, self.faults, process=process)

    def fleet(
        self, process: str = "", *, environment: dict[str, str] | None = None, **options: Any
    ) -> Ec2Fleet:
        """A fleet as a process of this name makes it."""
        aws: Any = self.aws(process)
        clock = self.cloud.clock
        watcher = Watcher.of(aws, clock=clock, monotonic=clock.monotonic, background=False)
        return Ec2Fleet(
            OPTIONS | options,
            environment=environment or {},
            clock=clock,
            aws=aws,
            watcher=watcher,
            prices=Prices(aws, table=self.table, clock=clock),
            publish=lambda storage, versions: ",".join(versions),
            monotonic=clock.monotonic,
        )

    @property
    def calls(self) -> dict[str, int]:
        return dict(self.cloud.calls)


def request(token: str = "token-1", **changes: Any) -> LaunchRequest:
    fields: dict[str, Any] = {
        "token": token,
        "run_id": "run-1",
        "attempt": 1,
        "market": Market.SPOT,
        "pool": G6_A,
        "others": (G6_B, G5_A),
        "storage_url": "memory://bucket",
        "max_life_s": 3600.0,
        "tags": {"team": "search"},
    }
    return LaunchRequest(**(fields | changes))
