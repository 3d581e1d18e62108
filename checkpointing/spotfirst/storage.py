"""One place for the files of all runs: any URL that can create an object only if it is absent.

Three kinds are supported, each with the guarantees that the rest of Spotfirst relies on: a read
sees a whole object or none, ``write`` replaces atomically, and of several concurrent ``create``
calls exactly one wins. Bytes are durable when a call returns.

================= ================================ ============================================
URL               ``create`` is                    for
================= ================================ ============================================
``s3://b/p``      PutObject, ``If-None-Match: *``  production
``/p, file:///p`` a hard link from a temporary     one machine, or a file system with hard links
``memory://p``    a lock in this process           tests
================= ================================ ============================================

S3 credentials and endpoint come from the environment (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL_S3``, …) or the instance's role, never from a spec.
"""

from __future__ import annotations

import contextlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import tenacity

from spotfirst.errors import (
    CorruptObject,
    InvalidSpec,
    ObjectMissing,
    StorageDenied,
    StorageError,
    StorageUnavailable,
    UnsupportedStorage,
)

if TYPE_CHECKING:
    from spotfirst.signing import ControlKeys

__all__ = ["Storage", "check_url", "is_s3", "open_storage", "safe_path"]

_T = TypeVar("_T")


def safe_path(path: str) -> str:
    """``path`` when it stays below the prefix it is joined to; else :class:`InvalidSpec`.

    Every name that comes out of a file (manifest, chain entry, archive) passes through here
    before it is joined to a prefix.
    """
    pure = PurePosixPath(path)
    if not pure.parts or "\0" in path or "\\" in path or pure.is_absolute() or ".." in pure.parts:
        msg = f"path {path!r} would leave its prefix; use a relative path without '..'"
        raise InvalidSpec(msg)
    try:
        path.encode()
    except UnicodeEncodeError as error:
        msg = f"path {path!r} is not valid Unicode, so it cannot name an object; rename it"
        raise InvalidSpec(msg) from error
    return str(pure)


def open_storage(url: str, *, options: Mapping[str, Any] | None = None) -> Storage:
    """The storage behind ``url``; ``options`` go to the S3 client of s3fs (never into a spec).

    Opening is cheap and touches nothing: :meth:`Storage.probe` is what proves that it works.
    """
    check_url(url)
    protocol, rest = _parts(url)
    if protocol in {"", "file", "local"}:
        from spotfirst._storage_local import LocalStorage

        # Absolute, because the URL travels to processes with another working directory.
        root = str(Path(rest).expanduser().absolute())
        return LocalStorage(f"{protocol}://{root}" if protocol else root, root)
    if protocol == "memory":
        from spotfirst._storage_memory import MemoryStorage

        return MemoryStorage(url, rest.strip("/"))
    from spotfirst._storage_s3 import S3Storage

    return S3Storage(url, rest.strip("/"), options or {})


def is_s3(url: str) -> bool:
    """Whether ``url`` is in S3, rather than a path or another storage."""
    return _parts(url)[0] in {"s3", "s3a"}


def check_url(url: str) -> None:
    """Raise :class:`UnsupportedStorage` for a URL that no storage can have. Opens nothing."""
    protocol, rest = _parts(url)
    if protocol in {"", "file", "local"}:
        if not rest or (protocol and not rest.startswith(("/", "~"))):
            msg = f"storage {url!r} names no absolute path; write it as /PATH or file:///PATH"
            raise UnsupportedStorage(msg)
    elif is_s3(url):
        if not rest.strip("/"):
            msg = f"storage {url!r} names no bucket; write it as s3://BUCKET/PREFIX"
            raise UnsupportedStorage(msg)
        _check_s3(url, rest.strip("/"))
    elif protocol != "memory":
        msg = (
            f"storage {url!r}: {protocol}:// cannot create an object only if it is absent, which "
            "is what keeps two trainers apart. Use s3://BUCKET/PREFIX, or a local path"
        )
        raise UnsupportedStorage(msg)


def _parts(url: str) -> tuple[str, str]:
    """The protocol, empty for a path, and what follows it."""
    protocol, found, rest = url.partition("://")
    return (protocol, rest) if found else ("", url)


def _check_s3(url: str, place: str) -> None:
    """Refuse a prefix that S3 stores as it is written and its clients take for another one.

    ``s3://b/a//b`` is such a prefix: s3fs writes below it, and obstore refuses to.
    """
    parts = place.split("/")
    plain = [part for part in parts if part not in {"", ".", ".."}]
    if parts != plain:
        written = f"{url.partition('://')[0]}://{'/'.join(plain)}"
        advice = "" if ".." in parts else f"; write it as {written}"
        msg = f"storage {url!r} has an empty part, '.' or '..' between its slashes{advice}"
        raise UnsupportedStorage(msg)
    if not place.isprintable():
        msg = f"storage {url!r} has a control character in its name; remove it"
        raise UnsupportedStorage(msg)


class Storage(ABC):
    """Objects below one prefix. Paths are relative, with ``/``; methods are thread-safe.

    Calls raise :class:`ObjectMissing`, :class:`StorageDenied`, or, once ``patience_s`` of
    retries are over, :class:`StorageUnavailable`. The latter comes a few seconds after
    ``patience_s`` at most, because an attempt that has begun is not cut short.
    """

    patience_s = 8.0
    on_disk = False
    """Whether it is a folder of this machine."""
    keys: ControlKeys | None = None
    """What its controllers sign with; ``None``: this process's own (:mod:`spotfirst.signing`)."""

    def __init__(self, url: str, root: str) -> None:
        self.url = url.rstrip("/")
        self._root = root.rstrip("/")

    def __repr__(self) -> str:
        return f"<Storage {self.url}>"

    # -- what every kind offers -------------------------------------------------------------

    def read(self, path: str, *, limit_bytes: int | None = None) -> bytes:
        """The whole object.

        With ``limit_bytes``, no more than that is read, and a larger object raises
        :class:`CorruptObject`: for what others write, and a reader could not hold.
        """
        if limit_bytes is None:
            return self._call("read", path, self._read)
        data = self.read_range(path, 0, limit_bytes + 1)
        self._check_limit(path, data, limit_bytes)
        return data

    def _check_limit(self, path: str, data: bytes, limit_bytes: int) -> None:
        if len(data) > limit_bytes:
            msg = (
                f"{self.url}/{path} has more than {limit_bytes} bytes, which Spotfirst never "
                "writes there: something else wrote it. Look at it, and restore or remove it"
            )
            raise CorruptObject(msg)

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive) of the object; fewer where it ends before."""
        if not 0 <= start <= end:
            msg = f"read_range({path!r}): {start} to {end} is no range; give 0 <= start <= end"
            raise ValueError(msg)
        return self._call("read", path, lambda full: self._read_range(full, start, end))

    def read_tail(self, path: str, limit_bytes: int) -> bytes:
        """The last ``limit_bytes`` of the object, or all of a smaller one."""
        size_bytes = self.size_bytes(path)
        return self.read_range(path, max(0, size_bytes - limit_bytes), size_bytes)

    def read_many(
        self, paths: Iterable[str], *, limit_bytes: int | None = None
    ) -> dict[str, bytes]:
        """Several small objects at once; one that is missing raises :class:`ObjectMissing`."""
        return {path: self.read(path, limit_bytes=limit_bytes) for path in paths}

    def read_or_none(self, path: str, *, limit_bytes: int | None = None) -> bytes | None:
        """The whole object, or ``None`` when there is none."""
        try:
            return self.read(path, limit_bytes=limit_bytes)
        except ObjectMissing:
            return None

    def write(self, path: str, data: bytes) -> None:
        """Create or replace the object."""
        self._call("write", path, lambda full: self._write(full, data))

    def write_from(self, path: str, data: memoryview) -> None:
        """Create or replace the object from a large buffer, without a copy of it where that can be.

        Fastest when the memory begins at a multiple of 4096. On S3 a writer that is killed leaves
        the parts of an unfinished upload behind: a lifecycle rule of the bucket that aborts
        incomplete multipart uploads removes them.
        """
        data = data.cast("B")
        self._call("write", path, lambda full: self._write_from(full, data), tries=3)

    def read_into(self, path: str, start: int, target: memoryview) -> None:
        """Fill ``target`` with the object's bytes from ``start`` on, holding no GIL meanwhile.

        Fastest when ``start`` and the memory's address are multiples of 4096. Raises
        :class:`CorruptObject` when the object ends before.
        """
        target = target.cast("B")
        found = self._call("read", path, lambda full: self._read_into(full, start, target), tries=3)
        self._check_end(path, start, len(target), found)

    def _check_end(self, path: str, start: int, wanted: int, found: int) -> None:
        if found != wanted:
            msg = (
                f"{self.url}/{path} is damaged: it ends {wanted - found} bytes before "
                f"{start + wanted}"
            )
            raise CorruptObject(msg)

    reads_apart = True
    """Whether neighbouring pieces are read as fast one by one as with one call."""

    def read_scattered(self, path: str, start: int, targets: Sequence[memoryview]) -> None:
        """As :meth:`read_into`, into pieces of memory whose bytes follow each other in the object."""
        for target in targets:
            self.read_into(path, start, target)
            start += len(target)

    def create(self, path: str, data: bytes) -> bool:
        """Create the object only if there is none; whether *our* bytes are now there.

        A lost answer is safe: the retry finds an object, reads it back, and compares. So the
        caller puts something unique (a nonce) into ``data`` when it must know that it won.
        """
        if not data:
            msg = f"create({path!r}) needs at least one byte: an empty object proves no owner"
            raise ValueError(msg)
        return self._call("create", path, lambda full: self._create_or_compare(full, data))

    def exists(self, path: str) -> bool:
        """Whether there is an object (not only longer names below it) at ``path``."""
        try:
            self.size_bytes(path)
        except ObjectMissing:
            return False
        return True

    def size_bytes(self, path: str) -> int:
        """The size of the object."""
        return self._call("size", path, self._size_bytes)

    def list(self, prefix: str) -> list[str]:
        """Names directly below ``prefix``, sorted; empty when there is nothing."""
        try:
            return sorted(set(self._call("list", prefix, self._list)))
        except ObjectMissing:
            return []

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every object below ``prefix`` as (path relative to it, size in bytes), sorted."""
        try:
            yield from sorted(self._call("list", prefix, self._walk))
        except ObjectMissing:
            return

    def delete(self, path: str) -> None:
        """Remove the object; no error when there is none."""
        with contextlib.suppress(ObjectMissing):
            self._call("delete", path, self._delete)

    def delete_many(self, paths: Iterable[str]) -> None:
        """Remove objects, several at once; no error for those that are not there."""
        for path in paths:
            self.delete(path)

    def upload(self, local: Path, path: str) -> None:
        """Copy a local file to the object, replacing it. The object appears whole or not at all.

        Raises :class:`ObjectMissing` also when there is no such local file.
        """
        if not local.is_file():
            msg = f"cannot upload {local} to {self.url}/{path}: there is no such file here"
            raise ObjectMissing(msg, path=str(local))
        self._call("upload", path, lambda full: self._upload(local, full), tries=3)

    def download(self, path: str, local: Path) -> None:
        """Copy the object to a local file. The file appears whole or not at all."""
        local.parent.mkdir(parents=True, exist_ok=True)
        partial = local.with_name(f".{secrets.token_hex(8)}.partial")
        try:
            self._call("download", path, lambda full: self._download(full, partial), tries=3)
            partial.replace(local)
        finally:
            partial.unlink(missing_ok=True)

    def child(self, path: str) -> Storage:
        """The same storage, rooted at ``path`` below this one."""
        child = self._at(f"{self.url}/{safe_path(path)}", self._full(path))
        child.patience_s, child.keys = self.patience_s, self.keys
        return child

    def probe(self) -> None:
        """Prove by doing it that objects can be written, read, and created only if absent.

        Raises :class:`UnsupportedStorage` with what to change. Costs a few small calls and
        leaves no object behind.
        """
        path = f"probe/{secrets.token_hex(8)}"
        try:
            # S3 answers 403, not 404, for a missing object when s3:ListBucket is not granted.
            self.read_or_none(path)
            first = self.create(path, b"first")
            second = self.create(path, b"second")
        except StorageError as error:
            msg = (
                f"storage {self.url} cannot be used: {error}. Check that it exists and that these "
                "credentials may list, read, write and delete below it"
            )
            raise UnsupportedStorage(msg) from error
        finally:
            with contextlib.suppress(StorageError):
                self.delete(path)
        if not first or second:
            msg = (
                f"storage {self.url} ignores 'create only if absent' (If-None-Match: *), so two "
                "trainers could overwrite each other. Use AWS S3 or a server that honours it"
            )
            raise UnsupportedStorage(msg)

    # -- what differs: each gets a full name, and raises what its client raises -----------------

    @abstractmethod
    def _at(self, url: str, root: str) -> Storage: ...

    @abstractmethod
    def _read(self, full: str) -> bytes: ...

    @abstractmethod
    def _read_range(self, full: str, start: int, end: int) -> bytes: ...

    @abstractmethod
    def _write(self, full: str, data: bytes) -> None: ...

    def _write_from(self, full: str, data: memoryview) -> None:
        self._write(full, bytes(data))

    def _read_into(self, full: str, start: int, target: memoryview) -> int:
        """How many bytes there were."""
        data = self._read_range(full, start, start + len(target))
        target[: len(data)] = data
        return len(data)

    @abstractmethod
    def _create(self, full: str, data: bytes) -> None:
        """Create or raise :class:`FileExistsError`, atomically."""

    @abstractmethod
    def _size_bytes(self, full: str) -> int: ...

    @abstractmethod
    def _list(self, full: str) -> Iterable[str]: ...

    @abstractmethod
    def _walk(self, full: str) -> Iterable[tuple[str, int]]: ...

    @abstractmethod
    def _delete(self, full: str) -> None: ...

    @abstractmethod
    def _upload(self, local: Path, full: str) -> None: ...

    @abstractmethod
    def _download(self, full: str, local: Path) -> None: ...

    @abstractmethod
    def _translate(self, error: Exception, what: str) -> StorageError | None:
        """The error of ours that this one is; ``None`` for a bug, which is raised as it is.

        ``what`` is the call in words: ``read s3://b/p/x``.
        """

    # -- shared -------------------------------------------------------------------------------

    def _create_or_compare(self, full: str, data: bytes) -> bool:
        try:
            self._create(full, data)
        except FileExistsError:
            return self._read(full) == data
        return True

    def _full(self, path: str) -> str:
        return f"{self._root}/{safe_path(path)}" if self._root else safe_path(path)

    def _call(self, verb: str, path: str, action: Callable[[str], _T], *, tries: int = 1) -> _T:
        """``action`` on the full name, retried for ``patience_s`` and at least ``tries`` times.

        A long transfer that breaks late has used up its time: hence the number.
        """
        full = self._full(path) if path else self._root
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(StorageUnavailable),
            # No jitter: it would draw from the generator that the training script seeds.
            wait=tenacity.wait_exponential(multiplier=0.2, max=2.0),
            stop=tenacity.stop_all(
                tenacity.stop_after_delay(self.patience_s), tenacity.stop_after_attempt(tries)
            ),
            reraise=True,
        )
        result: _T = retrying(self._translated, verb, path, action, full)
        return result

    def _translated(self, verb: str, path: str, action: Callable[[str], _T], full: str) -> _T:
        try:
            return action(full)
        except StorageError:
            raise
        except Exception as error:
            ours = self._translate(error, f"{verb} {self.url}/{path}".rstrip("/"))
            if ours is None:
                raise
            ours.path = path
            raise ours from error


def missing(what: str) -> ObjectMissing:
    return ObjectMissing(f"cannot {what}: there is nothing there")


def denied(what: str, reason: object, advice: str, *, lasting: bool = False) -> StorageDenied:
    return StorageDenied(f"may not {what}: {reason}. {advice}", lasting=lasting)


def unavailable(what: str, error: Exception, advice: str = "") -> StorageUnavailable:
    detail = f"could not {what}: {type(error).__name__}: {error}"
    return StorageUnavailable(f"{detail}. {advice}" if advice else detail)
