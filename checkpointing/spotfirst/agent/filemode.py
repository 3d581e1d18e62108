"""``checkpoint_mode="files"``: the agent keeps the files of a script that knows no Checkpointer."""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from spotfirst.agent.command import Command
from spotfirst.agent.freezing import Freezer, NotFrozen, is_running
from spotfirst.agent.periodic import Periodic
from spotfirst.agent.retrying import until_answered
from spotfirst.checkpoints.claiming import MOST_WAIT_S
from spotfirst.checkpoints.files import FileCheckpoints
from spotfirst.errors import ClaimLost, StorageError
from spotfirst.heartbeat import Progress, Timings
from spotfirst.patience import once_taken
from spotfirst.run import Run
from spotfirst.wire import Clock, utc_now

__all__ = ["FileMode", "worth_waiting_s"]

_log = logging.getLogger(__name__)

_CAPTURE_UNDER_WAY_S = 60.0
_LOOK_S = 1.0
_STORAGE_AGAIN_S = 15.0
_AGAIN_S = 2.0
"""Until the next capture when one found a file that was being written."""
_MOST_PAUSED = 0.05
"""The share of its time that a script may stand still for captures."""
_LOOK_SHARE = 0.05
_MOST_SAVES = 6
_LATE = 1.2
"""A save that is later than this share of its period may never come."""
_LOUD_PAUSE_S = 1.0


class _Ended(Exception):
    """The command has ended, or is about to."""


class FileMode:
    """Restores before the command, captures beside it, and once more after it."""

    def __init__(
        self,
        run: Run,
        attempt: int,
        folder: Path,
        *,
        freezer: Freezer | None = None,
        clock: Clock = utc_now,
    ) -> None:
        self._freezer = freezer or Freezer()
        self._files = FileCheckpoints(run, attempt, folder, freeze=self._frozen)
        self._clock = clock
        self._captures = Periodic("capture", self._beat)
        self._command: Command | None = None
        self._is_ending = False
        self._period_s = 0.0
        self._due_at = 0.0
        self._saves: list[float] = []
        self._waits_since: datetime | None = None
        self._storage_failed = False
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
            self.progress, phase="training", start_step=step, step=step, timings=timings,
            restored_seq=self._files.restored_seq, warnings=self._files.warnings,
        )  # fmt: skip

    def start(self, period_s: float, command: Command) -> None:
        """Capture every ``period_s`` from now on, as long as the command runs."""
        self._command = command
        self._period_s = period_s
        self._due_at = time.monotonic() + period_s  # the folder is what was just restored
        self._captures.start()

    def capture_now(self) -> None:
        """Capture as soon as possible: the instance is going to be taken back."""
        self._due_at = 0.0
        self._captures.wake()

    def signal(self, command: Command, number: int) -> None:
        """Send the command a signal that it may die of, while it stands still.

        So what it was writing at that moment is known, and is kept as it was before.
        """
        self._is_ending = True
        try:
            with self._freezer.frozen() as pids:
                try:
                    self._files.note_writers(pids)
                finally:
                    command.signal_stopped(number, pids)
        except NotFrozen as error:
            _log.warning("%s", error)
            self._files.note_writers(self._freezer.pids())
            command.signal(number)

    def wait_for_save_s(self, now: datetime) -> float:
        """How long a move should wait for the script's next own save; 0: it should not.

        A successor is told so, and waits as well. There is a limit to all waiting together.
        """
        since = self._waits_since = self._waits_since or now
        wait_s = worth_waiting_s(self._saves, now.timestamp(), is_saving=self._files.is_waiting)
        has_saved = bool(self._saves) and self._saves[-1] > since.timestamp()
        if has_saved or now - since > timedelta(seconds=MOST_WAIT_S):
            wait_s = 0.0
        until = now + timedelta(seconds=wait_s) if wait_s else None
        if (until is None) != (self.progress.waits_until is None):
            if until is not None:
                _log.info("the move waits up to %.0f s for the script's own save", wait_s)
            self.progress = msgspec.structs.replace(self.progress, waits_until=until)
        return wait_s

    def finish(self, *, by_itself: bool, asked: bool, crashed: bool = False) -> None:
        """After the command has gone: take everything, and let a successor claim.

        Unless it ended ``by_itself``, what it was writing is kept as it was before. ``asked``: it
        was sent a signal by :meth:`signal`; otherwise it was ended by someone else, or ``crashed``:
        the step stays what it was then.
        """
        self._captures.stop(_CAPTURE_UNDER_WAY_S)
        if self.superseded:
            return
        if by_itself:
            self._files.forget_writers()
        elif not asked:
            self._files.note_death()
        reached = self.progress
        try:
            denied_s = once_taken(self.capture_s > 0)
            until_answered("keep the last files", lambda: self._take(final=True), denied_s=denied_s)
            if crashed:
                # What it wrote before it crashed does not prove that it came further.
                self.progress = msgspec.structs.replace(reached, warnings=self.progress.warnings)
                return
            until_answered("release the checkpoints", self._files.release, denied_s=denied_s)
        except ClaimLost:
            self.superseded = True
            return
        finally:
            self._files.close()
        timings = msgspec.structs.replace(self.progress.timings, drained=self._clock())
        self.progress = msgspec.structs.replace(self.progress, released=True, timings=timings)

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[set[int]]:
        """As :meth:`Freezer.frozen`. What was left half-written by an end looks like any other file
        that is closed, so nothing is copied from then on; :meth:`finish` knows more.
        """
        with self._freezer.frozen() as pids:
            if not self._is_running():
                raise _Ended
            yield pids

    def _is_running(self) -> bool:
        return not self._is_ending and self._command is not None and is_running(self._command.group)

    def _beat(self) -> float:
        """Capture when it is time, look otherwise; seconds until the next beat."""
        began = time.monotonic()
        if began >= self._due_at:
            self._due_at = began + self._period_s
            try:
                self._take(final=False)
            except ClaimLost:
                self.superseded = True
                return float("inf")
            except _Ended:
                return float("inf")
            except NotFrozen as error:
                self._warn(f"{error}; nothing newer is kept meanwhile")
            except StorageError as error:
                self._due_at = min(self._due_at, time.monotonic() + _STORAGE_AGAIN_S)
                if not self._storage_failed:  # once: the path in it differs each time
                    self._warn(f"could not keep the script's files, trying again: {error}")
                self._storage_failed = True
            pause_s = self._files.pause_s
            if self._files.is_waiting:
                self._due_at = min(self._due_at, time.monotonic() + _AGAIN_S)
            self._due_at = max(self._due_at, time.monotonic() + pause_s / _MOST_PAUSED)
        else:
            with contextlib.suppress(OSError):
                self._files.look(self._freezer.pids(), is_running=self._is_running)
        self._note_save()
        now = time.monotonic()
        look_s = max(_LOOK_S, (now - began) / _LOOK_SHARE)
        return max(0.0, min(look_s, self._due_at - now))

    def _note_save(self) -> None:
        saved_at = self._files.saved_at
        if saved_at is not None and (not self._saves or saved_at > self._saves[-1] + 1.0):
            self._saves = [*self._saves, saved_at][-_MOST_SAVES:]

    def _take(self, *, final: bool) -> None:
        start = time.monotonic()
        seq = self._files.capture(final=final)
        warnings = dict.fromkeys((*self.progress.warnings, *self._files.warnings))
        changes: dict[str, Any] = {"warnings": tuple(warnings)}
        if not final:
            changes["pause_s"] = pause_s = self._files.pause_s
            if pause_s > _LOUD_PAUSE_S:
                self._warn(
                    f"the script stood still for {pause_s:.1f} s while its files were copied; "
                    "large files that change in place take less on a file system with reflinks"
                )
        if seq is not None:
            self.capture_s = time.monotonic() - start
            step = self._files.step
            changes |= {
                "step": step, "checkpoint_step": step, "checkpoint_seq": seq,
                "checkpoint_s": self.capture_s,
            }  # fmt: skip
            if not final:
                _log.info(
                    "files: checkpoint %d in %.2f s; the script stood still for %.0f ms",
                    step, self.capture_s, 1000 * self._files.pause_s,
                )  # fmt: skip
        self.progress = msgspec.structs.replace(self.progress, **changes)

    def _warn(self, message: str) -> None:
        if message not in self.progress.warnings:
            _log.warning("%s", message)
            self.progress = msgspec.structs.replace(
                self.progress, warnings=(*self.progress.warnings, message)
            )


def worth_waiting_s(saves: list[float], now_s: float, *, is_saving: bool) -> float:
    """How long to wait for a script's next save, before it is moved to another instance.

    ``saves`` are the times of its last saves. Leaving now throws away what came since the last
    one; waiting costs the time until the next, on two instances. So it pays when the next one is
    nearer than the last, or under way. A save that is late by a fifth of its period is not waited
    for.
    """
    if len(saves) < 2:
        return 0.0
    period_s = median(after - before for before, after in itertools.pairwise(saves))
    since_s = now_s - saves[-1]
    left_s = period_s - since_s
    if since_s > _LATE * period_s:
        return 0.0
    if is_saving or left_s < since_s:
        return max(left_s, _AGAIN_S)
    return 0.0
