"""Capacity and prices of pools, drawn from a seed: they come and go, and move."""

from __future__ import annotations

import random
from bisect import bisect_right
from datetime import datetime, timedelta
from decimal import Decimal

CENT = Decimal("0.0001")


class PoolMarket:
    """One instance type in one zone: when it has spot capacity, and what it costs.

    ``up_s`` and ``down_s`` are mean lengths; ``down_s`` 0 is a pool that never runs out.
    ``moves_s`` is the mean time between changes of the price, 0 for one that stays.
    """

    def __init__(
        self,
        seed: object,
        start: datetime,
        *,
        on_demand_usd_h: Decimal,
        up_s: float = 3600.0,
        down_s: float = 600.0,
        moves_s: float = 0.0,
        span_s: float = 24 * 3600.0,
    ) -> None:
        random_ = random.Random(f"market/{seed}")
        self.on_demand_usd_h = on_demand_usd_h
        self.has_on_demand = True
        self._start = start
        self._changes: list[float] = []
        """Seconds at which capacity goes, comes, goes …; it is there at first, or goes at 0."""
        at = 0.0 if random_.random() < down_s / (up_s + down_s) else random_.expovariate(1 / up_s)
        while down_s and at < span_s:
            self._changes.append(at)
            mean_s = down_s if len(self._changes) % 2 else up_s
            at += random_.expovariate(1 / mean_s)
        share = Decimal(random_.randrange(25, 60)) / 100
        self.prices: list[tuple[datetime, Decimal]] = []
        """(since when, USD per hour), oldest first; the first is from long ago."""
        at = -6 * 3600.0
        while at < span_s:
            price = (on_demand_usd_h * share).quantize(CENT)
            self.prices.append((start + timedelta(seconds=round(at)), price))
            if not moves_s:
                break
            at += max(60.0, random_.expovariate(1 / moves_s))
            share = min(
                Decimal("0.95"),
                max(Decimal("0.15"), share * Decimal(random_.randrange(90, 112)) / 100),
            )
        self._times = [since for since, _ in self.prices]

    def close_until(self, seconds: float) -> None:
        """No spot before then, and some then."""
        before = bisect_right(self._changes, seconds)
        later = self._changes[before:]
        self._changes = [0.0, seconds, *later[before % 2 :]]

    def has_spot(self, now: datetime) -> bool:
        """Whether a spot instance can be had."""
        return bisect_right(self._changes, (now - self._start).total_seconds()) % 2 == 0

    def lasts_until(self, now: datetime) -> datetime | None:
        """When the capacity that is there now goes; ``None``: never."""
        index = bisect_right(self._changes, (now - self._start).total_seconds())
        if index >= len(self._changes) or index % 2:
            return None
        return self._start + timedelta(seconds=round(self._changes[index]))

    def spot_usd_h(self, now: datetime) -> Decimal:
        """The price of spot in force at a time."""
        return self.prices[max(0, bisect_right(self._times, now) - 1)][1]
