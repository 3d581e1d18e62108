"""Which files of a folder are whole at one instant, as far as can be seen from outside of writers.

A closed file is whole, unless its format says otherwise. What is open for writing is either about
to be rewritten, and then its last version counts; or it stays open, and then it counts as it is at
the instant. They are told apart by evidence, the strongest first:

============================================================ ======================================
what is seen                                                 so it is
============================================================ ======================================
all its descriptors append, it is mapped to be written, or   kept as of the instant
it is an SQLite database
its format says that the end is missing                      being rewritten
its format says that the end is there                        kept as of the instant
what was kept of it before is how it begins                  kept as of the instant
one descriptor has been open for seconds                     kept as of the instant, unless it grows
                                                             as fast as a checkpoint that is saved
anything else                                                being rewritten
============================================================ ======================================
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spotfirst.checkpoints.closings import Closings
from spotfirst.checkpoints.containers import is_sqlite, wholeness
from spotfirst.checkpoints.writers import Inode, Writers, inode_of
from spotfirst.wire import Clock, utc_now

__all__ = ["Settling", "Signature", "same_bytes", "signature"]

_LOG_S = 5.0
"""A descriptor that is open for this long is of a log, where nothing has been kept of the file."""
_REOPENED_LOG_S = 30.0
"""The same where an earlier version is kept, which is better than half of a new one."""
_FOLDER_LOG_S = 120.0
"""The same in a folder of which nothing has been kept: half of a checkpoint is worse than none."""
_ANYTHING_S = 600.0
"""Whatever is open for this long is no checkpoint that is being saved."""
_BULK_BYTES_S = 1 << 20
"""What grows faster is being saved; logs are slower."""

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


@dataclass
class _Open:
    """A file that is open for writing, from one look to the next."""

    handles: frozenset[tuple[int, int]]
    since: float
    size_bytes: int
    at: float
    bulk: bool = False
    is_log: bool = False


class Settling:
    """Remembers which files of a folder were open, from one look to the next.

    ``settle_s`` is how long a closed file must have been unchanged where its writers may run on.
    """

    def __init__(
        self,
        folder: Path,
        settle_s: float,
        *,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settle_s = settle_s
        self._clock, self._monotonic = clock, monotonic
        self._closings = Closings(folder)
        self._open: dict[Inode, _Open] = {}
        self._writers: Mapping[Inode, Writers] = {}
        self._seen: dict[str, tuple[Signature, float]] = {}

    def look(
        self,
        files: Mapping[str, os.stat_result],
        folders: Collection[str],
        writers: Mapping[Inode, Writers],
    ) -> None:
        """Take what a folder holds now, and who can write what of it."""
        now = self._monotonic()
        closed = self._closings.poll()
        self._closings.watch(folders)
        status_of = {inode_of(status): status for status in files.values()}
        reopened = {inode_of(files[path]) for path in closed or () if path in files}
        found: dict[Inode, _Open] = {}
        for inode, writer in writers.items():
            status, known = status_of.get(inode), self._open.get(inode)
            size = status.st_size if status is not None else 0
            is_new = known is None or inode in reopened
            if known is not None and closed is None:
                is_new = is_new or size < known.size_bytes or not known.handles & writer.handles
            if known is None or is_new:
                found[inode] = _Open(writer.handles, now, size, now)
                continue
            passed_s = now - known.at
            if passed_s > 0:
                known.bulk = size - known.size_bytes > _BULK_BYTES_S * max(passed_s, 0.5)
                known.size_bytes, known.at = size, now
            known.handles = writer.handles
            found[inode] = known
        self._open = found
        self._writers = writers
        seen = {path: self._seen.get(path) for path in files}
        self._seen = {
            path: before
            if before is not None and before[0] == signature(files[path])
            else (signature(files[path]), now)
            for path, before in seen.items()
        }

    def close(self) -> None:
        """Look no more."""
        self._closings.close()

    def writers_of(self, status: os.stat_result) -> Writers | None:
        """Who can write a file, as of the last look."""
        return self._writers.get(inode_of(status))

    def age_s(self, path: str, status: os.stat_result) -> float:
        """How long a file has been as it is, at least."""
        by_clock_s = self._clock().timestamp() - max(status.st_mtime, status.st_ctime)
        return max(by_clock_s, self._monotonic() - self._seen[path][1])

    def is_log(self, path: str, status: os.stat_result, descriptor: int, *, limit_s: float) -> bool:
        """Whether a file that is open for writing is to be kept as it is, whatever is added to it."""
        writers = self.writers_of(status)
        if writers is None:
            return False
        if writers.appending or writers.mapped or is_sqlite(descriptor):
            return True
        known = self._open[inode_of(status)]
        state = wholeness(descriptor, path, status.st_size)
        open_s = self._monotonic() - known.since
        if state == "torn" or (state == "unsure" and open_s < _ANYTHING_S):
            return False
        known.is_log = known.is_log or (
            open_s >= limit_s and (not known.bulk or open_s >= _ANYTHING_S)
        )
        return known.is_log

    def verdict(
        self,
        path: str,
        status: os.stat_result,
        descriptor: int,
        *,
        frozen: bool,
        kept: Literal["nothing", "file", "no folder"],
        extends: Callable[[], bool],
    ) -> Literal["whole", "log", "before"]:
        """Whether a file that has changed is to be kept as it is.

        ``frozen``: nothing can change it meanwhile. ``kept`` is what there is of it from before,
        and ``extends`` whether that is how it begins. A ``log`` stays open; ``before``: it is being
        written, so what was kept of it stands.
        """
        state = wholeness(descriptor, path, status.st_size)
        if self.writers_of(status) is None:
            if state == "torn":
                return "before"
            is_settled = frozen or self.age_s(path, status) >= self._settle_s
            return "whole" if is_settled else "before"
        limit_s = {"nothing": _LOG_S, "file": _REOPENED_LOG_S, "no folder": _FOLDER_LOG_S}[kept]
        if self.is_log(path, status, descriptor, limit_s=limit_s):
            return "log"
        if state in {"torn", "unsure"}:
            return "before"
        if state == "whole":
            return "whole"
        return "log" if kept == "file" and extends() else "before"
