"""A market that comes and goes by chance, the same chance for everyone who knows the seed."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from threading import Lock
from typing import ClassVar, NamedTuple

from spotfirst_airflow.fleets.options import require
from spotfirst_airflow.markets.base import MANY, Course, MarketOptions, ZoneState

__all__ = ["Chance", "ChanceCourse", "SyntheticMarket"]


class Spells(NamedTuple):
    """How long something lasts: a share ``long`` of times about ``long_s``, else ``short_s``.

    Both are means of exponential distributions.
    """

    short_s: float
    long_s: float = 0.0
    long: float = 0.0

    @property
    def mean_s(self) -> float:
        """Of all of them."""
        return self.short_s + self.long * (self.long_s - self.short_s)


class Chance(NamedTuple):
    """What a zone's course is drawn from.

    The logarithm of the price factor is a walk with a step of ``price_spread`` (a standard
    deviation) every ``price_step_s``, drawn back to 0 by ``price_return``. ``begins_down`` is how
    likely a zone has no spot at first.
    """

    up: Spells
    down: Spells
    capacity: int
    silent_share: float = 0.0
    begins_down: float = 0.0
    price_step_s: float = 300.0
    price_return: float = 0.9
    price_spread: float = 0.05


class SyntheticMarket(MarketOptions):
    """Every zone alternates between having spot instances and having none.

    Up and down times are exponential with means ``mean_up_s`` and ``mean_down_s`` (market
    seconds); every zone starts up. A share ``silent_share`` of the interruptions comes without
    notice. The logarithm of the price factor is a mean-reverting walk with a step every 300 s.
    """

    kind: ClassVar[str] = "synthetic"
    seed: int = 0
    mean_up_s: float = 3600.0
    mean_down_s: float = 600.0
    silent_share: float = 0.0
    capacity: int = MANY

    def check(self) -> None:
        """Raise :class:`InvalidSpec` for rates that are none."""
        require(self.mean_up_s > 0, "market.mean_up_s", self.mean_up_s, "above 0")
        require(self.mean_down_s > 0, "market.mean_down_s", self.mean_down_s, "above 0")
        require(0 <= self.silent_share <= 1, "market.silent_share", self.silent_share, "0 to 1")
        require(self.capacity > 0, "market.capacity", self.capacity, "above 0")

    def course(self, zone: str) -> Course:
        """A course of the zone's own, independent of other zones'."""
        chance = Chance(
            up=Spells(self.mean_up_s), down=Spells(self.mean_down_s), capacity=self.capacity,
            silent_share=self.silent_share,
        )  # fmt: skip
        return ChanceCourse(chance, f"spotfirst/{self.seed}/{zone}")

    def interruption_mean_s(self, zone: str) -> float | None:  # noqa: ARG002 - the same everywhere
        """What is left of an exponential time is as long, on average, as all of it."""
        return self.mean_up_s


class ChanceCourse:
    """One zone's past and future, drawn from the beginning as far as it was asked for.

    Every draw comes at its fixed place of a sequence of the zone's own, so that what is known
    already changes nothing about what an answer is.
    """

    def __init__(self, chance: Chance, seed: str) -> None:
        self._chance = chance
        # Text seeds go through SHA-512, the same in every process and Python.
        self._phases = random.Random(f"{seed}/phases")
        self._prices = random.Random(f"{seed}/prices")
        self._kinds = random.Random(f"{seed}/kinds")
        self._lock = Lock()
        self._ends: list[float] = []
        self._silent: list[bool] = []
        self._logs: list[float] = [0.0]

    def at(self, time_s: float) -> ZoneState:
        """Up and down by turns, from the first draw on."""
        index = self._index(time_s)
        return ZoneState(
            capacity=0 if index % 2 else self._chance.capacity,
            notice=not self._silent[index],
            price_factor=self._price_factor(time_s),
        )

    def next_change(self, time_s: float) -> float:
        """The end of the time up or down that this is in."""
        return self._ends[self._index(time_s)]

    def next_price_change(self, time_s: float) -> float:
        """The next step of the walk."""
        step_s = self._chance.price_step_s
        # A sum of floats may round down to where we are; time must go on.
        return max((math.floor(time_s / step_s) + 1) * step_s, math.nextafter(time_s, math.inf))

    def _price_factor(self, time_s: float) -> float:
        chance = self._chance
        index = max(0, int(time_s // chance.price_step_s))
        with self._lock:
            while len(self._logs) <= index:
                drawn = self._prices.gauss(0.0, chance.price_spread)
                self._logs.append(chance.price_return * self._logs[-1] + drawn)
        return math.exp(self._logs[index])

    def _index(self, time_s: float) -> int:
        with self._lock:
            while not self._ends or self._ends[-1] <= time_s:
                up = len(self._ends) % 2 == 0
                spells = self._chance.up if up else self._chance.down
                kind = self._kinds.random()
                mean_s = spells.long_s if kind < spells.long else spells.short_s
                drawn_s = -mean_s * math.log(1.0 - self._phases.random())
                if not self._ends and self._kinds.random() < self._chance.begins_down:
                    drawn_s = 0.0
                before_s = self._ends[-1] if self._ends else 0.0
                self._ends.append(max(before_s + drawn_s, math.nextafter(before_s, math.inf)))
                silent = self._phases.random() < self._chance.silent_share
                self._silent.append(silent and not up)
            return bisect_right(self._ends, time_s)
