"""Local files that may be killed at any instant: atomic replacement, and scratch folders."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO, TypeVar

from blake3 import blake3

__all__ = ["default_cache", "for_each", "hash_stream", "replace_file", "scratch"]

_T = TypeVar("_T")
_BLOCK_BYTES = 1 << 20


def default_cache() -> Path:
    """``$SPOTFIRST_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("SPOTFIRST_CACHE")
    if chosen:
        return Path(chosen)
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "spotfirst"


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``: readers see the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def hash_stream(source: BinaryIO, copy_to: BinaryIO | None = None) -> tuple[str, int]:
    """(digest, bytes) of what is left in ``source``, which may be copied on the way."""
    hasher, size = blake3(), 0
    while block := source.read(_BLOCK_BYTES):
        hasher.update(block)
        size += len(block)
        if copy_to is not None:
            copy_to.write(block)
    return str(hasher.hexdigest()), size


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder for half files, gone afterwards; also removes those of processes that died.

    A living owner holds a lock on the file beside its folder, and the kernel drops that with the
    process. The lock file is made before the folder and removed after it.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in parent.glob("*.lock"):
        with contextlib.suppress(OSError), left.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_scratch(left)
    path, held = _own_lock(parent)
    with held:
        folder = path.with_suffix("")
        folder.mkdir()
        try:
            yield folder
        finally:
            _remove_scratch(path)


def _own_lock(parent: Path) -> tuple[Path, BinaryIO]:
    while True:
        path = parent / f"{secrets.token_hex(8)}.lock"
        lock: BinaryIO = path.open("wb")
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        lock.close()  # removed by another process, before it was ours


def _remove_scratch(lock: Path) -> None:
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)


def for_each(items: Iterable[_T], action: Callable[[_T], None], *, workers: int) -> None:
    """Call ``action`` for every item from several threads; the first error stops them all."""
    iterator, lock, stop = iter(items), Lock(), Event()

    def work() -> None:
        try:
            while not stop.is_set():
                with lock:
                    try:
                        item = next(iterator)
                    except StopIteration:
                        return
                action(item)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(workers, thread_name_prefix="spotfirst-dataset") as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        try:
            for future in futures:
                future.result()
        finally:
            stop.set()
