"""What is known of each spot pool: what it costs, how long it lasts, how long it stays away.

A pool is up while it has an instance of ours, and down from a loss or a refusal until it gives
one again. Nobody sees it otherwise: on EC2, who wants to know whether there is capacity asks for
an instance.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from spotfirst.market import Market, Pool
from spotfirst.state import Attempt
from spotfirst_airflow.fleets import Offer
from spotfirst_airflow.policies.base import LONGEST_REST_S, PoolHistory, View
from spotfirst_airflow.policies.slack import PoolRates

__all__ = ["Prospect", "Seen", "look_back", "prospects"]

HOUR_S = 3600.0
USUAL_UP_H = 5.0
"""How long an instance lasts in a pool of which nothing is known."""
USUAL_DOWN_H = 2.0
"""How long such a pool is without capacity."""
WEIGHT = 2.0
"""As if both had been seen so many times."""
MEMORY = 0.4
"""What a spell still counts when another one has followed: short ones come in rows."""
LONGER = 0.5
"""How much longer than on average an instance lasts in a pool that nobody has seen down for long:
who comes at any time comes upon long spells more often than upon short ones. As a share."""
FIRST_PAUSE = 2.0
"""How long a pool is left alone that has just gone down, in changeovers: who comes back at once
gets the short spells that precede and follow an interruption."""
PAUSE = 0.25
"""How long it is left alone later, as a share of the time for which it has been down."""
LONGEST_PAUSE = 10.0
"""In changeovers; but no shorter than other policies' longest rest."""


class Prospect(NamedTuple):
    """What a spot pool promises. ``wait_h`` is how long it will be down yet, 0 if it may be up.

    ``pause_h`` is when to ask it again, and ``lasts_h`` how long it will then last.
    """

    offer: Offer
    rates: PoolRates
    wait_h: float
    pause_h: float
    lasts_h: float


@dataclass
class Seen:
    """One pool, in hours of the market; of ``losses`` and ``up_h`` the newest count most.

    ``down_since`` is set while it is known to be down, ``tried_at`` is when that was last seen.
    """

    up_h: float = 0.0
    losses: float = 0.0
    down_h: float = 0.0
    returns: int = 0
    down_since: datetime | None = None
    tried_at: datetime | None = None

    def mean_up_h(self) -> float:
        """How long an instance lasts, on average."""
        return (USUAL_UP_H * WEIGHT + self.up_h) / (WEIGHT + self.losses)

    def mean_down_h(self, *, with_this_h: float = 0.0) -> float:
        """How long it is down, on average, if it is now for at least so long."""
        return (USUAL_DOWN_H * WEIGHT + self.down_h + with_this_h) / (WEIGHT + self.returns)


def prospects(view: View, *, retry_s: float) -> list[Prospect]:
    """Every spot pool that is offered, in hours of the run's own clock."""
    rate = view.clock_rate
    seen = look_back(view.attempts, view.history, clock_rate=rate)
    found = []
    for offer in view.offers:
        if offer.market is not Market.SPOT:
            continue
        pool = seen.get(offer.pool, _NOTHING)
        wait_h = pause_h = down_h = 0.0
        if pool.down_since is not None and pool.tried_at is not None:
            down_h = _hours(pool.down_since, pool.tried_at)
            # The longer it has been down, the longer it will be: times without capacity have a
            # heavy tail (in 45 days of nine V100 zones about 2 h more after none, 8 h after 8 h).
            wait_h = pool.mean_down_h() / rate + _hours(pool.down_since, view.now)
            changeover_h = view.changeover_s / HOUR_S
            longest_h = max(LONGEST_PAUSE * changeover_h, LONGEST_REST_S / HOUR_S)
            pause_h = max(
                retry_s / HOUR_S,
                FIRST_PAUSE * changeover_h,
                min(PAUSE * _hours(pool.down_since, view.now), longest_h),
            ) - _hours(pool.tried_at, view.now)
        if not offer.available:
            wait_h = max(wait_h, pool.mean_down_h() / rate)
            pause_h = max(pause_h, view.changeover_s / HOUR_S)
        rates = PoolRates(
            usd_h=float(offer.price_usd_h) * rate,
            up_h=pool.mean_up_h() / rate,
            down_h=pool.mean_down_h(with_this_h=down_h * rate) / rate,
            carry_usd=float(view.carry_usd.get(offer.pool.zone, 0)),
        )
        unseen_h = rates.up_h * LONGER
        if pool.tried_at is not None:
            unseen_h = min(unseen_h, _hours(pool.tried_at, view.now))
        found.append(Prospect(offer, rates, wait_h, pause_h, rates.up_h + unseen_h))
    return found


def look_back(
    attempts: Iterable[Attempt], histories: Iterable[PoolHistory], *, clock_rate: float = 1.0
) -> dict[Pool, Seen]:
    """What earlier runs, and then these attempts, saw of each spot pool."""
    seen = {
        each.pool: Seen(
            up_h=each.up_s / HOUR_S,
            losses=each.losses,
            down_h=each.down_s / HOUR_S,
            returns=each.returns,
        )
        for each in histories
    }
    for attempt in attempts:
        if attempt.market is not Market.SPOT:
            continue
        refused = attempt.not_launched
        if attempt.launched is not None:
            _had(seen.setdefault(attempt.pool, Seen()), attempt, clock_rate)
        elif refused is not None and refused.cause == "no_capacity":
            for pool in refused.pools or (attempt.pool,):
                one = seen.setdefault(pool, Seen())
                one.down_since, one.tried_at = one.down_since or refused.at, refused.at
    return seen


def _had(one: Seen, attempt: Attempt, clock_rate: float) -> None:
    """Count an instance that there was; one that still is, when it is over."""
    assert attempt.launched is not None
    if one.down_since is not None:
        one.down_h += _hours(one.down_since, attempt.launched.started_at) * clock_rate
        one.returns += 1
        one.down_since = one.tried_at = None
    lost_at = until = None
    if attempt.ended is not None:
        until = attempt.ended.ended_at
        lost_at = until if attempt.ended.cause in {"interrupted", "lost"} else None
    if attempt.notice is not None and attempt.notice.kind == "interruption":
        lost_at = until = attempt.notice.seen_at
    if lost_at is not None:
        one.losses = one.losses * MEMORY + 1
        one.up_h *= MEMORY
        one.down_since = one.tried_at = lost_at
    if until is not None:
        one.up_h += _hours(attempt.launched.started_at, until) * clock_rate


def _hours(since: datetime, until: datetime) -> float:
    return max(0.0, (until - since).total_seconds() / HOUR_S)


_NOTHING = Seen()
