"""The recorded markets, where they are there: zones with a course, their prices, and egress.

They lie in ``$SPOTFIRST_TRACES``, or beside the project in ``../shared/traces``.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from pathlib import Path

import msgspec

from spotfirst.market import Pool
from spotfirst_airflow.markets import RecordedMarket, Steps, ZoneState
from spotfirst_airflow.simulation import Place, World

__all__ = ["GANG", "H100", "V100", "Recording", "folder", "is_there", "recording", "world"]

_VARIABLE = "SPOTFIRST_TRACES"
_ELSEWHERE_USD_GB = Decimal("0.02")
"""What egress costs between regions that the table does not know (Google's)."""


@dataclass(frozen=True)
class Recording:
    """One recorded market: ``tick_s`` between its probes, ``ticks`` of them."""

    name: str
    zones: tuple[str, ...]
    tick_s: float
    ticks: int

    @property
    def hours(self) -> float:
        """How long it is."""
        return self.tick_s * self.ticks / 3600


V100 = Recording(
    name="v100",
    zones=(
        "us-east-1a", "us-east-1c", "us-east-1d", "us-east-1f", "us-east-2a", "us-east-2b",
        "us-west-2a", "us-west-2b", "us-west-2c",
    ),
    tick_s=195.0,
    ticks=20158,
)  # fmt: skip
H100 = Recording(
    name="h100",
    zones=(
        "us-central1-a", "us-central1-b", "us-central1-c", "us-east4-a", "us-east4-b", "us-east5-a",
        "us-west1-a", "us-west1-b", "europe-west1-c", "europe-west3-c", "asia-southeast1-b",
        "asia-southeast1-c", "asia-south2-b",
    ),
    tick_s=600.0,
    ticks=2114,
)  # fmt: skip
GANG = Recording(
    name="gang",
    zones=("us-east-1f", "us-east-2a", "us-west-2c"),
    tick_s=300.0,
    ticks=3664,
)
_RECORDINGS = {each.name: each for each in (V100, H100, GANG)}
_V100_USD_H = Decimal("3.06")
_GANG_NODES = 4
_GANG_SPOT_USD_H = Decimal("0.9731")


def recording(name: str) -> Recording:
    """The one of this name."""
    return _RECORDINGS[name]


def folder() -> Path:
    """Where the traces are, or would be."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "traces"
    return Path(os.environ.get(_VARIABLE) or beside)


def is_there() -> bool:
    """Whether the traces are on this machine."""
    return (folder() / "v100-9-zones").is_dir() and (folder() / "h100-13-zones").is_dir()


def world(name: str, zones: Sequence[str], *, shows: bool) -> World:
    """These zones of a recording as papers bill them: each tick at its price, no hour for free."""
    return World(
        [_place(name, zone) for zone in zones],
        egress_usd_gb=egress_usd_gb,
        shows=shows,
        first_hour_free=False,
        frozen_prices=False,
    )


def egress_usd_gb(here: str, there: str) -> Decimal:
    """What a GB costs from one region to another; nothing within one."""
    return Decimal(0) if here == there else _egress().get((here, there), _ELSEWHERE_USD_GB)


@cache
def _egress() -> dict[tuple[str, str], Decimal]:
    with (folder() / "aws_egress_pricing.csv").open() as lines:
        return {
            (row["from_region"], row["to_region"]): Decimal(row["price_usd_per_gb"])
            for row in csv.DictReader(lines)
        }


def _place(name: str, zone: str) -> Place:
    if name == "h100":
        info = _h100_prices(zone)
        return Place(
            Pool(instance_type="a3-highgpu-8g", zone=zone),
            _course(name, zone),
            on_demand_usd_h=info.on_demand_price,
            spot_usd_h=info.price,
            region=zone[:-2],
        )
    nodes = _GANG_NODES if name == "gang" else 1
    return Place(
        Pool(instance_type="p3.2xlarge", zone=zone),
        _course(name, zone),
        on_demand_usd_h=_V100_USD_H * nodes,
        spot_usd_h=_GANG_SPOT_USD_H * nodes,
        region=zone[:-1],
    )


@cache
def _course(name: str, zone: str) -> Steps:
    if name == "v100":
        paths = {zone: str(folder() / "v100-9-zones" / f"{zone}_v100_1.csv")}
        prices = str(folder() / "v100-9-zones" / "v100_spot_prices.json")
        return RecordedMarket(paths=paths, prices=prices).course(zone)
    if name == "h100":
        return RecordedMarket(paths={zone: str(_h100_path(zone))}, inverted=True).course(zone)
    path = folder() / "v100-multinode" / "4-nodes-real-preemption" / f"{zone}_v100_1.json"
    return _all_or_none(RecordedMarket(paths={zone: str(path)}).course(zone), GANG)


def _all_or_none(nodes: Steps, ticks: Recording) -> Steps:
    """A course that has room for one gang while it has room for all of its nodes."""
    steps, time_s, end_s = [], 0.0, ticks.tick_s * ticks.ticks
    while time_s < end_s:
        steps.append((time_s, ZoneState(capacity=nodes.at(time_s).capacity // _GANG_NODES)))
        time_s = nodes.next_change(time_s)
    return Steps(steps, repeat_s=end_s)


class _PriceInfo(msgspec.Struct):
    price: Decimal
    on_demand_price: Decimal


@cache
def _h100_prices(zone: str) -> _PriceInfo:
    found = json.loads(_h100_path(zone).read_text())["metadata"]["price_info"]
    cents = Decimal("0.0001")
    return _PriceInfo(
        price=Decimal(repr(found["price"])).quantize(cents),
        on_demand_price=Decimal(repr(found["on_demand_price"])).quantize(cents),
    )


def _h100_path(zone: str) -> Path:
    return folder() / "h100-13-zones" / f"{zone}_h100_16.json"
