"""Copies of files that are taken while their writers stand still: shared extents, or new chunks.

Nothing is copied of which the digest is known: the same bytes are in the storage.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from spotfirst.checkpoints.filepacks import Chunk, Hole, Save
from spotfirst.checkpoints.memory import Block
from spotfirst.checkpoints.packs import chunk_digest
from spotfirst.errors import SpotfirstError

__all__ = ["Copied", "PauseTooLong", "Staging", "extents", "read_at"]

_MEMORY_BYTES = min(256 << 20, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
"""More goes to a file beside the folder."""
_CLONE_BYTES = 1 << 20
"""Smaller files are copied faster than their extents are shared."""
_FICLONE = 0x40049409


class PauseTooLong(SpotfirstError):
    """What has changed cannot be copied in the time for which the script may stand still."""


@dataclass
class Copied:
    """One file's bytes. ``places`` say where in the staging area each chunk is that is not known."""

    chunks: list[Chunk] = field(default_factory=list)
    holes: list[Hole] = field(default_factory=list)
    places: list[int | None] = field(default_factory=list)


class Staging:
    """Room for copies, gone when it is closed, or with the process."""

    def __init__(
        self,
        beside: Path,
        known: Collection[str],
        chunk_bytes: int,
        *,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        self._beside = beside
        self._known = known
        self._chunk_bytes = chunk_bytes
        self._is_over = is_over
        self._memory: list[bytes] = []
        self._memory_bytes = 0
        self._file: IO[bytes] | None = None
        self._file_bytes = 0
        self._can_clone = True
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        """Give the room back."""
        self._stack.close()

    def clone(self, descriptor: int, size_bytes: int) -> int | None:
        """A descriptor of a copy that shares its extents; ``None`` where there is no such thing."""
        if not self._can_clone or size_bytes < _CLONE_BYTES:
            return None
        try:
            import fcntl

            copy = os.open(self._beside, os.O_TMPFILE | os.O_RDWR, 0o600)
            self._stack.callback(os.close, copy)
            fcntl.ioctl(copy, _FICLONE, descriptor)
        except (ImportError, AttributeError, OSError):
            self._can_clone = False
            return None
        return copy

    def copy(self, descriptor: int, size_bytes: int, *, is_sparse: bool) -> Copied | None:
        """Copy what is not known of an open file; ``None`` when it has become shorter.

        Raises :class:`PauseTooLong`, and :class:`OSError` when there is no room.
        """
        copied = Copied()
        memory = Block(self._chunk_bytes).view
        for offset, size, is_hole in extents(descriptor, size_bytes, self._chunk_bytes, is_sparse):
            if is_hole:
                copied.holes.append((offset, size))
                continue
            for start in range(offset, offset + size, self._chunk_bytes):
                if self._is_over():
                    msg = "too much has changed"
                    raise PauseTooLong(msg)
                target = memory[: min(self._chunk_bytes, offset + size - start)]
                if read_at(descriptor, start, target) < len(target):
                    return None  # cut off by someone who was not stopped
                digest = chunk_digest(target)
                copied.chunks.append((digest, len(target)))
                if digest in self._known:
                    copied.places.append(None)
                    continue
                copied.places.append(self._put(target))
        return copied

    def _put(self, data: memoryview) -> int:
        """Where the bytes are: an offset in the file, or from -1 downwards a place in memory."""
        if self._memory_bytes + len(data) <= _MEMORY_BYTES:
            self._memory.append(bytes(data))
            self._memory_bytes += len(data)
            return -len(self._memory)
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._beside, buffering=0)  # noqa: SIM115
            self._stack.callback(self._file.close)
        place = self._file_bytes
        while data:
            written = os.pwrite(self._file.fileno(), data, self._file_bytes)
            self._file_bytes, data = self._file_bytes + written, data[written:]
        return place

    def store(self, copied: Copied, save: Save) -> None:
        """Give the chunks that are not known to ``save``."""
        for (_, size), place in zip(copied.chunks, copied.places, strict=True):
            if place is None:
                continue
            if place < 0:
                save.add(memoryview(self._memory[-place - 1]), size)
                continue
            assert self._file is not None
            target = save.buffer[:size]
            read_at(self._file.fileno(), place, target)
            save.add(target, size)


def extents(
    descriptor: int, size_bytes: int, chunk_bytes: int, is_sparse: bool
) -> Iterator[tuple[int, int, bool]]:
    """Offset, size and whether it is a hole, of the ranges that make up an open file.

    Each begins at a multiple of ``chunk_bytes``, so a file is cut in the same way each time.
    """
    if not is_sparse:
        if size_bytes:
            yield 0, size_bytes, False
        return
    offset = 0
    while offset < size_bytes:
        first = end = size_bytes
        with contextlib.suppress(OSError):  # no data behind this
            first = os.lseek(descriptor, offset, os.SEEK_DATA)
        start = size_bytes if first == size_bytes else first // chunk_bytes * chunk_bytes
        if start > offset:
            yield offset, start - offset, True
            offset = start
            continue
        with contextlib.suppress(OSError):
            end = -(-os.lseek(descriptor, first, os.SEEK_HOLE) // chunk_bytes) * chunk_bytes
        yield offset, min(size_bytes, end) - offset, False
        offset = end


def read_at(descriptor: int, offset: int, target: memoryview) -> int:
    """Fill ``target`` from an open file; how many bytes there were."""
    size = 0
    while size < len(target) and (count := os.preadv(descriptor, [target[size:]], offset + size)):
        size += count
    return size
