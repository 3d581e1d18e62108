"""The least that a run could have cost, had its policy known the market's whole future.

An exact dynamic programme over (tick, where the run is, slack). *Slack* is the time to the deadline
less the work left: training keeps it, waiting and starting use it up. So what remains to be paid is,
for each place, an array over slack, and a tick is a few sums and minima of arrays.

Exact for instances that start and stop at ticks of the market, and work in whole units of time
(15 s for ticks of 195 s); the rest of a unit is in the run's favour.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from spotfirst_airflow.simulation import Task, World

__all__ = ["Option", "least_usd", "least_usd_of"]

_Array = npt.NDArray[np.float64]
_LARGEST_UNIT_S = 60


@dataclass(frozen=True)
class Option:
    """Something to run on: whether it is there in each tick, and its price then (USD per hour)."""

    region: int
    there: Sequence[bool]
    usd_h: Sequence[float]


def least_usd(task: Task, world: World, *, start_s: float, tick_s: float) -> float:
    """The least cost of this task from the market's second ``start_s`` on, by its deadline.

    The market may change at multiples of ``tick_s`` from there on only. As in papers, an instance
    ends when the next one starts (``overlaps`` does not count). Infinite when it cannot be done.
    """
    assert task.deadline_s is not None
    regions = sorted({place.region for place in world.places})
    ticks = math.ceil(task.deadline_s / tick_s)
    size_gb = task.checkpoint_bytes / 1e9
    options = []
    for place in world.places:
        states = [place.at(start_s + tick * tick_s) for tick in range(ticks)]
        region = regions.index(place.region)
        there, prices = [there for there, _ in states], [float(price) for _, price in states]
        options.append(Option(region, there, prices))
        options.append(Option(region, [True] * ticks, [float(place.on_demand_usd_h)] * ticks))
    return least_usd_of(
        options,
        egress_usd=[
            [float(world.egress_usd_gb(a, b)) * size_gb if a != b else 0.0 for b in regions]
            for a in regions
        ],
        work_s=task.work_s,
        deadline_s=task.deadline_s,
        changeover_s=task.changeover_s,
        tick_s=tick_s,
    )


def least_usd_of(
    options: Sequence[Option],
    *,
    egress_usd: Sequence[Sequence[float]],
    work_s: float,
    deadline_s: float,
    changeover_s: float,
    tick_s: float,
) -> float:
    """The same, of markets as arrays. ``egress_usd[a][b]`` is the way from region a to b."""
    unit_s = math.gcd(round(tick_s), _LARGEST_UNIT_S)
    tick, start = round(tick_s / unit_s), int(changeover_s / unit_s)
    deadline, work = round(deadline_s / unit_s), int(work_s / unit_s)
    if deadline - work < start:
        return math.inf
    return _Programme(
        options, egress_usd, work=work, deadline=deadline, start=start, tick=tick, unit_s=unit_s
    ).least()


class _Programme:
    """All times in units. ``slack`` s and work left k at a time t: k = deadline - t - s."""

    def __init__(
        self,
        options: Sequence[Option],
        egress_usd: Sequence[Sequence[float]],
        *,
        work: int,
        deadline: int,
        start: int,
        tick: int,
        unit_s: float,
    ) -> None:
        self._options, self._egress_usd = options, egress_usd
        self._deadline, self._start, self._tick = deadline, start, tick
        self._ticks = math.ceil(deadline / tick)
        self._slack = np.arange(deadline - work + 1)
        self._prices = [np.asarray(each.usd_h) * (unit_s / 3600) for each in options]
        # What an option costs up to each tick, and in how many of the ticks before it was there.
        self._paid = [np.concatenate([[0.0], np.cumsum(p * tick)]) for p in self._prices]
        self._were = [np.concatenate([[0], np.cumsum(each.there)]) for each in options]
        # What is left to be paid, by slack: at the deadline nothing, for there is no slack below 0.
        nothing = np.zeros(len(self._slack))
        self._idle = [nothing for _ in egress_usd]
        # While training, at the beginning of the next tick, and of as many as a start may take.
        self._training = [deque([nothing], maxlen=start // tick + 1) for _ in options]

    def least(self) -> float:
        least = math.inf
        for tick in range(self._ticks - 1, -1, -1):
            launches = self._launches(tick)
            slack = len(self._slack) - 1 - tick * self._tick  # of a run that has not begun
            if slack >= 0:
                least = min([least, *(float(usd[slack]) for usd in launches.values())])
            self._idle = [self._wait(region, tick, launches) for region in range(len(self._idle))]
            for number, training in enumerate(self._training):
                training.appendleft(self._train(number, tick))
        return least

    def _launches(self, tick: int) -> dict[int, _Array]:
        """By region: launching what is best there at the beginning of this tick."""
        best: dict[int, _Array] = {}
        for number, option in enumerate(self._options):
            usd = self._launch(number, tick)
            if usd is not None:
                other = best.get(option.region)
                best[option.region] = usd if other is None else np.minimum(usd, other)
        return best

    def _wait(self, region: int, tick: int, launches: Mapping[int, _Array]) -> _Array:
        """Idle at the beginning of this tick, with the checkpoint in that region."""
        best = _after(self._idle[region], self._length(tick))
        for there, usd in launches.items():
            best = np.minimum(best, usd + self._egress_usd[region][there])
        left = self._left(tick)
        return best if left[-1] > 0 else np.where(left <= 0, 0.0, best)

    def _train(self, number: int, tick: int) -> _Array:
        """Training there at the beginning of this tick; or leaving, where that is cheaper."""
        option = self._options[number]
        idle = self._idle[option.region]
        if not option.there[tick]:
            return idle
        paid = self._prices[number][tick] * self._trained(tick, self._length(tick))
        best: _Array = np.minimum(paid + self._training[number][0], idle)
        return best

    def _launch(self, number: int, tick: int) -> _Array | None:
        """Launching there at the beginning of this tick; ``None`` where it cannot get ready."""
        ready = tick * self._tick + self._start
        last, within = divmod(ready, self._tick)
        were = self._were[number]
        if ready >= self._deadline or were[last + 1] - were[tick] < last + 1 - tick:
            return None
        price = self._prices[number][last]
        start_usd = self._paid[number][last] - self._paid[number][tick] + price * within
        work_usd = price * self._trained(tick, self._length(last) - within)
        after = _after(self._training[number][last - tick], self._start)
        usd: _Array = start_usd + work_usd + after
        return usd

    def _trained(self, tick: int, at_most: int) -> _Array | float:
        """How much is trained in ``at_most`` of the work that was left at that tick."""
        left = self._left(tick)
        if left[-1] >= at_most:
            return float(at_most)
        return np.clip(left, 0, at_most).astype(np.float64)

    def _left(self, tick: int) -> npt.NDArray[np.int64]:
        """The work left at the beginning of a tick, for each slack."""
        return self._deadline - tick * self._tick - self._slack

    def _length(self, tick: int) -> int:
        return min(self._tick, self._deadline - tick * self._tick)


def _after(usd: _Array, used: int) -> _Array:
    """What is left to be paid once so much of the slack is used up."""
    if not used:
        return usd
    shifted = np.full_like(usd, math.inf)
    shifted[used:] = usd[:-used]
    return shifted
