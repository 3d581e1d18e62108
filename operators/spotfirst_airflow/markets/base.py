"""Spot markets: what a zone has, and what it costs, as a function of time.

A market is pure: the answer depends on its options, the zone and the market seconds since its
epoch, never on who asks, when, or in which order. So any process can play the same market.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import msgspec

from spotfirst.errors import InvalidSpec
from spotfirst.wire import Record
from spotfirst_airflow.fleets.options import parse, require

__all__ = [
    "MANY",
    "CalmMarket",
    "Course",
    "Market",
    "MarketOptions",
    "ScriptedMarket",
    "Steps",
    "ZoneState",
]

MANY = 1000
"""The capacity of a zone whose market does not count instances."""


class ZoneState(Record):
    """What a zone has at one moment.

    ``capacity`` counts spot instances. ``notice`` says whether those that must go because of it
    are told beforehand. The price is ``price_usd_h``, or ``price_factor`` times the type's usual
    spot price where the market states none.
    """

    capacity: int
    notice: bool = True
    price_usd_h: float | None = None
    price_factor: float = 1.0


class Course(Protocol):
    """One zone over time. Times are market seconds since the epoch, from 0 on."""

    def at(self, time_s: float) -> ZoneState:
        """What the zone has at this time."""

    def next_change(self, time_s: float) -> float:
        """When the capacity may change next, later than ``time_s``; infinity for never."""

    def next_price_change(self, time_s: float) -> float:
        """When the price may change next, later than ``time_s``; infinity for never."""


class MarketOptions(Record):
    """What a person says about a market of this ``kind``."""

    kind: ClassVar[str]

    def check(self) -> None:
        """Raise :class:`InvalidSpec` for what can be seen without reading files."""

    def zones(self) -> tuple[str, ...]:
        """The zones that it knows; empty when any name will do."""
        return ()

    def course(self, zone: str) -> Course:
        """A zone's course. May read files, and then raise :class:`InvalidSpec`."""
        raise NotImplementedError

    def lasts_s(self) -> float | None:
        """How long until it begins again; ``None`` when it never does. May read files."""
        return None

    def interruption_mean_s(self, zone: str) -> float | None:  # noqa: ARG002 - for those who know
        """Mean time between interruptions of a zone; ``None`` where nobody can say."""
        return None


class Market:
    """The market of these options. Courses are made when they are first asked for."""

    def __init__(self, options: MarketOptions) -> None:
        self._options = options
        self._courses: dict[str, Course] = {}

    def at(self, zone: str, time_s: float) -> ZoneState:
        """What the zone has at this time."""
        return self._course(zone).at(time_s)

    def next_change(self, zone: str, time_s: float) -> float:
        """When the zone's capacity may change next, later than ``time_s``."""
        return self._course(zone).next_change(time_s)

    def interruption_mean_s(self, zone: str) -> float | None:
        """Mean time between the zone's interruptions; ``None`` where nobody can say."""
        return self._options.interruption_mean_s(zone)

    def first_shortage(
        self, zone: str, *, since_s: float, until_s: float, older: int
    ) -> ZoneState | None:
        """The first state in this time without room for an instance with ``older`` before it.

        Looks at every change in between, so that no dip is missed however seldom one asks.
        """
        course = self._course(zone)
        time_s = since_s
        while time_s <= until_s:
            state = course.at(time_s)
            if state.capacity <= older:
                return state
            time_s = course.next_change(time_s)
        return None

    def _course(self, zone: str) -> Course:
        # Should two threads make the same one, either will do: they are equal.
        if zone not in self._courses:
            self._courses[zone] = self._options.course(zone)
        return self._courses[zone]


class Steps:
    """A course that is constant from each of its times to the next.

    It is entered at ``start_s``, and begins again after ``repeat_s``.
    """

    def __init__(
        self,
        steps: Iterable[tuple[float, ZoneState]],
        *,
        start_s: float = 0.0,
        repeat_s: float = math.inf,
    ) -> None:
        self._times: list[float] = []
        self._states: list[ZoneState] = []
        self._start_s = start_s
        self._repeat_s = repeat_s
        for time_s, state in steps:
            if not self._states or self._states[-1] != state:
                self._times.append(time_s)
                self._states.append(state)

    def at(self, time_s: float) -> ZoneState:
        """The state at this time; the first one also for times before it."""
        _, within_s = self._within(time_s)
        return self._states[max(0, bisect_right(self._times, within_s) - 1)]

    def next_change(self, time_s: float) -> float:
        """The start of the next step, later than ``time_s``."""
        began_s, within_s = self._within(time_s)
        index = bisect_right(self._times, within_s)
        coming_s = self._times[index] if index < len(self._times) else self._repeat_s
        # A sum of floats may round down to where we are; time must go on.
        return max(began_s + coming_s, math.nextafter(time_s, math.inf))

    def next_price_change(self, time_s: float) -> float:
        """The start of the next step, as a step may have a price of its own."""
        return self.next_change(time_s)

    @property
    def repeat_s(self) -> float:
        """After how long it begins again; infinity for never."""
        return self._repeat_s

    def mean_up_s(self) -> float | None:
        """How long there is capacity, on average, until there is none; ``None`` when it stays.

        Of one repetition, or of the time until the last loss.
        """
        ends = [*self._times[1:], self._repeat_s]
        up_s = lost_up_s = 0.0
        losses = 0
        for number, state in enumerate(self._states):
            if state.capacity > 0:
                up_s += ends[number] - self._times[number]
            elif number > 0 and self._states[number - 1].capacity > 0:
                losses, lost_up_s = losses + 1, up_s
        if not math.isinf(self._repeat_s):
            lost_up_s = up_s
            losses += self._states[0].capacity == 0 and self._states[-1].capacity > 0
        return lost_up_s / losses if losses else None

    def _within(self, time_s: float) -> tuple[float, float]:
        """When the current repetition began, and the time since then."""
        since_s = self._start_s + time_s
        if math.isinf(self._repeat_s):
            return -self._start_s, since_s
        whole_s = math.floor(since_s / self._repeat_s) * self._repeat_s
        return whole_s - self._start_s, since_s - whole_s


class CalmMarket(MarketOptions):
    """Spot is always there, at its usual price."""

    kind: ClassVar[str] = "calm"
    capacity: int = MANY

    def check(self) -> None:
        """Raise :class:`InvalidSpec` for a market that never has anything."""
        require(self.capacity > 0, "market.capacity", self.capacity, "above 0")

    def course(self, zone: str) -> Course:  # noqa: ARG002 - all zones are the same
        """The same state for ever."""
        return Steps([(0.0, ZoneState(capacity=self.capacity))])


class _Segment(Record):
    from_s: float
    capacity: int
    notice: bool = True
    price_usd_h: float | None = None


class ScriptedMarket(MarketOptions):
    """Exactly what is written down: for each zone, what it has from when on."""

    kind: ClassVar[str] = "scripted"
    # From zones to segments. Parsed one by one, to name the zone in what is wrong with it.
    script: dict[str, Any] = msgspec.field(name="zones")

    def check(self) -> None:
        """Raise :class:`InvalidSpec` for a script that cannot be played."""
        require(bool(self.script), "market.zones", self.script, "a mapping with a zone at least")
        for zone in self.script:
            self._steps(zone)

    def zones(self) -> tuple[str, ...]:
        """Those with a script."""
        return tuple(self.script)

    def course(self, zone: str) -> Course:
        """The zone's script."""
        return Steps(self._steps(zone))

    def interruption_mean_s(self, zone: str) -> float | None:
        """The mean time with capacity in the script."""
        return Steps(self._steps(zone)).mean_up_s()

    def _steps(self, zone: str) -> list[tuple[float, ZoneState]]:
        where = f"market.zones.{zone}"
        segments = self.script[zone]
        if not isinstance(segments, Sequence) or isinstance(segments, str) or not segments:
            msg = f"fleet option {where} is {segments!r}; give a list of segments"
            raise InvalidSpec(msg)
        parsed = [parse(_Segment, s, where=f"{where}[{i}]") for i, s in enumerate(segments)]
        times = [segment.from_s for segment in parsed]
        if times[0] != 0 or any(a >= b for a, b in itertools.pairwise(times)):
            msg = f"fleet option {where} has from_s {times}; it must start at 0 and only grow"
            raise InvalidSpec(msg)
        for s in parsed:
            require(s.capacity >= 0, f"{where}.capacity", s.capacity, "0 or more")
        return [
            (s.from_s, ZoneState(capacity=s.capacity, notice=s.notice, price_usd_h=s.price_usd_h))
            for s in parsed
        ]
