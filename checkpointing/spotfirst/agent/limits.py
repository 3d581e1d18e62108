"""When the money of a run is spent, by what its instance can know: for a stop without a controller.

The controllers keep budget and deadline. This is for when there is none (the triggerer is down, the
DAG was deleted), or none that can write: then the agent stops by itself, with a checkpoint. It
knows the deadline and the budget from the spec, and prices and times of all attempts from the
journal, which it reads now and then; without it, what was read last is extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal

import msgspec

from spotfirst import events as e
from spotfirst.errors import FormatError
from spotfirst.run import Run
from spotfirst.spec import RunSpec
from spotfirst.spending import egress_usd, ended_egress_usd, used
from spotfirst.state import Attempt, RunState
from spotfirst.wire import Clock, Record

__all__ = ["Forecast", "Purse", "forecast"]

_PERIOD_S = 30.0
_SOON_S = 3.0
_BOOTS_WITHIN_S = 600.0
_GONE_S = 60.0
"""After its notice's time an instance is gone; clocks differ, and bills round up."""


class Forecast(Record):
    """``spent_usd`` at ``at``, and ``usd_s`` more each second that all open instances run on."""

    at: datetime
    spent_usd: Decimal
    usd_s: Decimal

    def reaches_at(self, usd: Decimal) -> datetime | None:
        """When so much is spent; ``None`` for never."""
        left_usd = usd - self.spent_usd
        if left_usd <= 0:
            return self.at
        if self.usd_s <= 0:
            return None
        try:
            return self.at + timedelta(seconds=float(left_usd / self.usd_s))
        except OverflowError:
            return None


def forecast(
    state: RunState,
    attempt: int,
    *,
    now: datetime,
    gone_at: Callable[[int], datetime | None] = lambda _: None,
    bytes_usd: Callable[[Attempt], Decimal] = lambda _: Decimal(0),
) -> Forecast:
    """What the run has cost and costs, as one of its attempts sees it.

    The journal may lag: the attempt itself counts from its intent on, with the price that it was
    asked for; so does another one for a while; and none longer than ``gone_at`` says, which knows
    what it left.
    ``bytes_usd`` is what an open attempt has moved between regions so far.
    """
    spent_usd = usd_s = Decimal(0)
    for each in state.attempts:
        if each.number == attempt or _may_be_there(each, now=now):
            each = _as_launched(each, state)  # noqa: PLW2901
        if each.launched is None:
            continue
        end = gone_at(each.number) if each.ended is None and each.number != attempt else None
        until = now if end is None else min(now, end)
        if each.ended is not None and each.ended.kept_until is not None:
            until = max(until, each.ended.kept_until)  # it is promised
        spent_usd += used(each, now=until).cost_usd
        if each.ended is not None:
            spent_usd += ended_egress_usd(each)
            continue
        spent_usd += bytes_usd(each)
        if end is None or end > now:
            rate = Decimal(repr(each.launched.clock_rate))
            usd_s += each.launched.price_usd_h * rate / 3600
    return Forecast(at=now, spent_usd=spent_usd, usd_s=usd_s)


def _may_be_there(attempt: Attempt, *, now: datetime) -> bool:
    """Whether an instance may run although the journal has only the intent to launch it.

    The controller may have died in between. An instance that is there soon asks its predecessor to
    hand over.
    """
    age_s = (now - attempt.intended_at).total_seconds()
    return attempt.is_open and attempt.launched is None and age_s < _BOOTS_WITHIN_S


def _as_launched(attempt: Attempt, state: RunState) -> Attempt:
    """The attempt with what its launch will be told to have been, where it is not told yet."""
    if attempt.launched is not None or attempt.asked_usd_h is None:
        return attempt
    rates = (a.launched.clock_rate for a in reversed(state.attempts) if a.launched)
    launched = e.Launched(
        at=attempt.intended_at, attempt=attempt.number, instance_id="",
        started_at=attempt.intended_at, price_usd_h=attempt.asked_usd_h, price_source="asked for",
        price_at=attempt.intended_at, on_demand_usd_h=attempt.asked_usd_h,
        clock_rate=next(rates, 1.0),
    )  # fmt: skip
    return msgspec.structs.replace(attempt, launched=launched)


class Purse:
    """Looks at the journal from time to time; ``empty_at`` is when the budget will be spent.

    ``checkpoint_s`` is what a checkpoint took in an earlier attempt.
    """

    def __init__(self, run: Run, attempt: int, spec: RunSpec, *, clock: Clock) -> None:
        self._run, self._attempt, self._spec, self._clock = run, attempt, spec, clock
        self._journal = run.journal()
        self._chain = run.chain()
        self.empty_at: datetime | None = None
        self.checkpoint_s: float | None = None

    @property
    def is_watched(self) -> bool:
        """Whether there is a budget that may end the run."""
        return self._spec.budget_usd is not None and self._spec.on_budget != "alert"

    def look(self) -> float:
        """Read what is new; seconds until the next look.

        Raises :class:`~spotfirst.errors.StorageError`: what was found before stands.
        """
        budget_usd = self._spec.budget_usd
        if budget_usd is None or not self.is_watched:
            return float("inf")
        state = self._journal.refresh()
        self.checkpoint_s = state.checkpoint_s
        now = self._clock()
        found = forecast(
            state, self._attempt, now=now, gone_at=self._gone_at, bytes_usd=self._bytes_usd
        )
        empty_at = found.reaches_at(budget_usd)
        if found.spent_usd >= budget_usd and self.empty_at is not None:
            empty_at = min(self.empty_at, now)  # it stays passed, and goes no further
        self.empty_at = empty_at
        mine = next((a for a in state.attempts if a.number == self._attempt), None)
        if mine is None or mine.launched is None:
            return _SOON_S
        left_s = _PERIOD_S
        if self.empty_at is not None:
            left_s = (self.empty_at - now).total_seconds()
        return max(_SOON_S, min(_PERIOD_S, left_s / 4))

    def _gone_at(self, number: int) -> datetime | None:
        """When another attempt's instance went, or goes, whose end is not in the journal."""
        try:
            report, beat = self._run.exit_report(number), self._run.heartbeat(number)
        except FormatError:
            return None
        notice = beat.notice if beat is not None else None
        goes_at = None
        if notice is not None and notice.kind == "interruption" and notice.time is not None:
            goes_at = notice.time + timedelta(seconds=_GONE_S)
        if report is None:
            return goes_at
        # An interrupted one is left to the fleet; all others end themselves.
        if report.cause == "interrupted" and goes_at is not None:
            return max(report.at, goes_at)
        return report.at + timedelta(seconds=_GONE_S)

    def _bytes_usd(self, attempt: Attempt) -> Decimal:
        """What an open attempt's checkpoints have cost between regions."""
        launched = attempt.launched
        if launched is None or not (launched.read_usd_gb or launched.write_usd_gb):
            return Decimal(0)
        self._chain.refresh()
        known = dict(self._chain.commits) | self._chain.pruned
        commits = [known[seq] for seq in sorted(known)]
        before = [commit for commit in commits if commit.attempt < attempt.number]
        written = sum(commit.new_bytes for commit in commits if commit.attempt == attempt.number)
        return egress_usd(
            launched,
            read_bytes=before[-1].size_bytes if before else 0,
            written_bytes=written + (commits[-1].new_bytes if commits else 0),
        )
