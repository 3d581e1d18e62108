"""Greedy and Uniform Progress, as published: "Can't Be Late", NSDI 2024.

Both are here to be compared with. Their words: R is the time to the deadline and C the work left
(R0 and C0 at the beginning), d a changeover. Whatever they prefer, these rules come first:

- *Thrifty*: nothing runs once C is 0.
- *Safety net*: without an instance, and R < C + 2d: on demand to the end.
- *Exploitation*: once on spot, stay until interrupted.

An instance on spot therefore needs no watch: it began with two changeovers to spare and its own
start took one, so that whenever it is lost, the one to on demand is left. Only when the estimate
of the work grows is it left before that.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import msgspec

from spotfirst.market import Market, Pool
from spotfirst_airflow.fleets import Offer
from spotfirst_airflow.policies.base import (
    Decision,
    Options,
    View,
    cheapest,
    earliest,
    is_late,
    late_at,
)

__all__ = ["Greedy", "UniformProgress"]


class Greedy(Options):
    """Spot, or wait for it as long as the deadline allows; then on demand to the end."""

    def decide(self, view: View) -> Decision:
        """Spot, or wait, or on demand."""
        if view.current is not None:
            return _stay(view, self.retry_s)
        if is_late(view):
            return _on_demand(view, self.retry_s, "the deadline leaves no time to wait for spot")
        if view.deadline is not None and view.work is None:
            return _now(view, self.retry_s)
        return _wait_for(_spot(view, self.retry_s, "spot, while it is there"), late_at(view))


class UniformProgress(Options):
    """Progress in proportion to time: on demand when behind, patient for spot when ahead.

    With C0 the whole work, the progress expected at time t is ep(t) = t C0 / R0. Without an
    instance: spot where there is some; else on demand if behind, or wait until the run is. Back to
    spot from on demand only when cp(t) >= ep(t + 2d). Of several pools the cheapest, those in the
    zone of the last instance last: that is Uniform Progress "with failover". On demand goes
    where it is cheapest for the work left, with the way there.
    """

    def decide(self, view: View) -> Decision:
        """Spot, or wait, or on demand."""
        current = view.current
        if current is not None:
            returns_at = _ahead_at(view, slack_s=2 * view.changeover_s)
            if current.market is Market.SPOT or is_late(view) or returns_at is None:
                return _stay(view, self.retry_s)
            if view.now < returns_at:
                return Decision(reason="on demand, until ahead again", until=returns_at)
            return _spot(view, self.retry_s, "ahead of uniform progress: back to spot")
        if is_late(view):
            return _on_demand(view, self.retry_s, "the deadline leaves no time to wait for spot")
        if view.deadline is not None and view.work is None:
            return _now(view, self.retry_s)
        spot = _spot(view, self.retry_s, "spot, while it is there")
        if spot.offer is not None:
            return spot
        behind_at = _behind_at(view)
        if behind_at is not None and behind_at <= view.now:
            return _on_demand(view, self.retry_s, "behind uniform progress, and no spot")
        return _wait_for(spot, earliest(behind_at, late_at(view)))


def _stay(view: View, retry_s: float) -> Decision:
    """Exploitation; but on demand when a loss could no longer be made good."""
    assert view.current is not None
    if view.current.market is Market.ON_DEMAND:
        return Decision(reason="on demand")
    late = late_at(view)
    if late is not None and view.now > late + timedelta(seconds=view.changeover_s, milliseconds=1):
        return _on_demand(view, retry_s, "the deadline leaves no time for another interruption")
    return Decision(reason="on spot until it is interrupted")


def _wait_for(spot: Decision, until: datetime | None) -> Decision:
    """As decided, but no longer than until then."""
    if spot.offer is not None:
        return spot
    return msgspec.structs.replace(spot, until=earliest(spot.until, until))


def _now(view: View, retry_s: float) -> Decision:
    """Whatever there is: nobody can wait who has a deadline and does not know for how much work."""
    spot = _spot(view, retry_s, "spot, while it is there")
    if spot.offer is not None:
        return spot
    return _on_demand(view, retry_s, "no spot, a deadline, and no estimate yet of the work")


def _spot(view: View, retry_s: float, reason: str) -> Decision:
    last = next((a.pool for a in reversed(view.attempts) if a.launched), None)

    def order(offer: Offer) -> tuple[bool, object, str]:
        return _same_zone(offer.pool, last), offer.price_usd_h, str(offer.pool)

    return cheapest(view, Market.SPOT, retry_s, reason, order=order)


def _same_zone(pool: Pool, last: Pool | None) -> bool:
    return last is not None and pool.zone == last.zone


def _on_demand(view: View, retry_s: float, reason: str) -> Decision:
    """On demand; spot if there is none and nothing trains: it may still make it."""
    hours = view.work.likely_s / 3600 if view.work else 1.0

    def order(offer: Offer) -> tuple[float, str]:
        carry = float(view.carry_usd.get(offer.pool.zone, 0))
        return float(offer.price_usd_h) * hours + carry, str(offer.pool)

    decision = cheapest(view, Market.ON_DEMAND, retry_s, reason, order=order)
    if decision.offer is None and view.current is None:
        spot = _spot(view, retry_s, f"{decision.reason}; spot instead")
        return spot if spot.offer is not None else decision
    return decision


# -- cp and ep: how progress compares with what is expected ------------------------------------


def _pace(view: View) -> tuple[float, float, float] | None:
    """cp(t), t and C0 / R0, in seconds; ``None`` without a deadline or an estimate."""
    if view.deadline is None or view.work is None or view.began is None:
        return None
    total_s = view.work.likely_s / max(1e-9, 1 - view.done_share)
    in_all_s = (view.deadline - view.began).total_seconds()
    if in_all_s <= 0:
        return None
    elapsed_s = (view.now - view.began).total_seconds()
    return total_s - view.work.likely_s, elapsed_s, total_s / in_all_s


def _behind_at(view: View) -> datetime | None:
    """When an idle run falls behind, or fell: cp < ep. ``None`` for never."""
    pace = _pace(view)
    if pace is None or pace[2] <= 0:
        return None
    done_s, elapsed_s, rate = pace
    return _later(view.now, done_s / rate - elapsed_s, view.deadline)


def _ahead_at(view: View, *, slack_s: float) -> datetime | None:
    """When a run that trains is ahead of what is expected ``slack_s`` later; ``None`` for never."""
    pace = _pace(view)
    if pace is None or pace[2] >= 1:
        return None
    done_s, elapsed_s, rate = pace
    return _later(view.now, ((elapsed_s + slack_s) * rate - done_s) / (1 - rate), view.deadline)


def _later(now: datetime, seconds: float, at_most: datetime | None) -> datetime:
    assert at_most is not None
    if seconds >= (at_most - now).total_seconds():
        return at_most
    return now + timedelta(seconds=seconds)
