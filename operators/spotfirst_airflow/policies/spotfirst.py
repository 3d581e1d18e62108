"""The default policy: many pools, as patient as there is slack, and no move that does not pay.

Every option is a few hours of something (an instance in a pool until it is lost, a wait, on demand
meanwhile), and costs its dollars, and its slack and minus its work at the prices of
:mod:`~spotfirst_airflow.policies.slack`. The option that costs least is taken. At the true prices
the best one costs nothing, as the rest of the run consists of it; so options of different length
can be compared.
"""

from __future__ import annotations

import math
from datetime import datetime, timedelta
from typing import NamedTuple

from spotfirst.market import Market
from spotfirst.state import Attempt
from spotfirst_airflow.fleets import Offer
from spotfirst_airflow.policies.base import (
    Decision,
    Options,
    View,
    cheapest,
    earliest,
    late_at,
)
from spotfirst_airflow.policies.experience import Prospect, prospects
from spotfirst_airflow.policies.fallback import Fallback
from spotfirst_airflow.policies.rebalancing import leave_early
from spotfirst_airflow.policies.slack import Prices, shadow_prices, spread_of

__all__ = ["Spotfirst"]

HOUR_S = 3600.0
LEAST_HOUR = 0.05
"""An hour is worth that share of an hour of the cheapest spot, at least: nobody waits half a day
for a tenth of a cent."""
LOOK = 1.25
"""How often to think again while things go on as they are, in changeovers."""
LEAST_LOOK = 0.005
"""And at most so often: that share of the work that is left."""
MARGIN = 0.5
"""A move has to save that share of its own cost more."""
HORIZON = 1.0
"""How far ahead a move is judged: as long as the new instance is likely to last, so many times."""
_RESERVE = 0.1
"""Changeovers kept beyond the two of the safety net, so that rounding never misses a deadline."""


class Spotfirst(Options):
    """Spot where the rest of the run costs least, everything counted; the deadline first.

    - **The deadline.** Once only the work that is left (at most) and two changeovers fit: on demand.
      A spot instance that was launched before has one changeover to spare whenever it is lost.
    - **Patience.** An hour of slack has a price: what it saves at the end not to be on demand for
      it. Little while there is plenty, so a run waits for its cheap pool; much when there is not,
      so it takes what it gets.
    - **Many pools.** What a pool costs is its price, what it costs to get there (start, checkpoint
      to another region), and how often it interrupts: learnt from this run and earlier ones.
    - **No move that does not pay** for its changeover within the time that an instance lasts.

    Without a deadline an hour is worth what an hour of spot costs. While nobody knows how much
    work there is, decides :class:`Fallback`.
    """

    def decide(self, view: View) -> Decision:
        """On spot in some pool, on demand, or wait."""
        if view.work is None:
            return Fallback(retry_s=self.retry_s).decide(view)
        outlook = _Outlook.of(view, retry_s=self.retry_s)
        if outlook.slack_h <= _RESERVE * outlook.changeover_h:
            return self._late(view, outlook)
        if view.current is None:
            return self._begin(view, outlook)
        early = leave_early(view, retry_s=self.retry_s)
        return early or self._go_on(view, outlook, view.current)

    def _late(self, view: View, outlook: _Outlook) -> Decision:
        """On demand to the end; spot that is there stays as long as its loss can be made good."""
        why = "the deadline leaves no time for another interruption"
        if view.current is not None:
            if view.current.market is Market.ON_DEMAND:
                return Decision(reason=why)
            if outlook.slack_h >= -outlook.changeover_h * (1 - _RESERVE / 2):
                return Decision(reason="on spot: a loss can still be made good on demand")
        decision = cheapest(view, Market.ON_DEMAND, self.retry_s, why)
        if decision.offer is None and view.current is None:
            spot = cheapest(view, Market.SPOT, self.retry_s, f"{decision.reason}; spot instead")
            return spot if spot.offer is not None else decision
        return decision

    def _begin(self, view: View, outlook: _Outlook) -> Decision:
        """Nothing trains: the best of all pools, or what is best until one of them comes back."""
        ahead = [
            (pool.wait_h, outlook.start_usd(pool), pool)
            for pool in outlook.pools
            if pool.wait_h > 0
        ]
        rest_usd, on_demand = outlook.on_demand_usd(outlook.left_h), True
        for wait_h, then_usd, _ in ahead:
            for usd, bridges in (
                (outlook.prices.slack * wait_h, False),
                (outlook.on_demand_usd(wait_h), True),
            ):
                if usd + then_usd < rest_usd:
                    rest_usd, on_demand = usd + then_usd, bridges
        offers = []
        for pool in outlook.pools:
            usd = min(
                [outlook.start_usd(pool)]
                + [
                    outlook.bridge_usd(pool, wait_h) + then_usd
                    for wait_h, then_usd, other in ahead
                    if other is not pool
                ]
            )
            if usd < rest_usd:
                offers.append((usd, str(pool.offer.pool), pool))
        worth = f"an hour of slack is worth ${outlook.prices.slack:.2f}"
        asks = []
        for _, _, pool in sorted(offers):
            if pool.pause_h <= 0 and pool.offer.available:
                return Decision(
                    reason=f"spot at ${pool.offer.price_usd_h}/h: {worth}", offer=pool.offer
                )
            asks.append(_later(view, pool.pause_h))
        if on_demand:
            decision = cheapest(
                view, Market.ON_DEMAND, self.retry_s, f"no spot that is worth it now: {worth}"
            )
            if decision.offer is not None:
                return decision
        until = earliest(late_at(view), _later(view, outlook.look_h), *asks)
        return Decision(reason=f"waiting for spot: {worth}", until=until)

    def _go_on(self, view: View, outlook: _Outlook, current: Attempt) -> Decision:
        """An instance trains: stay, or move to a pool that is enough cheaper to pay for the move."""
        here = next((p for p in outlook.pools if p.offer.pool == current.pool), None)
        lasts_h, usd_h = math.inf, outlook.on_demand_usd_h
        if current.market is Market.SPOT:
            if here is None:
                return Decision(reason="on spot")
            since = current.launched.started_at if current.launched else current.intended_at
            lasts_h = here.rates.up_h + (view.now - since).total_seconds() / HOUR_S
            usd_h = here.rates.usd_h
        asks = []
        for pool in sorted(outlook.pools, key=lambda p: (p.rates.usd_h, str(p.offer.pool))):
            if pool is here and current.market is Market.SPOT:
                continue
            start_usd = outlook.changeover_h * (pool.rates.usd_h + outlook.prices.slack)
            stay_usd_h = usd_h + start_usd / lasts_h
            move_usd_h = pool.rates.usd_h + start_usd / pool.lasts_h
            horizon_h = min(outlook.left_h, HORIZON * pool.lasts_h)
            saved_usd = horizon_h * (stay_usd_h - move_usd_h)
            if saved_usd <= (1 + MARGIN) * start_usd + pool.rates.carry_usd:
                continue
            if pool.pause_h <= 0 and pool.offer.available:
                return Decision(
                    reason=f"saves ${saved_usd:.2f} in {horizon_h:.1f} h, for ${start_usd + pool.rates.carry_usd:.2f}",
                    offer=pool.offer,
                )
            asks.append(_later(view, pool.pause_h))
        look = _later(view, outlook.look_h) if asks or current.market is Market.ON_DEMAND else None
        return Decision(reason=f"on {current.market}", until=earliest(look, *asks))


class _Outlook(NamedTuple):
    """What there is to decide on: hours, and dollars an hour of the run's own clock."""

    pools: list[Prospect]
    on_demand_usd_h: float
    changeover_h: float
    left_h: float
    slack_h: float
    prices: Prices

    @classmethod
    def of(cls, view: View, *, retry_s: float) -> _Outlook:
        assert view.work is not None
        pools = prospects(view, retry_s=retry_s)
        changeover_h = max(view.changeover_s, 1.0) / HOUR_S
        left_h = max(view.work.likely_s, 1.0) / HOUR_S
        on_demand = _on_demand(view)
        dearest = max((pool.rates.usd_h for pool in pools), default=1.0)
        # Where nothing is to be had on demand, what cannot be had has still to be dear.
        on_demand_usd_h = (
            float(on_demand.price_usd_h) * view.clock_rate if on_demand else 10 * dearest
        )
        cheapest_usd_h = min((pool.rates.usd_h for pool in pools), default=on_demand_usd_h)
        net = late_at(view)
        slack_h = math.inf if net is None else (net - view.now).total_seconds() / HOUR_S
        rates = tuple(pool.rates for pool in pools)
        prices = shadow_prices(
            rates,
            on_demand_usd_h=on_demand_usd_h,
            changeover_h=changeover_h,
            slack_per_work=max(0.0, slack_h) / left_h,
            spread=spread_of(rates, slack_h),
        )
        least = cheapest_usd_h * (1.0 if net is None else LEAST_HOUR)
        return cls(
            pools=pools,
            on_demand_usd_h=on_demand_usd_h,
            changeover_h=changeover_h,
            left_h=left_h,
            slack_h=slack_h,
            prices=Prices(slack=max(prices.slack, least), work=prices.work),
        )

    @property
    def look_h(self) -> float:
        """How long to leave things as they are, before thinking again."""
        return max(LOOK * self.changeover_h, LEAST_LOOK * self.left_h)

    def start_usd(self, pool: Prospect) -> float:
        """An instance there, until it is lost or the work is done."""
        rates = pool.rates
        trains_h = min(self.left_h, max(0.0, pool.lasts_h - self.changeover_h))
        start_usd = rates.carry_usd + self.changeover_h * (rates.usd_h + self.prices.slack)
        return start_usd + trains_h * (rates.usd_h - self.prices.work)

    def bridge_usd(self, pool: Prospect, hours: float) -> float:
        """An instance there for so long, and the way back."""
        rates = pool.rates
        start_usd = 2 * rates.carry_usd + self.changeover_h * (rates.usd_h + self.prices.slack)
        trains_h = max(0.0, hours - self.changeover_h)
        return start_usd + trains_h * (rates.usd_h - self.prices.work)

    def on_demand_usd(self, hours: float) -> float:
        """On demand for so long."""
        start_usd = self.changeover_h * (self.on_demand_usd_h + self.prices.slack)
        trains_h = max(0.0, hours - self.changeover_h)
        return start_usd + trains_h * (self.on_demand_usd_h - self.prices.work)


def _on_demand(view: View) -> Offer | None:
    offers = [o for o in view.offers if o.market is Market.ON_DEMAND and o.available]
    return min(offers, key=lambda o: o.price_usd_h, default=None)


def _later(view: View, hours: float) -> datetime:
    return view.now + timedelta(hours=max(hours, 1e-4))
