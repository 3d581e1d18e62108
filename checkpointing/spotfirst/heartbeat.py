"""What an attempt tells about itself: a heartbeat while it lives, an exit report at its end."""

from __future__ import annotations

from datetime import datetime
from typing import Literal, TypeVar

import msgspec

from spotfirst.checkpoints.period import Period
from spotfirst.events import EndCause
from spotfirst.market import Notice
from spotfirst.steptimes import StepTimes
from spotfirst.wire import Claimed, Record

__all__ = [
    "AgentPhase",
    "ExitReport",
    "Handover",
    "Heartbeat",
    "Progress",
    "Timings",
    "clipped",
]

AgentPhase = Literal["booting", "fetching", "starting", "standby", "training", "draining", "exited"]
"""``starting``: the command runs, and imports. ``standby``: it is warm, and waits for the claim."""


class Timings(Record):
    """When each part of an attempt's start was done, on the instance's clock."""

    booted: datetime | None = None
    fetched: datetime | None = None
    started: datetime | None = None
    standby: datetime | None = None
    claimed: datetime | None = None
    restored: datetime | None = None
    first_step: datetime | None = None
    last_step: datetime | None = None
    drained: datetime | None = None


class Progress(Claimed):
    """What the trainer tells the agent, after each step. Steps count finished ones from 0.

    ``step_times`` are those of this process, but for the first ones.
    ``period`` is how often it checkpoints, and why. ``drain_s`` is how long before the end it is to
    be asked for a last checkpoint; ``leaving`` is what it then decided, with the numbers.
    ``restored_seq`` is the checkpoint that it began with, by its number in the run's own chain.
    In files mode a step is a capture; ``pause_s`` is how long the script stood still for the last
    one, and ``waits_until`` says that a move waits until then for a save of the script's own.
    """

    phase: AgentPhase = "starting"
    start_step: int | None = None
    step: int | None = None
    total_steps: int | None = None
    metrics: dict[str, float] = {}
    step_times: StepTimes | None = None
    checkpoint_seq: int | None = None
    checkpoint_step: int | None = None
    checkpoint_s: float | None = None
    period: Period | None = None
    drain_s: float | None = None
    restored_seq: int | None = None
    pause_s: float | None = None
    waits_until: datetime | None = None
    leaving: tuple[str, ...] = ()
    released: bool = False
    timings: Timings = Timings()
    warnings: tuple[str, ...] = ()


class Heartbeat(Claimed):
    """``attempts/{n}/heartbeat.json``, replaced at every beat. ``beat`` only grows."""

    attempt: int
    beat: int
    at: datetime
    phase: AgentPhase
    progress: Progress = Progress()
    notice: Notice | None = None
    log_segments: int = 0
    moved_bytes: int = 0


class Handover(Claimed):
    """``attempts/{n}/handover.json``: please checkpoint and stop. Created once, by anyone.

    ``to`` is the attempt that takes over, or ``None`` when the run is to stop.
    """

    reason: str
    at: datetime
    to: int | None = None


class ExitReport(Claimed):
    """``attempts/{n}/exit.json``: the last word of an attempt, created once."""

    attempt: int
    at: datetime
    cause: EndCause
    exit_code: int | None = None
    message: str = ""
    log_tail: tuple[str, ...] = ()
    progress: Progress = Progress()
    log_segments: int = 0
    moved_bytes: int = 0


_MOST_WARNINGS = 20
_MOST_METRICS = 1000
_TAIL_LINES = 50
_LINE_CHARACTERS = 2000
_MESSAGE_CHARACTERS = 8000

_C = TypeVar("_C", Heartbeat, ExitReport)


def clipped(told: _C) -> _C:
    """The same, with texts and metrics cut to what fits into a journal and onto a page.

    The agent sends no more, and readers take no more: a training script may have written it.
    """
    progress = told.progress
    progress = msgspec.structs.replace(
        progress,
        metrics={
            name[:_LINE_CHARACTERS]: value
            for name, value in list(progress.metrics.items())[:_MOST_METRICS]
        },
        warnings=tuple(text[:_LINE_CHARACTERS] for text in progress.warnings[-_MOST_WARNINGS:]),
        leaving=tuple(text[:_LINE_CHARACTERS] for text in progress.leaving[-_MOST_WARNINGS:]),
    )
    if isinstance(told, ExitReport):
        return msgspec.structs.replace(
            told,
            progress=progress,
            message=told.message[:_MESSAGE_CHARACTERS],
            log_tail=tuple(line[:_LINE_CHARACTERS] for line in told.log_tail[-_TAIL_LINES:]),
        )
    return msgspec.structs.replace(told, progress=progress)
