"""Two regions of a simulated AWS, on one clock, and the fleet that has both."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from spotfirst.market import Pool
from spotfirst_airflow.fleets.ec2 import Ec2Fleet, Ec2Regions
from spotfirst_airflow.fleets.ec2.prices import Prices
from spotfirst_airflow.fleets.ec2.pricetable import GpuType, PriceTable, RegionPrices
from spotfirst_airflow.fleets.ec2.watching import Watcher
from tests.fakes.clients import FakeAws
from tests.fakes.clock import SteppedClock
from tests.fakes.cloud import Cloud, CloudInstance, Weather
from tests.fleets.ec2.launches import Planned

HERE, THERE = "us-east-1", "us-west-2"
SUBNETS = {
    HERE: {"subnet-0a": f"{HERE}a", "subnet-0b": f"{HERE}b"},
    THERE: {"subnet-0c": f"{THERE}a", "subnet-0d": f"{THERE}b"},
}
TYPE = "g6.xlarge"
HERE_A, HERE_B = (Pool(instance_type=TYPE, zone=HERE + zone) for zone in "ab")
THERE_A, THERE_B = (Pool(instance_type=TYPE, zone=THERE + zone) for zone in "ab")
OPTIONS: dict[str, Any] = {
    "region": HERE,
    "subnets": list(SUBNETS[HERE]),
    "security_groups": ["sg-0a"],
    "instance_profile": "spotfirst-instance",
    "elsewhere": [{"region": THERE, "subnets": list(SUBNETS[THERE]), "security_groups": ["sg-0b"]}],
}


class Regions:
    """The storage is in the first. Their weather is calm, but for what a test changes."""

    def __init__(self) -> None:
        self.clock = SteppedClock()
        usd_h = {TYPE: Decimal("1.006")}
        self.clouds = {
            region: Cloud(
                region, clock=self.clock, weather=Weather(up_s=1e9, down_s=1.0), types=dict(usd_h),
                subnets=dict(subnets), region=region,
            )
            for region, subnets in SUBNETS.items()
        }  # fmt: skip
        # Those of the storage's region, for whoever asks there.
        self.clouds[THERE].access_points = self.clouds[HERE].access_points
        self.faults = {region: Planned() for region in SUBNETS}
        self.table = PriceTable(
            types={
                TYPE: GpuType(vcpus=4, memory_gib=16, gpus=1, gpu_name="L4", gpu_memory_mib=22888)
            },
            regions={
                region: RegionPrices(at=self.clock.now, source="a test's", usd_h=dict(usd_h))
                for region in SUBNETS
            },
        )

    def fleet(self, process: str = "", **options: Any) -> Ec2Regions:
        """A fleet as a process of this name makes it."""

        def make(given: Mapping[str, Any], *, environment: Mapping[str, str]) -> Ec2Fleet:
            region = given["region"]
            aws: Any = FakeAws(self.clouds[region], self.faults[region], process=process)
            watcher = Watcher.of(
                aws, clock=self.clock, monotonic=self.clock.monotonic, background=False
            )
            return Ec2Fleet(
                given, environment=environment, clock=self.clock, aws=aws, watcher=watcher,
                prices=Prices(aws, table=self.table, clock=self.clock), publish=lambda *_: "0" * 64,
                monotonic=self.clock.monotonic,
            )  # fmt: skip

        return Ec2Regions(OPTIONS | options, environment={}, clock=self.clock, make=make)

    def tick(self, seconds: int = 1) -> None:
        """Let time pass in both."""
        for _ in range(seconds):
            self.clock.step(1)
            for cloud in self.clouds.values():
                cloud.settle()

    def running(self) -> dict[str, list[CloudInstance]]:
        """By region, the instances that cost money now."""
        return {region: cloud.running() for region, cloud in self.clouds.items()}

    def close(self, region: str) -> None:
        """No spot there from now on."""
        for market in self.clouds[region].pools.values():
            market.close_until(1e8)
