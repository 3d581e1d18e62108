"""What is ahead of a run: its limits, the work left, and what a change or a stop will take."""

from __future__ import annotations

from datetime import datetime
from statistics import median

from spotfirst.heartbeat import Heartbeat
from spotfirst.spec import RunSpec
from spotfirst.state import RunState
from spotfirst.wire import Record
from spotfirst_airflow.budget import SHUTDOWN_S, Budget
from spotfirst_airflow.policies import Work

__all__ = ["Outlook", "done_share", "seconds_per_step", "shutdown_s", "work_left"]

_DEFAULT_CHANGEOVER_S = 60.0
_DRAIN_MARGIN_S = 5.0
_STEPS_FOR_A_PACE = 2


class Outlook(Record):
    """The limits in force, and the run's measured change of instance."""

    deadline: datetime | None
    budget: Budget | None
    changeover_s: float

    @classmethod
    def of(cls, spec: RunSpec, state: RunState) -> Outlook:
        """From what was asked for, and what the attempts so far took to start."""
        startups = [a.ended.startup_s for a in state.attempts if a.ended and a.ended.startup_s > 0]
        return cls(
            deadline=spec.deadline,
            budget=None
            if spec.budget_usd is None
            else Budget(usd=spec.budget_usd, on_budget=spec.on_budget),
            changeover_s=median(startups) if startups else _DEFAULT_CHANGEOVER_S,
        )


def shutdown_s(beat: Heartbeat | None) -> float:
    """How long a trainer takes to write a checkpoint and end, by what its last one took."""
    checkpoint_s = beat.progress.checkpoint_s if beat else None
    return SHUTDOWN_S if checkpoint_s is None else 2 * checkpoint_s + _DRAIN_MARGIN_S


def seconds_per_step(beat: Heartbeat) -> float | None:
    """Of this attempt so far; ``None`` before it has finished two steps."""
    progress = beat.progress
    first, last = progress.timings.first_step, progress.timings.last_step
    if not first or not last or progress.step is None or progress.start_step is None:
        return None
    steps = progress.step - progress.start_step
    return (last - first).total_seconds() / steps if steps >= _STEPS_FOR_A_PACE else None


def work_left(state: RunState, beat: Heartbeat | None) -> Work | None:
    """Training time until the last step; ``None`` when nobody knows yet.

    At the pace of the attempt that trains; otherwise at that of the last one that did, from the
    newest checkpoint on.
    """
    if beat is not None and (pace := seconds_per_step(beat)) is not None:
        total, step = beat.progress.total_steps, beat.progress.step
        return None if total is None or step is None else _exactly(max(0, total - step) * pace)
    for attempt in reversed(state.attempts):
        ended = attempt.ended
        if ended is None or ended.total_steps is None or ended.step is None:
            continue
        trained = ended.step - (ended.start_step or 0)
        if trained >= _STEPS_FOR_A_PACE:
            left = ended.total_steps - (state.checkpoint_step or 0)
            return _exactly(max(0, left) * ended.training_s / trained)
    return None


def done_share(state: RunState, beat: Heartbeat | None) -> float:
    """How much of the whole work is done, of 1, by steps; 0 while nobody knows."""
    if beat is not None and beat.progress.total_steps and beat.progress.step is not None:
        return min(1.0, beat.progress.step / beat.progress.total_steps)
    totals = [a.ended.total_steps for a in state.attempts if a.ended and a.ended.total_steps]
    return min(1.0, (state.checkpoint_step or 0) / totals[-1]) if totals else 0.0


def _exactly(seconds: float) -> Work:
    return Work(likely_s=seconds, most_s=seconds)
