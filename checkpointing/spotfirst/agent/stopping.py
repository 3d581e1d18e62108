"""When a trainer is asked to drain, and until when it may. Pure; all times are of one clock."""

from __future__ import annotations

from datetime import datetime, timedelta

from spotfirst.agent.exits import StopReason
from spotfirst.heartbeat import Progress
from spotfirst.wire import Record

__all__ = ["IDLE_S", "Stop", "Watch", "drain_margin_s"]

IDLE_S = 5.0
"""For a trainer that has not claimed the chain: it has nothing to save, and may not be listening."""
_UNKNOWN_CHECKPOINT_S = 15.0


class Stop(Record):
    """The trainer is to be gone by ``by``; ``reason`` is what asked first."""

    reason: StopReason
    by: datetime


class Watch(Record):
    """What may end an attempt, as far as it is known."""

    life_ends: datetime
    interruption_at: datetime | None = None
    interruption_seen: datetime | None = None
    terminated_at: datetime | None = None
    handover_at: datetime | None = None
    patience_s: float = 120.0
    shutdown_window_s: float = 20.0
    booted: datetime

    def stop(self, now: datetime, progress: Progress | None, step_s: float = 0.0) -> Stop | None:
        """Whether to drain now: on request at once, else when only the margin is left."""
        by = self._limit()
        if self.terminated_at is not None:
            return Stop(reason="interruption", by=by)
        if self.handover_at is not None:
            return Stop(reason="handover", by=by)
        if self.interruption_at is not None:
            window_s = (self.interruption_at - (self.interruption_seen or now)).total_seconds()
            margin_s = drain_margin_s(window_s, progress, step_s)
            if now >= self.interruption_at - timedelta(seconds=margin_s):
                return Stop(reason="interruption", by=by)
        life_s = (self.life_ends - self.booted).total_seconds()
        margin_s = drain_margin_s(life_s, progress, step_s) + report_s(life_s)
        if now >= self.life_ends - timedelta(seconds=margin_s):
            return Stop(reason="max_life", by=by)
        return None

    def _limit(self) -> datetime:
        """When the last of the command must be gone, so that its end can still be reported."""
        life_s = (self.life_ends - self.booted).total_seconds()
        limits = [self.life_ends - timedelta(seconds=report_s(life_s))]
        if self.interruption_at is not None:
            seen = self.interruption_seen or self.interruption_at
            window_s = (self.interruption_at - seen).total_seconds()
            limits.append(self.interruption_at - timedelta(seconds=report_s(window_s)))
        if self.terminated_at is not None:
            limits.append(self.terminated_at + timedelta(seconds=self.shutdown_window_s))
        if self.handover_at is not None:
            limits.append(self.handover_at + timedelta(seconds=self.patience_s))
        return min(limits)


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
