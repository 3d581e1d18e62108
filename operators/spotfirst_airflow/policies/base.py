"""What a policy is asked, and what it may answer; and what most policies do alike.

A policy is asked when no attempt is training (or the one that is will leave), and while one is,
whether to move. It launches nothing and remembers nothing: the same :class:`View` gives the same
:class:`Decision`. The controller asks it about a run, and a simulation about a recorded market.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Protocol

from spotfirst.lessons import PoolHistory
from spotfirst.market import Market, Pool
from spotfirst.state import Attempt
from spotfirst.wire import Record
from spotfirst_airflow.fleets import Offer

__all__ = [
    "LONGEST_REST_S",
    "Decision",
    "Options",
    "Policy",
    "PoolHistory",
    "View",
    "Work",
    "cheapest",
    "earliest",
    "is_late",
    "late_at",
    "lost_at",
    "rest_s",
    "resting",
]

_LOSSES = {"interrupted", "lost"}
LONGEST_REST_S = 300.0
"""The longest that a pool without capacity is left alone."""


class Work(Record):
    """Training time that is left, in seconds: what is likely, and what it is at most.

    At most with about 97.5 % confidence, as far as the pace so far tells (see ``outlook``).
    """

    likely_s: float
    most_s: float


class View(Record):
    """What a policy may look at.

    ``current`` is the attempt that is training and will not leave, if any. ``idle_since`` is when
    the run last had an instance (or began). ``work`` is ``None`` while nobody knows;
    ``changeover_s`` is what a change of instance costs in time, and ``at_risk_s`` the training that
    an end without notice can lose. ``spent_usd`` holds what is
    committed already. ``carry_usd`` is, by zone, what it costs to bring the checkpoint there,
    where that costs anything; then ``checkpoint_bytes`` are told, and what writing checkpoints from
    another region costs by the hour is in the prices of the ``offers``. ``cheaply``: the budget asks for spot alone from here on.
    ``began`` is when the time up to the deadline began to count, and ``done_share`` how much of the
    whole work is done, of 1.
    ``clock_rate`` is billed seconds per second, as of :class:`~spotfirst.events.Launched`.
    """

    now: datetime
    idle_since: datetime
    offers: tuple[Offer, ...]
    attempts: tuple[Attempt, ...] = ()
    current: Attempt | None = None
    deadline: datetime | None = None
    work: Work | None = None
    changeover_s: float = 120.0
    at_risk_s: float = 0.0
    spent_usd: Decimal = Decimal(0)
    budget_usd: Decimal | None = None
    cheaply: bool = False
    checkpoint_bytes: int = 0
    carry_usd: dict[str, Decimal] = {}
    clock_rate: float = 1.0
    history: tuple[PoolHistory, ...] = ()
    began: datetime | None = None
    done_share: float = 0.0


class Decision(Record):
    """Launch what ``offer`` says; or, without one, stay as things are and wait; or stop the run.

    It holds until something in the view changes but the time, and at most until ``until``:
    whoever asked need not ask again before. ``others`` are as good as ``offer``, where the fleet
    knows better than by price: see :class:`~spotfirst_airflow.fleets.LaunchRequest`.
    """

    reason: str
    offer: Offer | None = None
    others: tuple[Pool, ...] = ()
    until: datetime | None = None
    stop: bool = False


class Policy(Protocol):
    """Made from the spec's ``policy_options``. Raises :class:`InvalidSpec` for unknown ones.

    One that has an attribute ``only``, a market, is never taken to the other one, even when
    launches in its own are refused and the run fails for that.
    """

    def decide(self, view: View) -> Decision:
        """Where the next attempt runs. Pure: the same view gives the same decision."""
        ...


class Options(Record, forbid_unknown_fields=True):
    """``retry_s``: how long a pool that had no capacity is left alone, the first time.

    See :func:`rest_s` for the next times.
    """

    retry_s: float = 15.0


def earliest(*times: datetime | None) -> datetime | None:
    """The first of those that are given; ``None`` when none is."""
    return min((time for time in times if time is not None), default=None)


def late_at(view: View) -> datetime | None:
    """From when on only on demand keeps the deadline: the safety net of "Can't Be Late" (NSDI'24).

    What is left of the work, at most, and two changeovers just fit then: one that may have to be
    made at that moment, and one that may have begun; and so does what a loss without notice may
    cost in training. ``None`` without a deadline or an estimate.
    """
    if view.deadline is None or view.work is None:
        return None
    return view.deadline - timedelta(
        seconds=view.work.most_s + 2 * view.changeover_s + view.at_risk_s
    )


def is_late(view: View) -> bool:
    """Whether :func:`late_at` has come."""
    late = late_at(view)
    return late is not None and view.now >= late


def lost_at(attempt: Attempt) -> datetime | None:
    """When a spot attempt was lost to the fleet, or learned that it will be."""
    if attempt.ended and attempt.ended.cause in _LOSSES:
        return attempt.ended.ended_at
    if attempt.is_leaving and attempt.notice:
        return attempt.notice.seen_at
    return None


def cheapest(
    view: View,
    market: Market,
    retry_s: float,
    reason: str,
    *,
    order: Callable[[Offer], Any] | None = None,
) -> Decision:
    """The first pool with capacity in this ``order``.

    Without one the cheapest is first, and those last that took an instance from us lately.
    """
    rests = resting(view, market, retry_s)
    offers = [o for o in view.offers if o.market is market and o.available and o.pool not in rests]
    if not offers:
        return Decision(
            reason=f"no {market} capacity in any of the pools",
            until=_first_to_wake(view.offers, market, rests),
        )
    offers.sort(key=order or _by_losses_and_price(view))
    best, *others = offers
    return Decision(reason=reason, offer=best, others=tuple(each.pool for each in others))


def _by_losses_and_price(view: View) -> Callable[[Offer], Any]:
    losses: dict[object, int] = {}
    for attempt in view.attempts[-5:]:
        if lost_at(attempt):
            losses[attempt.pool] = losses.get(attempt.pool, 0) + 1
    return lambda o: (losses.get(o.pool, 0), o.price_usd_h, str(o.pool))


def _first_to_wake(
    offers: Iterable[Offer], market: Market, rests: dict[Pool, datetime]
) -> datetime | None:
    return earliest(*(rests.get(o.pool) for o in offers if o.market is market and o.available))


def resting(view: View, market: Market, retry_s: float) -> dict[Pool, datetime]:
    """The pools that had no capacity lately, and until when they are left alone."""
    refusals: dict[Pool, int] = {}
    rests: dict[Pool, tuple[datetime, float]] = {}
    for attempt in view.attempts:
        if attempt.market is not market:
            continue
        if attempt.launched:  # there is capacity again: what refused before, refused once
            refusals.clear()
            rests = {pool: (at, retry_s) for pool, (at, _) in rests.items()}
        refused = attempt.not_launched
        if refused is None or refused.cause != "no_capacity":
            continue
        for pool in refused.pools or (attempt.pool,):
            refusals[pool] = refusals.get(pool, 0) + 1
            rest = rest_s(refusals[pool], retry_s=retry_s, salt=attempt.token)
            rests[pool] = (refused.at, rest)
    until = {pool: at + timedelta(seconds=seconds) for pool, (at, seconds) in rests.items()}
    return {pool: at for pool, at in until.items() if view.now < at}


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
