"""One place for the files of all runs: any URL that can create an object only if it is absent.

Three kinds are supported, each with the guarantees that the rest of Spotfirst relies on: a read
sees a whole object or none, ``write`` replaces atomically, and of several concurrent ``create``
calls exactly one wins. Bytes are durable when a call returns.

================ ================================ =============================================
URL              ``create`` is                    for
================ ================================ =============================================
``s3://b/p``     PutObject, ``If-None-Match: *``  production
``/p, file:///p`` a hard link from a temporary    one machine, or a file system with hard links
``memory://p``   a lock in this process           tests
================ ================================ =============================================

S3 credentials and endpoint come from the environment (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL_S3``, …) or the instance's role, never from a spec.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import fsspec
import tenacity

from spotfirst.errors import (
    InvalidSpec,
    ObjectMissing,
    StorageDenied,
    StorageError,
    StorageUnavailable,
    UnsupportedStorage,
)

__all__ = ["Storage", "open_storage", "safe_path"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def safe_path(path: str) -> str:
    """``path`` when it stays below the prefix it is joined to; else :class:`InvalidSpec`.

    Every name that comes out of a file (manifest, chain entry, archive) passes through here
    before it is joined to a prefix.
    """
    pure = PurePosixPath(path)
    if not path or "\0" in path or "\\" in path or pure.is_absolute() or ".." in pure.parts:
        msg = f"path {path!r} would leave its prefix; use a relative path without '..'"
        raise InvalidSpec(msg)
    return str(pure)


def open_storage(url: str, *, options: Mapping[str, Any] | None = None) -> Storage:
    """The storage behind ``url``; ``options`` go to the fsspec filesystem (never into a spec).

    Opening is cheap and touches nothing: :meth:`Storage.probe` is what proves that it works.
    """
    protocol, _, rest = url.partition("://") if "://" in url else ("file", "", url)
    if protocol in {"file", "local"}:
        return _LocalStorage(
            url, fsspec.filesystem("file"), str(Path(rest).expanduser().absolute())
        )
    if protocol == "memory":
        return _MemoryStorage(url, fsspec.filesystem("memory"), "/" + rest.strip("/"))
    if protocol in {"s3", "s3a"}:
        if not rest.strip("/"):
            msg = f"storage {url!r} names no bucket; write it as s3://BUCKET/PREFIX"
            raise UnsupportedStorage(msg)
        # Listings must not be cached: other processes write beside us.
        settings = {"use_listings_cache": False, "skip_instance_cache": False, **(options or {})}
        return _S3Storage(url, fsspec.filesystem("s3", **settings), rest.strip("/"))
    msg = (
        f"storage {url!r}: {protocol}:// cannot create an object only if it is absent, which is "
        "what keeps two trainers apart. Use s3://BUCKET/PREFIX, or a local path"
    )
    raise UnsupportedStorage(msg)


class Storage:
    """Objects below one prefix. Paths are relative, with ``/``; methods are thread-safe.

    Calls raise :class:`ObjectMissing`, :class:`StorageDenied`, or, once ``patience_s`` of
    retries are over, :class:`StorageUnavailable`.
    """

    patience_s = 8.0

    def __init__(self, url: str, filesystem: Any, root: str) -> None:
        self.url = url.rstrip("/")
        self._fs = filesystem
        self._root = root.rstrip("/")

    def __repr__(self) -> str:
        return f"<Storage {self.url}>"

    # -- what every kind offers -------------------------------------------------------------

    def read(self, path: str) -> bytes:
        """The whole object."""
        return bytes(self._call("read", path, lambda full: self._fs.cat_file(full)))

    def read_range(self, path: str, start: int, end: int) -> bytes:
        """Bytes ``start`` to ``end`` (exclusive) of the object."""
        return bytes(
            self._call("read", path, lambda full: self._fs.cat_file(full, start=start, end=end))
        )

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        """Several small objects at once; one that is missing raises :class:`ObjectMissing`."""
        return {path: self.read(path) for path in paths}

    def read_or_none(self, path: str) -> bytes | None:
        """The whole object, or ``None`` when there is none."""
        try:
            return self.read(path)
        except ObjectMissing:
            return None

    def write(self, path: str, data: bytes) -> None:
        """Create or replace the object."""
        self._call("write", path, lambda full: self._fs.pipe_file(full, data))

    def create(self, path: str, data: bytes) -> bool:
        """Create the object only if there is none; whether *our* bytes are now there.

        A lost answer is safe: the retry finds an object, reads it back, and compares. So the
        caller puts something unique (a nonce) into ``data`` when it must know that it won.
        """
        if not data:
            msg = f"create({path!r}) needs at least one byte: an empty object proves no owner"
            raise ValueError(msg)
        return bool(self._call("create", path, lambda full: self._create_or_compare(full, data)))

    def exists(self, path: str) -> bool:
        return bool(self._call("look for", path, lambda full: self._fs.exists(full)))

    def size_bytes(self, path: str) -> int:
        return int(self._call("size", path, lambda full: self._fs.info(full))["size"])

    def list(self, prefix: str) -> list[str]:
        """Names directly below ``prefix``, sorted; empty when there is nothing."""
        try:
            found = self._call("list", prefix, lambda full: self._fs.ls(full, detail=False))
        except ObjectMissing:
            return []
        return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in found})

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Every object below ``prefix`` as (path relative to it, size in bytes), sorted."""
        try:
            found = self._call(
                "list", prefix, lambda full: (full, self._fs.find(full, detail=True))
            )
        except ObjectMissing:
            return
        full, entries = found
        base = self._fs._strip_protocol(full).rstrip("/") + "/"  # noqa: SLF001 - fsspec's own name form
        for name, info in sorted(entries.items()):
            yield str(name).removeprefix(base), int(info["size"])

    def delete(self, path: str) -> None:
        """Remove the object; no error when there is none."""
        with contextlib.suppress(ObjectMissing):
            self._call("delete", path, lambda full: self._fs.rm_file(full))

    def upload(self, local: Path, path: str) -> None:
        """Copy a local file to the object, replacing it."""
        self._call("upload", path, lambda full: self._fs.put_file(str(local), full))

    def download(self, path: str, local: Path) -> None:
        """Copy the object to a local file. The file appears whole or not at all."""
        partial = local.with_name(f".{local.name}.{secrets.token_hex(4)}.partial")
        try:
            self._call("download", path, lambda full: self._fs.get_file(full, str(partial)))
            partial.replace(local)
        finally:
            partial.unlink(missing_ok=True)

    def child(self, path: str) -> Storage:
        """The same storage, rooted at ``path`` below this one."""
        return type(self)(f"{self.url}/{safe_path(path)}", self._fs, self._full(path))

    def probe(self) -> None:
        """Prove by doing it that objects can be written, and created only if absent.

        Raises :class:`UnsupportedStorage` with what to change. Costs three small calls and
        leaves nothing behind.
        """
        path = f"probe/{secrets.token_hex(8)}"
        try:
            first = self.create(path, b"first")
            second = self.create(path, b"second")
        except StorageError as error:
            msg = (
                f"storage {self.url} cannot be used: {error}. Check that it exists and that these "
                "credentials may read, write and delete below it"
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

    # -- what differs -----------------------------------------------------------------------

    def _create(self, full: str, data: bytes) -> None:
        """Create or raise :class:`FileExistsError`, atomically."""
        self._fs.pipe_file(full, data, mode="create")

    def _create_or_compare(self, full: str, data: bytes) -> bool:
        try:
            self._create(full, data)
        except FileExistsError:
            return bytes(self._fs.cat_file(full)) == data
        return True

    def _full(self, path: str) -> str:
        return f"{self._root}/{safe_path(path)}"

    def _call(self, verb: str, path: str, action: Callable[[str], _T]) -> _T:
        full = self._full(path) if path else self._root
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(StorageUnavailable),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=2.0),
            stop=tenacity.stop_after_delay(self.patience_s),
            reraise=True,
        )
        result: _T = retrying(self._translated, verb, path, action, full)
        return result

    def _translated(self, verb: str, path: str, action: Callable[[str], _T], full: str) -> _T:
        where = f"{self.url}/{path}"
        try:
            return action(full)
        except (FileNotFoundError, NotADirectoryError) as error:
            msg = f"there is nothing at {where}"
            raise ObjectMissing(msg, path=path) from error
        except PermissionError as error:
            msg = f"may not {verb} {where}: {error}"
            raise StorageDenied(msg, path=path) from error
        except Exception as error:
            if not _is_transient(error):
                raise
            msg = f"could not {verb} {where}: {type(error).__name__}: {error}"
            raise StorageUnavailable(msg, path=path) from error


def _is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later. Full disks and dead networks both recover."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, (OSError, TimeoutError)) or module in {
        "aiobotocore",
        "aiohttp",
        "botocore",
    }


class _S3Storage(Storage):
    """S3 and its likes through s3fs, which retries by itself: hence the compare in create."""

    def read_many(self, paths: Iterable[str]) -> dict[str, bytes]:
        by_full = {self._full(path): path for path in paths}
        if not by_full:
            return {}
        found = self._call("read", "", lambda _: self._fs.cat(list(by_full), on_error="raise"))
        if isinstance(found, bytes):  # s3fs unwraps a list of one
            return {next(iter(by_full.values())): found}
        return {by_full[full]: bytes(data) for full, data in found.items()}


class _MemoryStorage(Storage):
    """fsspec's memory filesystem is one dictionary per process; a lock makes create atomic."""

    _lock = threading.Lock()

    def _create(self, full: str, data: bytes) -> None:
        with self._lock:
            if self._fs.exists(full):
                raise FileExistsError(full)
            self._fs.pipe_file(full, data)


class _LocalStorage(Storage):
    """Files. fsspec writes them in place, so a reader could see half of one: we link and rename."""

    def write(self, path: str, data: bytes) -> None:
        def replace(full: str) -> None:
            with _staged(Path(full), data) as temporary:
                temporary.replace(full)

        self._call("write", path, replace)

    def upload(self, local: Path, path: str) -> None:
        def copy(full: str) -> None:
            partial = Path(full).with_name(f".{secrets.token_hex(8)}.partial")
            partial.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fs.cp_file(str(local), str(partial))
                partial.replace(full)
            finally:
                partial.unlink(missing_ok=True)

        self._call("upload", path, copy)

    def list(self, prefix: str) -> list[str]:
        return [name for name in super().list(prefix) if not name.endswith(".partial")]

    def walk(self, prefix: str) -> Iterator[tuple[str, int]]:
        return (entry for entry in super().walk(prefix) if not entry[0].endswith(".partial"))

    def _create(self, full: str, data: bytes) -> None:
        with _staged(Path(full), data) as temporary:
            os.link(temporary, full)  # fails when the name exists: the exclusive step


@contextlib.contextmanager
def _staged(target: Path, data: bytes) -> Iterator[Path]:
    """A durable temporary file with ``data``, beside ``target``, gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
