"""What the machine can do: memory copies, and disk without the page cache."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import psutil

from spotfirst.checkpoints.memory import ALIGNMENT, Block, move

__all__ = [
    "ALIGNMENT", "MemoryCopy", "device_copy_s", "direct_read_s", "direct_write_s", "forget",
    "own_memory", "partly_new", "warm", "write_files",
]  # fmt: skip

_FILE_BYTES = 64 << 20
_CALL_BYTES = 8 << 20
_THREADS = 4


def warm(size_bytes: int) -> Block:
    """Memory in huge pages, all of them touched."""
    block = Block(size_bytes)
    step = 1 << 20
    for start in range(0, block.size_bytes, step):
        block.view[start : start + step] = os.urandom(64) * (step // 64)
    return block


def own_memory(size_bytes: int) -> None:
    """See that the machine has this much free memory at hand, as one of EC2 has from its start.

    Some virtual machines give free memory back to their host within seconds, and ask for it again
    page by page: 2.4 s a gigabyte where these benchmarks were written, instead of 0.09. What this
    process no longer uses is let go before, which would else take its time from what is measured.
    At most half of what is free is asked for.
    """
    gc.collect()
    warm(min(size_bytes, psutil.virtual_memory().available // 2))


def partly_new(size_bytes: int) -> Block:
    """Memory like a restore's: a third, the model's, was used before; the optimizer's is new.

    What is new, the kernel has to find and to clear first; see also :func:`own_memory`.
    """
    own_memory(size_bytes)
    block = Block(size_bytes)
    used = size_bytes // 3
    block.view[:used] = bytes(used)
    return block


class MemoryCopy:
    """One warm copy of ``size_bytes`` in one thread, between memories in huge pages."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._source, self._target = warm(size_bytes), warm(size_bytes)

    def took_s(self, times: int = 5) -> float:
        """The median."""
        return median(_timed(self._copy) for _ in range(times))

    def _copy(self) -> None:
        move(self._target.address, self._source.address, self._size_bytes)


def device_copy_s(size_bytes: int, times: int = 5) -> float:
    """The median of copies from a GPU's memory to pinned memory, in pieces of 1 GB."""
    import torch

    piece = min(size_bytes, 1 << 30)
    source = torch.empty(piece, dtype=torch.uint8, device="cuda")
    target = torch.empty(piece, dtype=torch.uint8, pin_memory=True)

    def copy() -> None:
        for start in range(0, size_bytes, piece):
            length = min(piece, size_bytes - start)
            target[:length].copy_(source[:length], non_blocking=True)
        torch.cuda.synchronize()

    copy()
    return median(_timed(copy) for _ in range(times))


def direct_write_s(folder: Path, memory: memoryview) -> dict[str, float]:
    """Seconds for bare O_DIRECT writes with fsync, by shape; the files are gone afterwards.

    Shapes: one file from one thread; files of 64 MiB, four at a time. Raises :class:`OSError` where
    the file system has no O_DIRECT.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def one() -> None:
        _write(folder / "one", memory)
        _sync(folder)

    found = {}
    for name, action in (("files", lambda: write_files(folder, memory)), ("one file", one)):
        found[name] = _timed(action)
        for path in folder.iterdir():
            path.unlink()
    return found


def write_files(folder: Path, memory: memoryview) -> None:
    """Write ``memory`` with O_DIRECT and fsync to files of 64 MiB, four at a time."""
    pieces = [memory[n : n + _FILE_BYTES] for n in range(0, len(memory), _FILE_BYTES)]
    names = [folder / f"{number:06d}" for number in range(len(pieces))]
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(_write, names, pieces))
    _sync(folder)


def direct_read_s(paths: Sequence[Path], target: memoryview) -> float:
    """Seconds to read files with O_DIRECT, four calls of 8 MiB at a time."""
    calls: list[tuple[Path, int, memoryview]] = []
    position = 0
    for path in paths:
        size = path.stat().st_size
        for start in range(0, size, _CALL_BYTES):
            length = min(_CALL_BYTES, -(-(size - start) // ALIGNMENT) * ALIGNMENT)
            calls.append((path, start, target[position : position + length]))
            position += length
    files = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths}

    def read(call: tuple[Path, int, memoryview]) -> None:
        path, start, memory = call
        os.preadv(files[path], [memory], start)

    def all_of_it() -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(read, calls))

    try:
        return _timed(all_of_it)
    finally:
        for handle in files.values():
            os.close(handle)


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache, so that they are read from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fdatasync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def _write(path: Path, memory: memoryview) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    try:
        for start in range(0, len(memory), _CALL_BYTES):
            os.pwrite(handle, memory[start : start + _CALL_BYTES], start)
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start
