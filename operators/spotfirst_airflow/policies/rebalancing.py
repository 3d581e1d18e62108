"""Leaving a spot pool when the fleet recommends it, before there is an interruption."""

from __future__ import annotations

from datetime import timedelta

import msgspec

from spotfirst.market import Market
from spotfirst_airflow.policies.base import Decision, View, cheapest

__all__ = ["leave_early"]

MOST_LAUNCHES_AN_HOUR = 4
"""AWS may recommend it again and again where all pools are rough: then it is of no use."""


def leave_early(view: View, *, retry_s: float) -> Decision | None:
    """A replacement in another spot pool, below the price on demand; ``None`` to stay.

    For an attempt on spot with a rebalance recommendation. Not for the little work of two
    changeovers, nor after :data:`MOST_LAUNCHES_AN_HOUR`. What is launched has no recommendation
    of its own, so there is one move for each.
    """
    current = view.current
    if current is None or current.market is not Market.SPOT:
        return None
    if current.notice is None or current.notice.kind != "rebalance":
        return None
    if view.work is not None and view.work.likely_s < 2 * view.changeover_s:
        return None
    recently = view.now - timedelta(hours=1)
    if sum(1 for a in view.attempts if a.launched and a.launched.at > recently) > (
        MOST_LAUNCHES_AN_HOUR
    ):
        return None
    on_demand = [o.price_usd_h for o in view.offers if o.market is Market.ON_DEMAND]
    elsewhere = tuple(
        offer
        for offer in view.offers
        if offer.pool != current.pool and all(offer.price_usd_h < usd_h for usd_h in on_demand)
    )
    reason = f"the fleet recommends to leave {current.pool} before an interruption"
    there = msgspec.structs.replace(view, offers=elsewhere)
    decision = cheapest(there, Market.SPOT, retry_s, reason)
    return decision if decision.offer is not None else None
