"""``checkpoint_mode="files"``: the agent keeps the files of a script that knows no Checkpointer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from spotfirst.agent.periodic import Periodic
from spotfirst.agent.retrying import until_answered
from spotfirst.checkpoints.files import FileCheckpoints
from spotfirst.errors import ClaimLost
from spotfirst.heartbeat import Progress, Timings
from spotfirst.run import Run
from spotfirst.wire import Clock, utc_now

__all__ = ["FileMode"]

_CAPTURE_UNDER_WAY_S = 60.0


class FileMode:
    """Restores before the command, captures beside it, and once more after it."""

    def __init__(self, run: Run, attempt: int, folder: Path, *, clock: Clock = utc_now) -> None:
        self._files = FileCheckpoints(run, attempt, folder)
        self._clock = clock
        self._captures = Periodic("capture", self._capture)
        self._period_s = 0.0
        self._wait_first = True
        self.superseded = False
        """Whether a newer attempt has taken the checkpoints: nothing more can be kept."""
        self.capture_s = 0.0
        """How long the last capture took that found something new."""
        self.progress = Progress(timings=Timings(standby=clock()))

    def restore(self, leave: Callable[[], bool]) -> None:
        """Wait for the claim, and bring the files back; see :meth:`FileCheckpoints.restore`."""
        if self._files.restore(leave=leave) is None:
            return
        now = self._clock()
        timings = msgspec.structs.replace(self.progress.timings, claimed=now, restored=now)
        step = self._files.step
        self.progress = msgspec.structs.replace(
            self.progress, phase="training", start_step=step, step=step, timings=timings
        )

    def start(self, period_s: float) -> None:
        """Capture every ``period_s`` from now on."""
        self._period_s = period_s
        self._captures.start()

    def expect_end(self) -> None:
        """To be called before the command is sent a signal that it may die of."""
        self._files.note_writers()

    def finish(self, *, by_itself: bool) -> None:
        """After the command has gone: take everything, and let a successor claim.

        Unless it ended ``by_itself``, what it was writing is kept as it was before.
        """
        self._captures.stop(_CAPTURE_UNDER_WAY_S)
        if self.superseded:
            return
        if by_itself:
            self._files.forget_writers()
        try:
            until_answered("keep the last files", lambda: self._take(final=True))
            until_answered("release the checkpoints", self._files.release)
        except ClaimLost:
            self.superseded = True
            return
        timings = msgspec.structs.replace(self.progress.timings, drained=self._clock())
        self.progress = msgspec.structs.replace(self.progress, released=True, timings=timings)

    def _capture(self) -> float:
        if self._wait_first:  # the folder is what was just restored
            self._wait_first = False
            return self._period_s
        try:
            self._take(final=False)
        except ClaimLost:
            self.superseded = True
            return float("inf")
        return self._period_s

    def _take(self, *, final: bool) -> None:
        start = time.monotonic()
        seq = self._files.capture(final=final)
        changes: dict[str, Any] = {"warnings": self._files.warnings}
        if seq is not None:
            self.capture_s = time.monotonic() - start
            step = self._files.step
            changes |= {
                "step": step, "checkpoint_step": step, "checkpoint_seq": seq,
                "checkpoint_s": self.capture_s,
            }  # fmt: skip
        self.progress = msgspec.structs.replace(self.progress, **changes)
