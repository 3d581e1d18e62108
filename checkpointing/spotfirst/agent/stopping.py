"""When a trainer is asked to drain, and until when it may. Pure; all times are of one clock."""

from __future__ import annotations

from datetime import datetime, timedelta

from spotfirst.agent.exits import StopReason
from spotfirst.heartbeat import Progress
from spotfirst.wire import Record

__all__ = ["IDLE_S", "Stop", "Watch", "drain_margin_s", "end_s"]

IDLE_S = 5.0
"""For a trainer that has not claimed the chain: it has nothing to save, and may not be listening."""
_UNKNOWN_CHECKPOINT_S = 15.0
_UNKNOWN_END_S = 7.0
_REST_S = 5.0
_LEAST_AFTER_DEADLINE_S = 30.0
"""For a last checkpoint that takes longer than those before, or is the first."""


class Stop(Record):
    """The trainer is to be gone by ``by``; ``reason`` is what asked first."""

    reason: StopReason
    by: datetime


class Watch(Record):
    """What may end an attempt, as far as it is known."""

    life_ends: datetime
    deadline: datetime | None = None
    budget_ends: datetime | None = None
    interruption_at: datetime | None = None
    interruption_seen: datetime | None = None
    terminated_at: datetime | None = None
    handover_at: datetime | None = None
    patience_s: float = 120.0
    shutdown_window_s: float = 20.0
    checkpoint_s: float | None = None
    """What one took in an earlier attempt."""
    booted: datetime

    def stop(self, now: datetime, progress: Progress | None, step_s: float = 0.0) -> Stop | None:
        """Whether to drain now: on request at once, else when only the margin is left."""
        last_s = end_s(progress, step_s, self.checkpoint_s)
        by = self._limit(last_s)
        if self.terminated_at is not None:
            return Stop(reason="interruption", by=by)
        if self.handover_at is not None:
            return Stop(reason="handover", by=by)
        if self.interruption_at is not None:
            window_s = (self.interruption_at - (self.interruption_seen or now)).total_seconds()
            margin_s = drain_margin_s(window_s, progress, step_s)
            if now >= self.interruption_at - timedelta(seconds=margin_s):
                return Stop(reason="interruption", by=by)
        if self.deadline is not None and now >= self.deadline:
            return Stop(reason="deadline", by=by)
        if self.budget_ends is not None and now >= self.budget_ends - timedelta(seconds=last_s):
            return Stop(reason="budget", by=by)
        life_s = (self.life_ends - self.booted).total_seconds()
        margin_s = drain_margin_s(life_s, progress, step_s) + report_s(life_s)
        if now >= self.life_ends - timedelta(seconds=margin_s):
            return Stop(reason="max_life", by=by)
        return None

    def _limit(self, last_s: float) -> datetime:
        """When the last of the command must be gone, so that its end can still be reported."""
        life_s = (self.life_ends - self.booted).total_seconds()
        limits = [self.life_ends - timedelta(seconds=report_s(life_s))]
        if self.interruption_at is not None:
            seen = self.interruption_seen or self.interruption_at
            window_s = (self.interruption_at - seen).total_seconds()
            limits.append(self.interruption_at - timedelta(seconds=report_s(window_s)))
        limits += self._run_limits(last_s)
        if self.terminated_at is not None:
            limits.append(self.terminated_at + timedelta(seconds=self.shutdown_window_s))
        if self.handover_at is not None:
            limits.append(self.handover_at + timedelta(seconds=self.patience_s))
        return min(limits)

    def run_ends(self, progress: Progress | None, step_s: float = 0.0) -> datetime | None:
        """When the command must be gone whatever happens, for the run's deadline and budget."""
        return min(self._run_limits(end_s(progress, step_s, self.checkpoint_s)), default=None)

    def _run_limits(self, last_s: float) -> list[datetime]:
        limits = []
        if self.deadline is not None:
            rest_s = max(last_s, _LEAST_AFTER_DEADLINE_S)
            limits.append(self.deadline + timedelta(seconds=rest_s))
        if self.budget_ends is not None:
            limits.append(self.budget_ends + timedelta(seconds=last_s))
        return limits


def end_s(
    progress: Progress | None, step_s: float = 0.0, checkpoint_s: float | None = None
) -> float:
    """How long the step under way, a last checkpoint and the end take, by what is known of them.

    As long as controllers expect it to (``outlook.shutdown_s``), and the step. ``checkpoint_s`` is
    what a checkpoint took in an earlier attempt.
    """
    measured = progress.checkpoint_s if progress is not None else None
    if measured is None:
        measured = checkpoint_s
    return step_s + (_UNKNOWN_END_S if measured is None else 2 * measured + _REST_S)


def report_s(window_s: float) -> float:
    """What is kept for the log's end and the exit report: a tenth, at most 2 s."""
    return min(2.0, max(0.0, window_s) / 10)


def drain_margin_s(window_s: float, progress: Progress | None, step_s: float = 0.0) -> float:
    """How long before the end to ask for the last checkpoint, at most half of the window.

    What the trainer says it needs, else twice the measured time of a checkpoint; the step that is
    under way; and what the report takes. Draining earlier than needed wastes paid time; later
    loses the steps since the last periodic checkpoint.
    """
    measured = progress.checkpoint_s if progress is not None else None
    checkpoint_s = progress.drain_s if progress is not None else None
    if checkpoint_s is None:
        checkpoint_s = _UNKNOWN_CHECKPOINT_S if measured is None else 2 * measured + 1.0
    needed_s = checkpoint_s + step_s + report_s(window_s)
    known = measured is not None
    return min(needed_s, max(0.0, window_s) * (1.0 if known else 0.5))
