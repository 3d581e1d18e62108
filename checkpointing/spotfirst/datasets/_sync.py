"""Bringing a version to this machine: what the cache lacks is downloaded, the rest is linked.

The cache holds one read-only file for each digest, moved there after its bytes were verified, and a
copy of it where the file may also be run, because a mode belongs to the file and not to its links. A
file that was written to afterwards, through a link in a training folder, is noticed by one ``stat``
(see ``_seals``) and verified again.
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
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from blake3 import blake3

from spotfirst.datasets._keys import parents
from spotfirst.datasets._local import for_each, hash_stream, scratch
from spotfirst.datasets._log import VersionLog, object_path
from spotfirst.datasets._query import rows_of
from spotfirst.datasets._seals import Seals
from spotfirst.errors import CorruptObject, InvalidSpec, ObjectMissing
from spotfirst.spec import DatasetRef
from spotfirst.storage import Storage

__all__ = ["SyncResult", "sync"]

_IN_MEMORY_BYTES = 16 << 20
_STAMP_NS = 946_684_800 * 10**9  # the year 2000
_RUN = ".x"
"""Ends the name of a copy that may be run."""
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
    system allows, and read-only: a script that changes one in place must copy it first. Those that
    could be run where they were committed can be run.
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
    executables = [bool(value) for value in table["executable"].to_pylist()]
    sizes = dict(zip(digests, table["size"].to_pylist(), strict=True))
    store = _Cache(folder)
    missing = {digest: size for digest, size in sizes.items() if not store.holds(digest, size)}
    fetch = partial(_fetch_verified, log, ref)
    _download(store, missing, fetch, progress, workers)
    files = {
        key: store.run_copy(digest, sizes[digest]) if executable else digest
        for key, digest, executable in zip(keys, digests, executables, strict=True)
    }
    _materialise(store, files, destination.absolute())
    store.seal(set(files.values()) | set(digests))
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
        self._file = Seals(folder)
        self._seals = self._file.load()
        self.inodes: dict[str, tuple[int, int]] = {}

    def path(self, name: str) -> str:
        return f"{self._objects}/{name[:2]}/{name}"

    def run_copy(self, digest: str, size: int) -> str:
        """The name of the object's copy that may be run, made where it is missing."""
        name = f"{digest}{_RUN}"
        if name in self.inodes or self.holds(name, size):
            return name
        path = Path(self.path(name))
        partial = path.with_name(f".{secrets.token_hex(8)}.partial")
        try:
            shutil.copyfile(self.path(digest), partial)
            self.add(name, partial)
        finally:
            partial.unlink(missing_ok=True)
        return name

    def seal(self, names: Collection[str]) -> None:
        """Note that these are right as they are now, with the links that were made."""
        seals = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(self.path(name))
                if (found.st_dev, found.st_ino) == self.inodes[name]:
                    seals[name] = (found.st_ino, found.st_ctime_ns)
        if any(self._seals.get(name) != seal for name, seal in seals.items()):
            self._file.add(seals)

    def holds(self, name: str, size: int) -> bool:
        """Whether the object is here and intact; one that is not, is removed."""
        path, digest = self.path(name), name.removesuffix(_RUN)
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            return False
        if (
            not stat.S_ISREG(found.st_mode)
            or found.st_size != size
            or (
                self._seals.get(name) != (found.st_ino, found.st_ctime_ns)
                and not _is_intact(path, digest, _mode(name))
            )
        ):
            os.unlink(path)
            return False
        self.inodes[name] = (found.st_dev, found.st_ino)
        return True

    def add(self, name: str, verified: Path) -> None:
        """Take over a file whose bytes have been verified."""
        verified.chmod(_mode(name))
        os.utime(verified, ns=(_STAMP_NS, _STAMP_NS))
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        found = verified.stat()
        verified.replace(target)
        self.inodes[name] = (found.st_dev, found.st_ino)


def _mode(name: str) -> int:
    return 0o555 if name.endswith(_RUN) else 0o444


def _is_intact(path: str, digest: str, mode: int) -> bool:
    """Verify a file that was touched, or only linked; whether its bytes are right."""
    with open(path, "rb") as file:
        if hash_stream(file)[0] != digest:
            return False
    os.utime(path, ns=(_STAMP_NS, _STAMP_NS))
    os.chmod(path, mode)
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
                data = log.storage.read(path, limit_bytes=size)
                found, found_size = blake3(data).hexdigest(), len(data)
                local.write_bytes(data)
            elif (found_size := log.storage.size_bytes(path)) != size:
                break  # which a download of any length would only show later
            else:
                log.storage.download(path, local)
                with local.open("rb") as file:
                    found, found_size = hash_stream(file)
        except ObjectMissing as error:
            msg = f"{what} is missing; commit its source again with repair=True"
            raise ObjectMissing(msg, path=path) from error
        except CorruptObject:
            found_size = log.storage.size_bytes(path)
            break
        if (found, found_size) == (digest, size):
            return local
    msg = (
        f"{what} has other bytes than its name promises ({found_size} bytes, digest {found}); "
        "commit its source again with repair=True"
    )
    raise CorruptObject(msg)


def _materialise(store: _Cache, files: Mapping[str, str], destination: Path) -> None:
    """Make ``destination`` hold exactly ``files`` (key to the name of an object in the cache)."""
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
    for key, name in files.items():
        _place(store, name, f"{root}/{key}", root)


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


def _place(store: _Cache, name: str, target: str, root: str) -> None:
    """Put one object at ``target``: a hard link, or a copy where there can be none."""
    source = store.path(name)
    with contextlib.suppress(FileNotFoundError):
        found = os.lstat(target)
        if (found.st_dev, found.st_ino) == store.inodes[name]:
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
            os.chmod(copy, _mode(name))
            os.replace(copy, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(copy)
