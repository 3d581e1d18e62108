"""Bringing a version to this machine: what the cache lacks is downloaded, the rest is linked.

The cache holds one read-only file for each digest, moved there after its bytes were verified. All
of them carry the same modification time, so that a file which someone wrote to afterwards, through
a link in a training folder, is noticed by one ``stat`` and verified again.
"""

# ruff: noqa: PTH101, PTH103, PTH105, PTH108, PTH123
# One Path object for each of a million files would cost more than the calls.

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from blake3 import blake3

from spotfirst.datasets._keys import parents
from spotfirst.datasets._local import for_each, hash_stream, scratch
from spotfirst.datasets._log import VersionLog, object_path
from spotfirst.datasets._query import rows_of
from spotfirst.errors import CorruptObject, InvalidSpec, ObjectMissing
from spotfirst.spec import DatasetRef
from spotfirst.storage import Storage

__all__ = ["SyncResult", "sync"]

_IN_MEMORY_BYTES = 16 << 20
_STAMP_NS = 946_684_800 * 10**9  # the year 2000
_CANNOT_LINK = {errno.EXDEV, errno.EMLINK, errno.EPERM, errno.ENOTSUP}


class SyncResult(NamedTuple):
    """Files and bytes of the folder, and how many of them had to be moved over the network.

    A file that is in the version twice moves once.
    """

    files: int
    bytes: int
    moved_files: int
    moved_bytes: int
    seconds: float


def sync(
    storage: Storage,
    ref: DatasetRef,
    destination: Path,
    cache: Path,
    progress: Callable[[int, int], None] | None = None,
    *,
    workers: int = 16,
) -> SyncResult:
    """Make ``destination`` hold exactly the files of a version, moving only what is missing.

    With ``ref.since`` only files that were added or changed after that version. ``cache`` may be
    shared by any number of processes and datasets. Files are hard links into it where the file
    system allows, and read-only: a script that changes one in place must copy it first.
    ``progress`` is called with (moved bytes, bytes to move), from one thread at a time.

    Killed at any point, it leaves a cache without half files, and the next call finishes the rest.

    Raises :class:`~spotfirst.errors.UnknownDataset`; :class:`~spotfirst.errors.CorruptObject` or
    :class:`~spotfirst.errors.ObjectMissing` when the storage no longer holds what the version
    promises; :class:`~spotfirst.errors.InvalidSpec` when ``destination`` holds files that no sync
    put there, which would be deleted.
    """
    started = time.monotonic()
    log = VersionLog(storage, ref.name)
    folder = cache.absolute() / "datasets"
    table = rows_of(log, ref, cache=folder / "manifests")
    keys, digests = table["key"].to_pylist(), table["blake3"].to_pylist()
    sizes = dict(zip(digests, table["size"].to_pylist(), strict=True))
    store = _Cache(folder)
    missing = {digest: size for digest, size in sizes.items() if not store.holds(digest, size)}
    fetch = partial(_fetch_verified, log, ref)
    _download(store, missing, fetch, progress, workers)
    files = dict(zip(keys, digests, strict=True))
    _materialise(store, files, destination.absolute())
    return SyncResult(
        files=len(files),
        bytes=sum(sizes[digest] for digest in digests),
        moved_files=len(missing),
        moved_bytes=sum(missing.values()),
        seconds=time.monotonic() - started,
    )


class _Cache:
    """Verified objects by digest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._objects = str(folder / "objects")
        self.inodes: dict[str, tuple[int, int]] = {}

    def path(self, digest: str) -> str:
        return f"{self._objects}/{digest[:2]}/{digest}"

    def holds(self, digest: str, size: int) -> bool:
        """Whether the object is here and intact; one that is not, is removed."""
        path = self.path(digest)
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return False
        if (
            not stat.S_ISREG(found.st_mode)
            or found.st_size != size
            or (found.st_mtime_ns != _STAMP_NS and not _reseal(path, digest))
        ):
            os.unlink(path)
            return False
        self.inodes[digest] = (found.st_dev, found.st_ino)
        return True

    def add(self, digest: str, verified: Path) -> None:
        """Take over a file whose bytes have been verified."""
        verified.chmod(0o444)
        os.utime(verified, ns=(_STAMP_NS, _STAMP_NS))
        target = Path(self.path(digest))
        target.parent.mkdir(parents=True, exist_ok=True)
        found = verified.stat()
        verified.replace(target)
        self.inodes[digest] = (found.st_dev, found.st_ino)


def _reseal(path: str, digest: str) -> bool:
    """Verify a file that was touched; whether only its time had changed."""
    with open(path, "rb") as file:
        if hash_stream(file)[0] != digest:
            return False
    os.utime(path, ns=(_STAMP_NS, _STAMP_NS))
    return True


def _download(
    store: _Cache,
    missing: Mapping[str, int],
    fetch: Callable[[str, int, Path], Path],
    progress: Callable[[int, int], None] | None,
    workers: int,
) -> None:
    total, moved, lock = sum(missing.values()), 0, Lock()

    def add(item: tuple[str, int]) -> None:
        nonlocal moved
        digest, size = item
        store.add(digest, fetch(digest, size, temporary))
        with lock:
            moved += size
            if progress is not None:
                progress(moved, total)

    with scratch(store.folder / "partial") as temporary:
        for_each(missing.items(), add, workers=workers)


def _fetch_verified(
    log: VersionLog, ref: DatasetRef, digest: str, size: int, temporary: Path
) -> Path:
    """Download one object and prove its bytes, with one retry for a damaged transfer."""
    path, local = object_path(digest), temporary / digest
    what = f"{log.storage.url}/{path}, a file of {ref.name}@{ref.version},"
    found, found_size = "", 0
    for _ in range(2):
        try:
            if size <= _IN_MEMORY_BYTES:
                data = log.storage.read(path)
                found, found_size = blake3(data).hexdigest(), len(data)
                local.write_bytes(data)
            else:
                log.storage.download(path, local)
                with local.open("rb") as file:
                    found, found_size = hash_stream(file)
        except ObjectMissing as error:
            msg = f"{what} is missing; commit its source again with repair=True"
            raise ObjectMissing(msg, path=path) from error
        if (found, found_size) == (digest, size):
            return local
    msg = (
        f"{what} has other bytes than its name promises ({found_size} bytes, digest {found}); "
        "commit its source again with repair=True"
    )
    raise CorruptObject(msg)


def _materialise(store: _Cache, files: Mapping[str, str], destination: Path) -> None:
    """Make ``destination`` hold exactly ``files`` (key to digest)."""
    marker = destination.with_name(f".{destination.name}.spotfirst-dataset")
    destination.mkdir(parents=True, exist_ok=True)
    if not marker.exists():
        if any(destination.iterdir()):
            msg = f"{destination} holds files that no sync put there; give an empty folder"
            raise InvalidSpec(msg)
        marker.touch()
    root = str(destination)
    folders = {
        name
        for folder in {key.rpartition("/")[0] for key in files} - {""}
        for name in parents(folder)
    }
    _remove_others(root, "", files, folders)
    for folder in sorted(folders):
        os.makedirs(f"{root}/{folder}", exist_ok=True)
    for key, digest in files.items():
        _place(store, digest, f"{root}/{key}", root)


def _remove_others(root: str, prefix: str, files: Mapping[str, str], folders: set[str]) -> None:
    """Remove what is not in the version; never through a link, which is removed itself."""
    with os.scandir(f"{root}/{prefix}") as entries:
        for entry in list(entries):
            key = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                if key in folders:
                    _remove_others(root, f"{key}/", files, folders)
                else:
                    shutil.rmtree(entry.path)
            elif key not in files or entry.is_symlink():
                os.unlink(entry.path)


def _place(store: _Cache, digest: str, target: str, root: str) -> None:
    """Put one object at ``target``: a hard link, or a copy where there can be none."""
    source = store.path(digest)
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(target)
        if (found.st_dev, found.st_ino) == store.inodes[digest]:
            return
        os.unlink(target)
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        copy = f"{root}/.{secrets.token_hex(8)}.partial"
        try:
            shutil.copyfile(source, copy)
            os.chmod(copy, 0o444)
            os.replace(copy, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(copy)
