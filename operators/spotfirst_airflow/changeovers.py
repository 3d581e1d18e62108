"""How long each change of instance took, from a run's journal and its attempts' own timings.

A change begins when it is known that the old instance will go (its interruption notice; or the
decision to move), or else when it is gone. It is over when the replacement begins its first step.
``startup_s`` is the part of it in which the replacement's machine, process and imports came up:
no checkpoint or hand-over makes that shorter. What is left is Spotfirst's own:
``beyond_startup_s``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from datetime import datetime
from typing import Literal

from spotfirst.heartbeat import Progress
from spotfirst.run import Run
from spotfirst.state import Attempt, RunState
from spotfirst.wire import Record

__all__ = ["Changeover", "changeovers", "read_progress"]


class Changeover(Record):
    """One change of instance, between two attempts that both trained.

    ``pause_s`` is how long nothing was trained: from the last step of the old attempt to the first
    of the new one. ``lost_steps`` were trained by the old one and are trained again;
    ``None`` for a script that tells no steps.
    """

    from_attempt: int
    to_attempt: int
    why: Literal["notice", "move", "loss"]
    began_at: datetime
    first_step_at: datetime
    changeover_s: float
    startup_s: float
    pause_s: float
    lost_steps: int | None

    @property
    def beyond_startup_s(self) -> float:
        """The change without the replacement's start-up; never below zero."""
        return max(0.0, self.changeover_s - self.startup_s)


def changeovers(state: RunState, progress: Mapping[int, Progress]) -> tuple[Changeover, ...]:
    """Every change of instance of a run, oldest first.

    ``progress`` is what each attempt told last (:func:`read_progress`). Attempts that never began
    a step are passed over: the change then lasted until one did.
    """
    trained = [
        attempt
        for attempt in state.attempts
        if attempt.launched and attempt.number in progress and _first_step(progress[attempt.number])
    ]
    return tuple(
        found
        for old, new in itertools.pairwise(trained)
        if (found := _changeover(old, new, progress[old.number], progress[new.number]))
    )


def read_progress(run: Run, state: RunState) -> dict[int, Progress]:
    """What each attempt told last: in its exit report, or else in its last heartbeat."""
    found: dict[int, Progress] = {}
    for attempt in state.attempts:
        if attempt.launched is None:
            continue
        last = run.exit_report(attempt.number) or run.heartbeat(attempt.number)
        if last is not None:
            found[attempt.number] = last.progress
    return found


def _changeover(old: Attempt, new: Attempt, left: Progress, came: Progress) -> Changeover | None:
    began = _began(old, new)
    first_step = _first_step(came)
    if began is None or first_step is None or new.launched is None:
        return None
    why, began_at = began
    warm_at = came.timings.standby or came.timings.claimed or came.timings.started
    # A replacement that was up before the change began had no start-up to wait for.
    startup_from = max(began_at, new.launched.started_at)
    startup_s = max(0.0, (warm_at - startup_from).total_seconds()) if warm_at else 0.0
    stopped_at = left.timings.last_step or began_at
    return Changeover(
        from_attempt=old.number,
        to_attempt=new.number,
        why=why,
        began_at=began_at,
        first_step_at=first_step,
        changeover_s=max(0.0, (first_step - began_at).total_seconds()),
        startup_s=startup_s,
        pause_s=max(0.0, (first_step - stopped_at).total_seconds()),
        # In files mode a step is a capture: what was trained since is not known.
        lost_steps=max(0, (left.step or 0) - (came.start_step or 0))
        if came.timings.first_step
        else None,
    )


def _first_step(progress: Progress) -> datetime | None:
    """When training began. A script that only writes files tells no steps: once it was restored."""
    return progress.timings.first_step or progress.timings.restored


def _began(old: Attempt, new: Attempt) -> tuple[Literal["notice", "move", "loss"], datetime] | None:
    if old.notice is not None and old.notice.kind == "interruption":
        return "notice", old.notice.seen_at
    if old.ended is None or old.ended.ended_at > new.intended_at:
        return "move", new.intended_at
    return "loss", old.ended.ended_at
