"""What a run cost, from its journal alone: one charge per attempt, and their sum.

Prices were frozen into the journal when the instance was launched, so a report never changes
later. A run's cost is the sum of what its charges say, each rounded to a hundredth of a cent.

The rules of billing are in :mod:`spotfirst.spending`.

What crosses from one region to another is paid by the GB (10^9 bytes): what an instance has read
from the run's storage and written to it, at the prices of its launch, interrupted or not. Known at
its end, it is in the bill from then on.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal

from spotfirst.market import Market, Pool
from spotfirst.spending import (
    FREE_IF_INTERRUPTED_WITHIN_S,
    amount_usd,
    egress_usd,
    ended_egress_usd,
    used,
)
from spotfirst.state import Attempt, RunState
from spotfirst.wire import Record

__all__ = [
    "FREE_IF_INTERRUPTED_WITHIN_S",
    "Bill",
    "Charge",
    "bill",
    "egress_usd",
    "is_simulated",
    "promised_usd",
    "usd",
]

_QUANTUM = Decimal("0.0001")


class Charge(Record):
    """What one attempt cost.

    ``used_s`` are billed seconds (in a local market that runs faster than real time, its own).
    ``list_usd`` is the on-demand price of the same seconds. ``rule`` says why ``cost_usd`` is
    what it is. ``is_estimate``: the instance still runs, or its end was not seen exactly; so it is
    with one that was kept for debugging, which may have been ended before its time.
    ``price_timeline`` is what the pool cost meanwhile, (since when, USD per hour), to reconcile
    with an invoice; ``cost_usd`` is of ``price_usd_h`` alone (see ``timelines``).
    ``egress_usd`` comes to that: what its bytes cost on their way between regions.
    """

    attempt: int
    market: Market
    pool: Pool
    start: datetime
    end: datetime
    used_s: float
    price_usd_h: Decimal
    price_source: str
    price_at: datetime
    on_demand_usd_h: Decimal
    cost_usd: Decimal
    list_usd: Decimal
    rule: str
    is_estimate: bool = False
    tags: dict[str, str] = {}
    price_timeline: tuple[tuple[datetime, Decimal], ...] = ()
    egress_usd: Decimal = Decimal(0)


class Bill(Record):
    """A run's charges and what they add up to, with what crossed between regions.

    ``on_demand_usd`` is what the same work would have cost on one on-demand instance without
    interruptions: the training time whose steps were kept, and one start-up; see
    :attr:`known_on_demand_usd`. ``lost_steps`` were trained, not committed, and trained again;
    ``None`` where that is not known, as of a script that tells no steps.
    """

    charges: tuple[Charge, ...]
    total_usd: Decimal
    on_demand_usd: Decimal
    lost_steps: int | None
    is_final: bool = False
    succeeded: bool = False

    @property
    def egress_usd(self) -> Decimal:
        """The part of the total that was paid for bytes between regions."""
        return sum((charge.egress_usd for charge in self.charges), Decimal(0))

    @property
    def saving_usd(self) -> Decimal:
        """What spot saved against on demand; negative when it cost more."""
        return self.on_demand_usd - self.total_usd

    @property
    def known_on_demand_usd(self) -> Decimal | None:
        """What the work would have cost on demand; ``None`` until the run is over."""
        return self.on_demand_usd if self.is_final and self.on_demand_usd else None

    @property
    def saved_usd(self) -> Decimal | None:
        """What a success saved against on demand; ``None`` for a run that has no result."""
        return self.saving_usd if self.succeeded and self.known_on_demand_usd else None

    @property
    def saved_share(self) -> float | None:
        """:attr:`saved_usd` as a share of the on-demand price."""
        return self.saving_share if self.saved_usd is not None else None

    @property
    def is_simulated(self) -> bool:
        """Whether the dollars are those of a simulated market, which nobody pays."""
        return any(is_simulated(charge.price_source) for charge in self.charges)

    @property
    def saving_in_words(self) -> str:
        """``62% saved`` or ``5% dearer``; empty where nothing is known."""
        if self.saved_share is None:
            return ""
        return f"{abs(self.saved_share):.0%} {'saved' if self.saved_share >= 0 else 'dearer'}"

    @property
    def saving_share(self) -> float:
        """Of the on-demand price; negative when spot was dearer. 0 when nothing was trained."""
        return float(self.saving_usd / self.on_demand_usd) if self.on_demand_usd else 0.0


def bill(
    state: RunState,
    *,
    now: datetime,
    tags: dict[str, str] | None = None,
    frozen_prices: bool = True,
) -> Bill:
    """The bill of a run up to ``now``; attempts that never got an instance cost nothing.

    Without ``frozen_prices``, an attempt whose price is known at each time costs what it was then:
    for comparisons with figures that were made so.
    """
    charges = tuple(
        _charge(a, now=now, tags=tags or {}, frozen_price=frozen_prices)
        for a in state.attempts
        if a.launched
    )
    kept = _kept(state.attempts)
    return Bill(
        charges=charges,
        total_usd=sum((charge.cost_usd + charge.egress_usd for charge in charges), Decimal(0)),
        on_demand_usd=_on_demand(state.attempts, kept),
        lost_steps=_lost(state.attempts, kept),
        is_final=state.is_final,
        succeeded=state.result is not None,
    )


def promised_usd(state: RunState, *, now: datetime) -> Decimal:
    """What the instances that are kept for debugging may yet cost from now on."""
    later = (a.ended.kept_until for a in state.attempts if a.ended and a.ended.kept_until)
    kept = tuple(a for a in state.attempts if a.ended and a.ended.kept_until)
    end = max([now, *filter(None, later)])
    return sum(
        (
            _charge(a, now=end, tags={}).cost_usd - _charge(a, now=now, tags={}).cost_usd
            for a in kept
        ),
        Decimal(0),
    )


def usd(amount: Decimal | None, *, simulated: bool = False) -> str:
    """An amount for people: cents, and more digits for amounts below a dollar; "-" for ``None``."""
    if amount is None:
        return "-"
    text = f"${amount:.2f}" if abs(amount) >= 1 else f"${amount:.4f}"
    return f"{text} simulated" if simulated else text


def is_simulated(price_source: str) -> bool:
    """Whether a price is of the local fleet, whose market is simulated."""
    return price_source.startswith("local fleet")


def _charge(
    attempt: Attempt, *, now: datetime, tags: dict[str, str], frozen_price: bool = True
) -> Charge:
    launched, ended = attempt.launched, attempt.ended
    assert launched is not None
    spent = used(attempt, now=now)
    cost, rule = spent.cost_usd, spent.rule
    timeline = ended.price_timeline if ended else ()
    if timeline and not frozen_price and not spent.is_free:
        cost = _by_time(timeline, end=spent.end, clock_rate=launched.clock_rate)
        rule = rule.replace("seconds used", "price of each time")
    return Charge(
        attempt=attempt.number,
        market=attempt.market,
        pool=attempt.pool,
        start=launched.started_at,
        end=spent.end,
        used_s=spent.used_s,
        price_usd_h=launched.price_usd_h,
        price_source=launched.price_source,
        price_at=launched.price_at,
        on_demand_usd_h=launched.on_demand_usd_h,
        cost_usd=cost,
        list_usd=amount_usd(spent.used_s, launched.on_demand_usd_h),
        rule=rule,
        is_estimate=ended is None or ended.cause == "lost" or ended.kept_until is not None,
        tags=tags,
        price_timeline=timeline,
        egress_usd=ended_egress_usd(attempt),
    )


def _by_time(
    timeline: tuple[tuple[datetime, Decimal], ...], *, end: datetime, clock_rate: float
) -> Decimal:
    ends = [since for since, _ in timeline[1:]] + [end]
    exact = sum(
        (
            Decimal(repr(max(0.0, (until - since).total_seconds()) * clock_rate)) * price
            for (since, price), until in zip(timeline, ends, strict=True)
        ),
        Decimal(0),
    )
    return (exact / 3600).quantize(_QUANTUM, rounding=ROUND_HALF_UP)


def _kept(attempts: Iterable[Attempt]) -> list[tuple[Attempt, int, int]]:
    """(attempt, steps trained, of these kept) for every attempt that trained."""
    trained = [
        a
        for a in attempts
        if a.ended and a.ended.start_step is not None and a.ended.step is not None
    ]
    rows = []
    for index, attempt in enumerate(trained):
        assert attempt.ended
        start, last = attempt.ended.start_step or 0, attempt.ended.step or 0
        following = trained[index + 1].ended if index + 1 < len(trained) else None
        resumed = last if following is None else min(last, following.start_step or 0)
        rows.append((attempt, max(0, last - start), max(0, resumed - start)))
    return rows


def _lost(attempts: Iterable[Attempt], kept: list[tuple[Attempt, int, int]]) -> int | None:
    """How many steps were trained more than once; ``None`` when nothing tells.

    A first step has a time, and it is what ends the start-up. What the files of a script were
    captured to has none: its numbers are no steps.
    """
    ended = [a for a in attempts if a.launched and a.ended]
    tells = [a for a, trained, _ in kept if trained and a.ended]
    if any(a.ended and not a.ended.startup_s for a in tells):
        return None
    if ended and not any(_tells_steps(a) for a, _, _ in kept):
        return None
    return sum(trained - kept_steps for _, trained, kept_steps in kept)


def _tells_steps(attempt: Attempt) -> bool:
    ended = attempt.ended
    return ended is not None and (bool(ended.startup_s) or ended.total_steps is not None)


def _on_demand(attempts: Iterable[Attempt], kept: list[tuple[Attempt, int, int]]) -> Decimal:
    if not any(a.ended and a.ended.training_s for a, _, _ in kept):
        # a script that tells no steps: all its time counts
        return sum(
            (
                _charge(a, now=a.ended.ended_at, tags={}).list_usd
                for a in attempts
                if a.launched and a.ended
            ),
            Decimal(0),
        )
    total = Decimal(0)
    for attempt, trained, kept_steps in kept:
        if attempt.launched and attempt.ended and trained:
            seconds = attempt.ended.training_s * kept_steps / trained * attempt.launched.clock_rate
            total += amount_usd(seconds, attempt.launched.on_demand_usd_h)
    first = next((a for a, _, _ in kept if a.launched and a.ended), None)
    if first and first.launched and first.ended:
        seconds = first.ended.startup_s * first.launched.clock_rate
        total += amount_usd(seconds, first.launched.on_demand_usd_h)
    return total
