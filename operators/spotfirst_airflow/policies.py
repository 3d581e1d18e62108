"""Where the next attempt runs: pure functions from what is known now to a decision.

A policy is asked when no attempt is training (or the one that is will leave), and while an
on-demand one is, whether to go back to spot. It launches nothing and remembers nothing: the same
:class:`View` gives the same :class:`Decision`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from importlib.metadata import entry_points
from typing import Any, Protocol

import msgspec

from spotfirst.errors import InvalidSpec
from spotfirst.market import Market, Pool
from spotfirst.state import Attempt
from spotfirst.wire import Record
from spotfirst_airflow.fleets import Offer

__all__ = [
    "Decision",
    "Fallback",
    "OnDemand",
    "Policy",
    "SpotOnly",
    "View",
    "load_policy",
    "rest_s",
]

_LOSSES = {"interrupted", "lost"}
LONGEST_REST_S = 300.0
"""The longest that a pool without capacity is left alone."""


class View(Record):
    """What a policy may look at.

    ``current`` is the attempt that is training and will not leave, if any. ``idle_since`` is when
    the run last had an instance (or began). ``work_left_s`` is an estimate, ``None`` before the
    first steps; ``changeover_s`` is what a change of instance costs in time.
    """

    now: datetime
    idle_since: datetime
    offers: tuple[Offer, ...]
    attempts: tuple[Attempt, ...] = ()
    current: Attempt | None = None
    deadline: datetime | None = None
    work_left_s: float | None = None
    changeover_s: float = 120.0


class Decision(Record):
    """Launch what ``offer`` says; or, without one, stay as things are and wait.

    ``others`` are as good, where the fleet knows better than by price: see :class:`LaunchRequest`.
    """

    reason: str
    offer: Offer | None = None
    others: tuple[Pool, ...] = ()


class Policy(Protocol):
    """Made from the spec's ``policy_options``. Raises :class:`InvalidSpec` for unknown ones."""

    def decide(self, view: View) -> Decision:
        """Where the next attempt runs. Pure: the same view gives the same decision."""
        ...


class _Options(Record, forbid_unknown_fields=True):
    """``retry_s``: how long a pool that had no capacity is left alone, the first time.

    See :func:`rest_s` for the next times.
    """

    retry_s: float = 15.0


class OnDemand(_Options):
    """On demand from the first second to the last: dear, and never interrupted."""

    def decide(self, view: View) -> Decision:
        """On demand, or wait for it."""
        if view.current:
            return Decision(reason="on demand, as asked")
        return _cheapest(view, Market.ON_DEMAND, self.retry_s, "on demand, as asked")


class SpotOnly(_Options):
    """Spot, or wait for it. The deadline may pass."""

    def decide(self, view: View) -> Decision:
        """Spot, or wait for it."""
        if view.current:
            return Decision(reason="on spot, as asked")
        return _cheapest(view, Market.SPOT, self.retry_s, "spot, as asked")


class Fallback(_Options):
    """Spot first; on demand when spot is too rough, too scarce, or the deadline is too near.

    - ``losses`` spot instances lost within ``loss_window_s``: on demand until that is past;
    - nothing to run on for ``no_capacity_s``: on demand;
    - the work that is left, and two changeovers, just fit before the deadline: on demand to the
      end (the safety net of "Can't Be Late", NSDI'24).

    Back to spot once there is some, the on-demand attempt is ``return_after_s`` old, none of the
    above holds, and the work that is left is worth the move: longer than two changeovers. While nobody knows how much work is left, a run with a deadline takes spot
    when there is some, and does not wait for it.
    """

    losses: int = 3
    loss_window_s: float = 3600.0
    no_capacity_s: float = 300.0
    return_after_s: float = 600.0

    def decide(self, view: View) -> Decision:
        """Spot while it holds; on demand while one of the reasons above does."""
        why = self._why_on_demand(view)
        if view.current is not None:
            return self._while_training(view, view.current, why)
        if why:
            decision = _cheapest(view, Market.ON_DEMAND, self.retry_s, why)
            if decision.offer is None and not self._late(view):
                spot = _cheapest(
                    view, Market.SPOT, self.retry_s, f"{decision.reason}; spot instead"
                )
                return spot if spot.offer else decision
            return decision
        spot = _cheapest(view, Market.SPOT, self.retry_s, "spot first")
        if spot.offer is None and (why := self._why_not_wait(view)):
            return _cheapest(view, Market.ON_DEMAND, self.retry_s, why)
        return spot

    def _while_training(self, view: View, current: Attempt, why: str) -> Decision:
        if current.market is Market.SPOT:
            if self._late(view):
                return _cheapest(view, Market.ON_DEMAND, self.retry_s, why)
            return Decision(reason="on spot")
        age = view.now - (current.launched.started_at if current.launched else current.intended_at)
        if why or age < timedelta(seconds=self.return_after_s):
            return Decision(reason=why or "on demand for a while yet")
        if view.work_left_s is not None and view.work_left_s < 2 * view.changeover_s:
            return Decision(reason="on demand for the little work that is left")
        return _cheapest(view, Market.SPOT, self.retry_s, "spot is back")

    def _why_on_demand(self, view: View) -> str:
        """Why spot is not to be used now; empty when it is."""
        if self._late(view):
            return "the deadline leaves no time for another interruption"
        recent = view.now - timedelta(seconds=self.loss_window_s)
        lost = sum(
            1
            for attempt in view.attempts
            if attempt.market is Market.SPOT and (at := _lost_at(attempt)) and at > recent
        )
        if lost >= self.losses:
            return f"{lost} spot instances lost within {self.loss_window_s:.0f} s"
        return ""

    def _why_not_wait(self, view: View) -> str:
        """Why on demand is taken when there is no spot; empty when it is waited for.

        Asked only then: a controller that comes late to a run finds it idle for long, too.
        """
        idle_s = (view.now - view.idle_since).total_seconds()
        if idle_s >= self.no_capacity_s:
            return f"no spot capacity for {idle_s:.0f} s"
        if view.deadline is not None and view.work_left_s is None:
            return "no spot now, a deadline, and no estimate yet of the work"
        return ""

    def _late(self, view: View) -> bool:
        if view.deadline is None or view.work_left_s is None:
            return False
        left_s = (view.deadline - view.now).total_seconds()
        return left_s < view.work_left_s + 2 * view.changeover_s


def _lost_at(attempt: Attempt) -> datetime | None:
    """When a spot attempt was lost to the fleet, or learned that it will be."""
    if attempt.ended and attempt.ended.cause in _LOSSES:
        return attempt.ended.ended_at
    if attempt.is_leaving and attempt.notice:
        return attempt.notice.seen_at
    return None


def _cheapest(view: View, market: Market, retry_s: float, reason: str) -> Decision:
    """The cheapest pool with capacity, those last that took an instance from us lately."""
    resting = _resting(view, market, retry_s)
    losses: dict[object, int] = {}
    for attempt in view.attempts[-5:]:
        if _lost_at(attempt):
            losses[attempt.pool] = losses.get(attempt.pool, 0) + 1
    offers = [
        o for o in view.offers if o.market is market and o.available and o.pool not in resting
    ]
    if not offers:
        return Decision(reason=f"no {market} capacity in any of the pools")
    offers.sort(key=lambda o: (losses.get(o.pool, 0), o.price_usd_h, str(o.pool)))
    best, *others = offers
    return Decision(reason=reason, offer=best, others=tuple(each.pool for each in others))


def _resting(view: View, market: Market, retry_s: float) -> set[Pool]:
    """The pools that had no capacity lately, and are left alone for now."""
    refusals: dict[Pool, int] = {}
    resting: dict[Pool, tuple[datetime, float]] = {}
    for attempt in view.attempts:
        if attempt.market is not market:
            continue
        if attempt.launched:  # there is capacity again: what refused before, refused once
            refusals.clear()
            resting = {pool: (at, retry_s) for pool, (at, _) in resting.items()}
        refused = attempt.not_launched
        if refused is None or refused.cause != "no_capacity":
            continue
        for pool in refused.pools or (attempt.pool,):
            refusals[pool] = refusals.get(pool, 0) + 1
            rest = rest_s(refusals[pool], retry_s=retry_s, salt=attempt.token)
            resting[pool] = (refused.at, rest)
    return {
        pool for pool, (at, seconds) in resting.items() if (view.now - at).total_seconds() < seconds
    }


def rest_s(refusals: int, *, retry_s: float, salt: str) -> float:
    """How long a pool is left alone that has refused so often since the last launch.

    ``retry_s`` the first time, and twice as long each time, up to :data:`LONGEST_REST_S`. From the
    second time on a part of up to a half is taken off, another for each ``salt`` (the attempt's
    token), so that many runs that failed together do not come back together; for the same salt it
    is the same, so that all controllers of a run agree. ("Equal jitter": AWS Architecture Blog,
    "Exponential Backoff And Jitter".)
    """
    if refusals <= 1:
        return retry_s
    longest = max(retry_s, LONGEST_REST_S)
    full = min(longest, retry_s * 2.0 ** min(refusals - 1, 32))
    digest = hashlib.sha256(salt.encode()).digest()
    return max(retry_s, full * (1 - int.from_bytes(digest[:4], "big") / 2**33))


def load_policy(name: str, options: Mapping[str, Any]) -> Policy:
    """The policy of this name. Raises :class:`InvalidSpec` for an unknown name or option."""
    found = {entry.name: entry for entry in entry_points(group="spotfirst.policies")}
    if name not in found:
        msg = f"unknown policy {name!r}; installed are: {', '.join(sorted(found)) or 'none'}"
        raise InvalidSpec(msg)
    kind: type[Policy] = found[name].load()
    try:
        return msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as error:
        msg = f"policy {name!r} cannot be made from {dict(options)}: {error}"
        raise InvalidSpec(msg) from error
