"""What a policy is shown, and when to ask it again: for runs and for simulations alike."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal

import msgspec

from spotfirst.market import Market
from spotfirst.state import Attempt, RunState
from spotfirst_airflow.budget import SHUTDOWN_S, Budget, run_usd
from spotfirst_airflow.costs import usd
from spotfirst_airflow.fleets import Offer
from spotfirst_airflow.policies import Decision, Policy, View

__all__ = [
    "affordable",
    "ask",
    "carry_usd",
    "clock_rate",
    "cost_usd",
    "current_attempt",
    "idle_since",
    "may_use",
    "open_usd",
    "same_kind",
    "why_not_begin",
    "with_writing",
]

_NUMBERS = re.compile(r"[\d.,:]+")


def ask(
    policy: Policy,
    view: View,
    *,
    budget: Budget | None = None,
    shutdown_s: float = SHUTDOWN_S,
) -> Decision:
    """The policy's decision within the budget, which it need not know of.

    It is shown what the rest of the budget can start. When that leaves out on demand and the run
    is there, it is moved to spot as soon as there is some.
    """
    if budget is None:
        return policy.decide(view)
    cheaply = budget.is_cheaply(view.spent_usd)
    offers = affordable(budget, view, shutdown_s=shutdown_s)
    view = msgspec.structs.replace(view, offers=offers, budget_usd=budget.usd, cheaply=cheaply)
    current = view.current
    if not cheaply or current is None or current.market is Market.SPOT:
        return policy.decide(view)
    decision = policy.decide(msgspec.structs.replace(view, current=None))
    if decision.offer is None:
        return msgspec.structs.replace(decision, reason="on demand until there is spot again")
    reason = f"the budget asks to go on cheaper: {decision.reason}"
    return msgspec.structs.replace(decision, reason=reason)


def affordable(
    budget: Budget | None, view: View, *, shutdown_s: float = SHUTDOWN_S
) -> tuple[Offer, ...]:
    """The offers that the rest of the budget can start, and that it lets the run use."""
    if budget is None:
        return view.offers
    cheaply = budget.is_cheaply(view.spent_usd)
    return tuple(
        offer
        for offer in view.offers
        if not (cheaply and offer.market is Market.ON_DEMAND)
        and budget.can_start(
            offer.price_usd_h, spent_usd=_spent_there(view, offer),
            changeover_s=view.changeover_s, shutdown_s=shutdown_s, clock_rate=view.clock_rate,
        )
    )  # fmt: skip


def why_not_begin(
    policy: Policy, budget: Budget | None, view: View, *, shutdown_s: float = SHUTDOWN_S
) -> str:
    """Why no instance can be started any more, so that waiting is in vain; empty when one can.

    ``view`` has all offers. A policy that stays in one market (``only``) is not helped by what the
    rest of the budget can start in the other.
    """
    if budget is None or view.current is not None:
        return ""
    usable = tuple(offer for offer in view.offers if may_use(policy, offer.market))
    view = msgspec.structs.replace(view, offers=usable)
    if not usable or affordable(budget, view, shutdown_s=shutdown_s):
        return ""
    offer = min(usable, key=lambda offer: offer.price_usd_h)
    left_usd = usd(max(Decimal(0), budget.usd - view.spent_usd))
    if budget.is_cheaply(view.spent_usd):
        spot = [offer for offer in usable if offer.market is Market.SPOT]
        if not spot:
            return (
                f"what is left of the budget, {left_usd}, is for spot alone "
                '(on_budget="continue_cheaper"), and the policy uses on demand alone'
            )
        offer = min(spot, key=lambda offer: offer.price_usd_h)
    return (
        f"what is left of the budget, {left_usd}, is too little to start an instance "
        f"({offer.market}, {usd(offer.price_usd_h)}/h, about {view.changeover_s:.0f} s) "
        "and to end it with a checkpoint"
    )


def may_use(policy: Policy, market: Market) -> bool:
    """Whether the policy may ever launch there."""
    return market is (getattr(policy, "only", None) or market)


def carry_usd(offers: Iterable[Offer], checkpoint_bytes: int) -> dict[str, Decimal]:
    """By zone, what it costs to read the checkpoint there, where that costs anything."""
    if not checkpoint_bytes:
        return {}
    size_gb = Decimal(checkpoint_bytes) / 10**9
    return {each.pool.zone: size_gb * each.read_usd_gb for each in offers if each.read_usd_gb}


def with_writing(
    offers: Iterable[Offer], written_bytes_h: float, *, clock_rate: float = 1.0
) -> tuple[Offer, ...]:
    """The offers with what an hour of checkpoints costs to write from there in their price.

    ``written_bytes_h`` is by the real clock, and a price by the billed one. To a hundredth of a cent.
    """
    written_gb_h = Decimal(repr(written_bytes_h / clock_rate)) / 10**9
    return tuple(
        msgspec.structs.replace(
            each, price_usd_h=each.price_usd_h + round(written_gb_h * each.write_usd_gb, 4)
        )
        if written_gb_h and each.write_usd_gb
        else each
        for each in offers
    )


def _spent_there(view: View, offer: Offer) -> Decimal:
    """What is committed once the checkpoint is on its way to this pool.

    With what the instances that are there, also those that are to leave, cost until the new one
    can take over.
    """
    there = {each.number: each for each in view.attempts if each.is_open}
    if view.current is not None:
        there[view.current.number] = view.current
    until_then_usd = cost_usd(there.values(), view.changeover_s)
    return view.spent_usd + view.carry_usd.get(offer.pool.zone, Decimal(0)) + until_then_usd


def clock_rate(state: RunState) -> float:
    """Billed seconds per second, as of the last instance that there was; 1 before the first."""
    launched = (a.launched for a in reversed(state.attempts) if a.launched)
    return next((each.clock_rate for each in launched), 1.0)


def idle_since(state: RunState, now: datetime) -> datetime:
    """When the run last had an instance, or began (again)."""
    if any(a.launched and not a.is_leaving for a in state.open_attempts):
        return now
    ends = [a.ended.ended_at for a in state.attempts if a.ended]
    ends += [a.notice.seen_at for a in state.open_attempts if a.notice]
    began = state.reopened.at if state.reopened else state.created_at
    return max([*ends, began or now])


def current_attempt(state: RunState) -> tuple[Attempt | None, bool]:
    """The attempt that is there and will not leave, if any; and whether it is to replace another."""
    staying = [attempt for attempt in state.open_attempts if not attempt.is_leaving]
    return (staying[-1] if staying else None), len(staying) > 1


def open_usd(state: RunState, seconds: float) -> Decimal:
    """What all open instances together cost in so many seconds."""
    return cost_usd(state.open_attempts, seconds)


def cost_usd(attempts: Iterable[Attempt], seconds: float) -> Decimal:
    """What the instances of these attempts together cost in so many seconds."""
    launched = (attempt.launched for attempt in attempts)
    return sum(
        (run_usd(each.price_usd_h, seconds, each.clock_rate) for each in launched if each),
        Decimal(0),
    )


def same_kind(one: str, other: str) -> bool:
    """Whether two reasons say the same, but for their numbers."""
    return _NUMBERS.sub("#", one) == _NUMBERS.sub("#", other)
