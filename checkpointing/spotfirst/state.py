"""The state of a run: a pure fold over its journal. Nothing else holds state."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from functools import reduce

import msgspec

from spotfirst import events as e
from spotfirst.market import Market, Notice, Pool
from spotfirst.wire import Record

__all__ = ["Attempt", "Phase", "RunState", "fold"]


class Phase(str, enum.Enum):
    """Where a run stands. The last three are final until it is reopened."""

    ACTIVE = "active"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    STOPPED = "stopped"
    FAILED = "failed"

    def __str__(self) -> str:
        return self.value


class Attempt(Record):
    """One instance's worth of a run, from the intent to launch it to what it left."""

    number: int
    token: str
    market: Market
    pool: Pool
    reason: str
    intended_at: datetime
    others: tuple[Pool, ...] = ()
    asked_usd_h: Decimal | None = None
    launched: e.Launched | None = None
    not_launched: e.NotLaunched | None = None
    notice: Notice | None = None
    handover: str | None = None
    ended: e.Ended | None = None

    @property
    def is_open(self) -> bool:
        """Whether an instance exists, or may exist, for this attempt.

        One that was given up may come true after that, and is then told of (``launched``).
        """
        return self.ended is None and (self.not_launched is None or self.launched is not None)

    @property
    def is_leaving(self) -> bool:
        """Whether it will stop soon, so that a replacement is wanted."""
        return self.handover is not None or (
            self.notice is not None and self.notice.kind == "interruption"
        )

    @property
    def progress(self) -> int:
        """Steps that this attempt committed beyond where it started."""
        if self.ended is None or self.ended.checkpoint_step is None:
            return 0
        return max(0, self.ended.checkpoint_step - (self.ended.start_step or 0))


class RunState(Record):
    """What the journal says so far; ``seq`` is the number of its last event."""

    seq: int = 0
    phase: Phase = Phase.ACTIVE
    created_at: datetime | None = None
    updated_at: datetime | None = None
    owner: str = ""
    attempts: tuple[Attempt, ...] = ()
    waiting: e.Waiting | None = None
    stop: e.StopRequested | None = None
    result: e.Succeeded | None = None
    failure: e.Failed | None = None
    delivered_to: str = ""
    warnings: tuple[str, ...] = ()
    reopened: e.Reopened | None = None
    reopened_after: int = 0

    @property
    def is_final(self) -> bool:
        """Whether nothing more is launched, unless the run is reopened."""
        return self.phase in {Phase.SUCCEEDED, Phase.STOPPED, Phase.FAILED}

    @property
    def open_attempts(self) -> tuple[Attempt, ...]:
        """The attempts that have an instance, or may have one."""
        return tuple(attempt for attempt in self.attempts if attempt.is_open)

    @property
    def checkpoint_step(self) -> int | None:
        """The newest step that any ended attempt committed."""
        steps = [a.ended.checkpoint_step for a in self.attempts if a.ended]
        return max((step for step in steps if step is not None), default=None)

    @property
    def checkpoint_s(self) -> float | None:
        """What a checkpoint took, of the last attempt that ended and made one."""
        took = (a.ended.checkpoint_s for a in reversed(self.attempts) if a.ended)
        return next((seconds for seconds in took if seconds is not None), None)

    def attempt(self, number: int) -> Attempt:
        """The attempt of this number. Raises :class:`LookupError`."""
        for attempt in self.attempts:
            if attempt.number == number:
                return attempt
        msg = f"the journal up to event {self.seq} has no attempt {number}"
        raise LookupError(msg)

    def apply(self, event: e.Event) -> RunState:
        """The state after one more event. Total: any event is accepted in any state."""
        after = _apply(self, event)
        return msgspec.structs.replace(after, seq=self.seq + 1, updated_at=event.at)

    def fruitless(self, *causes: str, leave_out: str = "") -> int:
        """How many attempts in a row, the newest first, ended so without committing a step.

        Counted since the run was last reopened: someone looked at it then. Attempts that were asked
        to stop for the reason ``leave_out`` are passed over.
        """
        count = 0
        for attempt in reversed(self.attempts):
            if leave_out and attempt.handover == leave_out:
                continue
            if attempt.number <= self.reopened_after or attempt.progress > 0:
                break
            if attempt.ended is not None:
                if attempt.ended.cause not in causes:
                    break
                count += 1
        return count


def fold(events: Iterable[e.Event]) -> RunState:
    """The state that these events, in journal order, lead to."""
    return reduce(RunState.apply, events, RunState())


def _apply(state: RunState, event: e.Event) -> RunState:
    change = msgspec.structs.replace
    if state.is_final and isinstance(
        event, (e.Waiting, e.StopRequested, e.Stopped, e.Succeeded, e.Failed)
    ):
        return state  # the outcome stands until the run is reopened
    if isinstance(event, e.Created):
        return change(state, created_at=event.at)
    if isinstance(event, e.Attached):
        return change(state, owner=event.owner)
    if isinstance(event, e.Waiting):
        return change(state, waiting=event)
    if isinstance(event, e.Launching):
        attempt = Attempt(
            number=event.attempt, token=event.token, market=event.market, pool=event.pool,
            reason=event.reason, intended_at=event.at, others=event.others,
            asked_usd_h=event.price_usd_h,
        )  # fmt: skip
        return change(state, attempts=(*state.attempts, attempt), waiting=None)
    if isinstance(event, e.Launched):
        return _on_attempt(_in_pool(state, event), event.attempt, launched=event)
    if isinstance(event, e.NotLaunched):
        return _on_attempt(state, event.attempt, not_launched=event)
    if isinstance(event, e.Noticed):
        return _on_attempt(state, event.attempt, notice=event.notice)
    if isinstance(event, e.HandoverRequested):
        return _on_attempt(state, event.attempt, handover=event.reason)
    if isinstance(event, e.Ended):
        return _on_attempt(state, event.attempt, ended=event)
    if isinstance(event, e.Warned):
        return change(state, warnings=(*state.warnings, event.message))
    if isinstance(event, e.StopRequested):
        return change(state, phase=Phase.STOPPING, stop=event)
    if isinstance(event, e.Stopped):
        return change(state, phase=Phase.STOPPED, waiting=None)
    if isinstance(event, e.Succeeded):
        return change(state, phase=Phase.SUCCEEDED, result=event, waiting=None)
    if isinstance(event, e.Failed):
        return change(state, phase=Phase.FAILED, failure=event, waiting=None)
    if isinstance(event, e.Reopened):
        newest = state.attempts[-1].number if state.attempts else 0
        return change(
            state, phase=Phase.ACTIVE, owner=event.owner, stop=None, failure=None, result=None,
            reopened=event,
            reopened_after=newest,
        )  # fmt: skip
    if isinstance(event, e.Delivered):
        return change(state, delivered_to=event.owner)
    return state


def _in_pool(state: RunState, event: e.Launched) -> RunState:
    """The state with the pool that the fleet chose, in place of the one that was asked for."""
    if event.pool is None:
        return state
    attempts = tuple(
        msgspec.structs.replace(attempt, pool=event.pool)
        if attempt.number == event.attempt and attempt.launched is None
        else attempt
        for attempt in state.attempts
    )
    return msgspec.structs.replace(state, attempts=attempts)


def _on_attempt(state: RunState, number: int, **changes: object) -> RunState:
    """The state with one attempt changed.

    What is known stays, but for a recommendation that becomes an interruption.
    """

    def is_news(attempt: Attempt, name: str) -> bool:
        known = getattr(attempt, name)
        return known is None or (name == "notice" and known.kind == "rebalance")

    attempts = tuple(
        msgspec.structs.replace(
            attempt, **{name: value for name, value in changes.items() if is_news(attempt, name)}
        )
        if attempt.number == number
        else attempt
        for attempt in state.attempts
    )
    return msgspec.structs.replace(state, attempts=attempts)
