"""Which files of a folder are whole, as far as can be seen from outside of their writer.

Nobody has a whole file open for writing, and it has not changed for a while. A file that was
*renamed* over another one is usually whole at once, so a short look is enough for one whose path
has had another inode before: otherwise a file that is replaced more often than it may settle would
never be taken.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from spotfirst.patience import Sleep
from spotfirst.wire import Clock, utc_now

__all__ = ["Settling", "Signature", "same_bytes", "signature"]

_SHORT_LOOK_S = 0.1
_HOLD_S = 60.0
"""A file that is being written for longer than this is a log, or something else without end."""
_DESCRIPTORS = Path("/proc/self/fd")

Signature = tuple[int, int, int, int, int]
"""Device, inode, size and times of change: another file or other bytes have another."""


def signature(status: os.stat_result) -> Signature:
    """What a file looked like."""
    return (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip


def same_bytes(one: Signature, other: Signature) -> bool:
    """Whether a file holds what it held; it may have been renamed, or removed, in between."""
    return one[:4] == other[:4]


class Settling:
    """Remembers what the files of a folder looked like, from one look to the next."""

    def __init__(
        self,
        folder: Path,
        settle_s: float,
        *,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._folder = folder
        self._settle_s = settle_s
        self._clock, self._monotonic, self._sleep = clock, monotonic, sleep
        self._writers: set[tuple[int, int]] = set()
        self._cut_off: set[tuple[int, int]] = set()
        self._seen: dict[str, tuple[Signature, float]] = {}
        self._pending: dict[str, float] = {}
        self._before = self._pending

    def begin(self) -> None:
        """Begin a look at the whole folder."""
        self._writers = _open_for_writing(self._folder)
        self._before, self._pending = self._pending, {}

    def end(self) -> None:
        """Forget the files that are whole or gone."""
        self._seen = {path: seen for path, seen in self._seen.items() if path in self._pending}

    def note_writers(self) -> None:
        """Remember what is being written, before its writer is told to end or killed.

        Not what is appended to: a log is of use up to where it came.
        """
        self._cut_off = _open_for_writing(self._folder, appending=False)

    def forget_writers(self) -> None:
        """The script ended by itself, so it has written all that it wanted to."""
        self._cut_off = set()

    def is_cut_off(self, status: os.stat_result) -> bool:
        """Whether the file may be half-written for good."""
        return (status.st_dev, status.st_ino) in self._cut_off

    @property
    def is_under_way(self) -> bool:
        """Whether the script has begun to write a file, and may have removed what it replaces."""
        now = self._monotonic()
        return any(now - since < _HOLD_S for since in self._pending.values())

    def is_settled(self, path: str, status: os.stat_result) -> bool:
        """Whether nobody writes the file, and it has been as it is for ``settle_s``."""
        looks = signature(status)
        now = self._monotonic()
        seen, since = self._seen.get(path, (None, now))
        if seen != looks:
            since = now
        self._seen[path] = (looks, since)
        age_s = self._clock().timestamp() - max(status.st_mtime, status.st_ctime)
        waited = age_s >= self._settle_s or now - since >= self._settle_s
        return waited and looks[:2] not in self._writers

    def add_pending(self, path: str) -> None:
        """The file was not taken in this look."""
        self._pending[path] = self._before.get(path, self._monotonic())

    def is_taken(self, path: str) -> None:
        """The file was taken after all."""
        del self._pending[path]

    def is_replaced(self, status: os.stat_result, before: Signature | None) -> bool:
        """Whether its path had another inode ``before``, so that a short look may do.

        Only for files of our own user: others' descriptors cannot be seen.
        """
        return (
            before is not None
            and before[:2] != (status.st_dev, status.st_ino)
            and status.st_uid == os.geteuid()
            and _DESCRIPTORS.exists()
        )

    def last_seen(self, path: str) -> Signature | None:
        """What a file that was not taken looked like at the look before."""
        seen = self._seen.get(path)
        return seen[0] if seen else None

    def look_twice(self, handles: dict[str, int]) -> set[str]:
        """The paths whose open files do not change for a moment, and that nobody writes."""
        before = {path: signature(os.fstat(handle)) for path, handle in handles.items()}
        self._sleep(_SHORT_LOOK_S)
        writers = _open_for_writing(self._folder)
        return {
            path
            for path, handle in handles.items()
            if same_bytes(signature(os.fstat(handle)), before[path])
            and before[path][:2] not in writers
        }


def _open_for_writing(folder: Path, *, appending: bool = True) -> set[tuple[int, int]]:
    """(device, inode) of the files below ``folder`` that a process of ours may still write.

    From Linux' ``/proc``; elsewhere it is empty, and only the settling time protects.
    """
    found: set[tuple[int, int]] = set()
    root = f"{folder.resolve()}/"
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            numbers = list(descriptors.iterdir())
        except OSError:
            continue  # another user's process, or one that has just ended
        for number in numbers:
            # Each on its own: one that is closed meanwhile must not hide those behind it.
            with contextlib.suppress(OSError, IndexError, ValueError):
                if not os.readlink(number).startswith(root):  # noqa: PTH115 - may be no path
                    continue
                info = (descriptors.parent / "fdinfo" / number.name).read_text()
                flags = int(info.split("flags:", 1)[1].split(maxsplit=1)[0], 8)
                if flags & os.O_ACCMODE != os.O_RDONLY and (appending or not flags & os.O_APPEND):
                    status = number.stat()
                    found.add((status.st_dev, status.st_ino))
    return found
