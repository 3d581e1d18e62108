"""How long a simulated run takes, and whether a longer market needs more memory."""

from __future__ import annotations

import gc
import time
import tracemalloc
from decimal import Decimal
from statistics import median

from benchmarks.policies import traces
from benchmarks.policies.playing import SEE_THE_MARKET, policy
from spotfirst.market import Pool
from spotfirst_airflow.markets import ZoneState
from spotfirst_airflow.simulation import Place, Task, World, simulate

__all__ = ["growth_bytes", "ms_per_run"]

_TICK_S = 195.0
_WORK_H, _DEADLINE_H = 40.0, 60.0
_STARTS_H = (0.0, 180.0, 300.0, 420.0, 540.0, 660.0, 780.0, 900.0)
_ZONES = (
    ("us-east-1c",),
    ("us-east-1c", "us-east-2b", "us-west-2a"),
    traces.V100.zones,
)


def ms_per_run(name: str) -> dict[int, float]:
    """By number of zones: milliseconds of the processor for a run of 60 h, the median of several."""
    task = Task(
        work_s=_WORK_H * 3600, deadline_s=_DEADLINE_H * 3600, changeover_s=720.0, overlaps=False,
        checkpoint_bytes=50 * 10**9,
    )  # fmt: skip
    found = {}
    for zones in _ZONES:
        world = traces.world("v100", zones, shows=name in SEE_THE_MARKET)
        simulate(task, world, policy(name))  # what is read or made once
        times = []
        for start_h in _STARTS_H:
            began = time.process_time()
            simulate(task, world, policy(name), start_s=start_h * 3600)
            times.append(time.process_time() - began)
        found[len(zones)] = median(times) * 1000
    return found


class _Flicker:
    """A zone that changes its price in every tick, computed from the time alone."""

    def at(self, time_s: float) -> ZoneState:
        return ZoneState(capacity=1, price_usd_h=1.0 + 0.01 * (int(time_s // _TICK_S) % 7))

    def next_change(self, time_s: float) -> float:
        return (time_s // _TICK_S + 1) * _TICK_S

    def next_price_change(self, time_s: float) -> float:
        return self.next_change(time_s)


def growth_bytes(name: str, *, ticks: int, than: int) -> int:
    """How much more memory a run over so many ticks needs at its peak than one over ``than``."""
    _peak_bytes(name, than)  # what is made once
    return _peak_bytes(name, ticks) - _peak_bytes(name, than)


def _peak_bytes(name: str, ticks: int) -> int:
    seconds = ticks * _TICK_S
    task = Task(work_s=seconds - 4 * 3600.0, deadline_s=seconds, changeover_s=720.0)
    place = Place(Pool(instance_type="gpu", zone="z"), _Flicker(), on_demand_usd_h=Decimal(3))
    gc.collect()
    tracemalloc.start()
    try:
        simulate(task, World([place]), policy(name))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
