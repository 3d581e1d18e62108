"""The market that is simulated: places with a course each, and what lies between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime
from decimal import Decimal

from spotfirst.market import Market, Pool
from spotfirst_airflow.fleets import Offer
from spotfirst_airflow.markets import Course, ZoneState

__all__ = ["Place", "World"]

_SOURCE = "simulated"


class Place:
    """One pool: a spot market over time, and its price on demand.

    ``course`` counts seconds since the market's beginning. ``spot_usd_h`` is the usual price where
    the course tells none. Keeps the last answers, since a run's questions go forward in time.
    """

    def __init__(
        self,
        pool: Pool,
        course: Course,
        *,
        on_demand_usd_h: Decimal,
        spot_usd_h: Decimal | None = None,
        region: str = "",
    ) -> None:
        self.pool = pool
        self.region = region or pool.zone
        self.on_demand_usd_h = on_demand_usd_h
        self._course = course
        self._usual_usd_h = float(spot_usd_h if spot_usd_h is not None else on_demand_usd_h)
        self._span = (math.inf, -math.inf)
        self._now: tuple[bool, Decimal] = (False, Decimal(0))
        self._price_span = (math.inf, -math.inf)

    def at(self, time_s: float) -> tuple[bool, Decimal]:
        """Whether there is spot, and what it costs an hour."""
        since_s, until_s = self._span
        if not since_s <= time_s < until_s:
            state = self._course.at(time_s)
            course = self._course
            until_s = min(course.next_change(time_s), course.next_price_change(time_s))
            self._span = (time_s, until_s)
            self._now = (state.capacity > 0, self._price(state))
        return self._now

    def next_change(self, time_s: float, *, until_s: float, price_only: bool) -> float:
        """When the price, or else also the capacity, changes next; ``until_s`` at the latest."""
        if not price_only:
            self.at(time_s)
            return min(self._span[1], until_s)
        since_s, change_s = self._price_span
        if not since_s <= time_s < change_s:
            price, change_s = self.at(time_s)[1], time_s
            while change_s < until_s:
                change_s = self._course.next_price_change(change_s)
                if change_s < until_s and self._price(self._course.at(change_s)) != price:
                    break
            self._price_span = (time_s, change_s)
        return min(change_s, until_s)

    def next_shortage(self, time_s: float, *, until_s: float) -> float:
        """When there is no spot any more; infinity when there is until ``until_s``."""
        while time_s < until_s:
            if self._course.at(time_s).capacity <= 0:
                return time_s
            time_s = self._course.next_change(time_s)
        return math.inf

    def prices(self, start_s: float, end_s: float) -> list[tuple[float, Decimal]]:
        """(since when, USD per hour) from ``start_s`` to ``end_s``, changes only."""
        prices = [(start_s, self._price(self._course.at(start_s)))]
        while (start_s := self._course.next_price_change(start_s)) < end_s:
            price = self._price(self._course.at(start_s))
            if price != prices[-1][1]:
                prices.append((start_s, price))
        return prices

    def offers(
        self, time_s: float, now: datetime, *, shows: bool, read_usd_gb: Decimal = Decimal(0)
    ) -> tuple[Offer, Offer]:
        """On spot and on demand. Without ``shows``, spot may be had as far as anyone can see."""
        there, price = self.at(time_s)
        spot = Offer(
            pool=self.pool, market=Market.SPOT, price_usd_h=price, price_source=_SOURCE,
            price_at=now, available=there or not shows, read_usd_gb=read_usd_gb,
        )  # fmt: skip
        on_demand = Offer(
            pool=self.pool, market=Market.ON_DEMAND, price_usd_h=self.on_demand_usd_h,
            price_source=_SOURCE, price_at=now, read_usd_gb=read_usd_gb,
        )  # fmt: skip
        return spot, on_demand

    def _price(self, state: ZoneState) -> Decimal:
        price = state.price_usd_h
        if price is None:
            price = self._usual_usd_h * state.price_factor
        return Decimal(repr(round(price, 4)))


class World:
    """All that a simulated run can choose from.

    ``egress_usd_gb(from, to)`` is the price of moving a checkpoint between two regions. With
    ``shows`` everyone sees which pools have capacity; without, only who tries to launch there
    learns it, as on EC2. With ``first_hour_free`` a spot instance that is taken back within its
    first hour costs nothing, as AWS bills it. ``frozen_prices``: an instance costs what it did at
    its launch, as in a run's own bill; else what its pool costs at each moment.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        egress_usd_gb: Callable[[str, str], Decimal] = lambda _from, _to: Decimal(0),
        shows: bool = False,
        first_hour_free: bool = True,
        frozen_prices: bool = True,
    ) -> None:
        self.places = tuple(places)
        self.by_pool = {place.pool: place for place in places}
        self.egress_usd_gb = egress_usd_gb
        self.shows = shows
        self.first_hour_free = first_hour_free
        self.frozen_prices = frozen_prices
