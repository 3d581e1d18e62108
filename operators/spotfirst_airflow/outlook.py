"""What is ahead of a run: its limits, the work left, and what a change or a stop will take."""

from __future__ import annotations

from datetime import datetime
from statistics import median

from spotfirst import events as e
from spotfirst.heartbeat import Heartbeat, Progress
from spotfirst.spec import RunSpec
from spotfirst.state import Phase, RunState
from spotfirst.steptimes import StepTimes
from spotfirst.wire import Record
from spotfirst_airflow.budget import SHUTDOWN_S, Budget
from spotfirst_airflow.costs import bill, usd
from spotfirst_airflow.policies import Work

__all__ = ["Outlook", "done_share", "passed", "past_limits", "shutdown_s", "work_left"]

_DEFAULT_CHANGEOVER_S = 60.0
_DRAIN_MARGIN_S = 5.0
_STEPS_FOR_A_PACE = 2
_EXPECTED_AT_MOST = 1.1


class Outlook(Record):
    """The limits in force, and the run's measured change of instance."""

    deadline: datetime | None
    budget: Budget | None
    changeover_s: float

    @classmethod
    def of(cls, spec: RunSpec, state: RunState) -> Outlook:
        """From what was asked for, and what attempts took to start: of this run, or of earlier ones."""
        startups = [a.ended.startup_s for a in state.attempts if a.ended and a.ended.startup_s > 0]
        return cls(
            deadline=spec.deadline,
            budget=None
            if spec.budget_usd is None
            else Budget(
                usd=spec.budget_usd, on_budget=spec.on_budget, simulated=spec.fleet == "local"
            ),
            changeover_s=median(startups)
            if startups
            else spec.lessons.startup_s or _DEFAULT_CHANGEOVER_S,
        )


def passed(spec: RunSpec, state: RunState, *, now: datetime) -> dict[str, str]:
    """Which of its limits, ``deadline`` and ``budget``, a run has passed by ``now``, in words.

    What an instance costs of which nobody has seen the end counts until now.
    """
    found = {}
    ends = [a.ended.ended_at for a in state.attempts if a.ended]
    at = max(ends, default=state.updated_at or now) if state.is_final else now
    if spec.deadline is not None and at >= spec.deadline:
        found["deadline"] = f"the deadline {spec.deadline:%Y-%m-%d %H:%M:%S} UTC has passed"
    spent_usd = bill(state, now=now).total_usd
    if spec.budget_usd is not None and spent_usd >= spec.budget_usd:
        found["budget"] = (
            f"the budget of {usd(spec.budget_usd)} is used up: {usd(spent_usd)} are spent"
        )
    return found


def past_limits(spec: RunSpec, state: RunState, *, now: datetime) -> list[str]:
    """The same as sentences for people, with what to do about a run that goes on all the same."""
    texts = list(passed(spec, state, now=now).values())
    if texts and state.phase is Phase.ACTIVE and state.open_attempts:
        texts.append(
            "the run was not stopped, so it may have no controller: its instance stops by itself; "
            "see `spotfirst show`, and end it with `spotfirst stop` or `spotfirst reap`"
        )
    return texts


def shutdown_s(state: RunState, beat: Heartbeat | None) -> float:
    """How long a trainer takes to end its step, write a checkpoint and end, by what they took.

    Before its first checkpoint, by those of the attempt before.
    """
    progress = beat.progress if beat else Progress()
    step_s = progress.step_times.mean_s if progress.step_times else 0.0
    checkpoint_s = state.checkpoint_s if progress.checkpoint_s is None else progress.checkpoint_s
    if checkpoint_s is None:
        return step_s + SHUTDOWN_S
    return step_s + 2 * checkpoint_s + _DRAIN_MARGIN_S


def work_left(spec: RunSpec, state: RunState, beat: Heartbeat | None) -> Work | None:
    """Training time until the last step; ``None`` when nobody knows yet.

    The steps that are left, at the pace of the attempt that trains; otherwise of the last one that
    did, one of the same instance type if there was; otherwise of earlier runs of the same model.
    Without any of these, what people expect, with a tenth more at most.
    """
    total, step = _steps(spec, state, beat)
    times = _step_times(spec, state, beat)
    if total is not None and times is not None:
        left = max(0, total - step)
        return Work(likely_s=times.likely_s(left), most_s=times.most_s(left))
    if spec.training_time_s is None:
        return None
    left_s = spec.training_time_s * (1 - done_share(state, beat))
    return Work(likely_s=left_s, most_s=_EXPECTED_AT_MOST * left_s)


def _steps(spec: RunSpec, state: RunState, beat: Heartbeat | None) -> tuple[int | None, int]:
    """How many steps there are in all, if anybody knows, and how many are done."""
    if beat is not None and beat.progress.total_steps is not None:
        return beat.progress.total_steps, beat.progress.step or state.checkpoint_step or 0
    told = (a.ended.total_steps for a in reversed(state.attempts) if a.ended)
    total = next((steps for steps in told if steps is not None), spec.lessons.total_steps)
    return total, state.checkpoint_step or 0


def _step_times(spec: RunSpec, state: RunState, beat: Heartbeat | None) -> StepTimes | None:
    if beat is not None and beat.progress.step_times is not None:
        return beat.progress.step_times
    trained = [a for a in state.attempts if a.ended and _ended_times(a.ended) is not None]
    kind = state.attempts[-1].pool.instance_type if state.attempts else ""
    same = [a for a in trained if a.pool.instance_type == kind]
    if trained:
        ended = (same or trained)[-1].ended
        assert ended is not None
        return _ended_times(ended)
    known = spec.lessons.step_times
    return known.get(kind) or next(iter(known.values()), None)


def _ended_times(ended: e.Ended) -> StepTimes | None:
    """What an attempt measured; else its steps by its time, as attempts told that knew no better."""
    if ended.step_times is not None:
        return ended.step_times
    steps = (ended.step or 0) - (ended.start_step or 0)
    if steps < _STEPS_FOR_A_PACE or ended.training_s <= 0:
        return None
    return StepTimes(count=steps, mean_s=ended.training_s / steps)


def done_share(state: RunState, beat: Heartbeat | None) -> float:
    """How much of the whole work is done, of 1, by steps; 0 while nobody knows."""
    if beat is not None and beat.progress.total_steps and beat.progress.step is not None:
        return min(1.0, beat.progress.step / beat.progress.total_steps)
    totals = [a.ended.total_steps for a in state.attempts if a.ended and a.ended.total_steps]
    return min(1.0, (state.checkpoint_step or 0) / totals[-1]) if totals else 0.0
