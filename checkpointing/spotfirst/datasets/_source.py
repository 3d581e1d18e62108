"""Where the files of a commit come from: a local folder, or a prefix of any fsspec store."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import fsspec

from spotfirst.datasets._keys import check_key
from spotfirst.errors import InvalidSpec, StorageUnavailable

__all__ = ["Found", "Source", "SourceChanged", "open_source", "readable"]

_SETTLED = timedelta(seconds=2)  # the coarsest file times in use, those of FAT


class SourceChanged(Exception):
    """A file changed between being listed, hashed and sent."""


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Name ``what`` in errors of reading it.

    Raises :class:`SourceChanged` for what is gone or has changed, :class:`InvalidSpec` for what
    may not be read, and :class:`StorageUnavailable` for what did not answer.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise SourceChanged(what) from error
    except PermissionError as error:
        msg = f"{what} may not be read: {error}. Change its owner or mode, or leave it out"
        raise InvalidSpec(msg) from error
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise  # of the disk that it is copied to
        if type(error).__name__ == "FileExpired":  # s3fs's, for an object that was replaced
            raise SourceChanged(what) from error
        msg = f"{what} cannot be read: {type(error).__name__}: {error}"
        raise StorageUnavailable(msg) from error


class Found(NamedTuple):
    """A file as a listing shows it. Same ``fingerprint`` and size: same bytes, unless empty."""

    key: str
    size: int
    fingerprint: str
    executable: bool = False


class Source(Protocol):
    """Files below one place. ``name`` says which, for messages and for the cache."""

    name: str

    def scan(self) -> list[Found]: ...

    def open(self, key: str) -> BinaryIO: ...

    def fingerprint_of(self, file: BinaryIO) -> str | None:
        """The fingerprint of an open file; ``None`` when only a listing tells."""


def open_source(source: Path | str, now: datetime, *, left_out: Collection[str] = ()) -> Source:
    """The files at ``source`` without those at the URLs or paths ``left_out``.

    Raises :class:`InvalidSpec` when there is nothing.
    """
    if isinstance(source, Path) or "://" not in source or source.startswith("file://"):
        folder = Path(str(source).removeprefix("file://")).expanduser().absolute()
        if not folder.is_dir():
            raise InvalidSpec(f"{folder} is not a folder, so it cannot be committed as a dataset")
        return _Folder(folder, now, [_path(url) for url in left_out if _path(url)])
    return _Prefix(source, left_out)


def _path(url: str) -> str:
    """The local path that a URL means; empty for another store."""
    return "" if "://" in url and not url.startswith("file://") else url.removeprefix("file://")


class _Folder:
    """A local folder. Links are followed, empty folders are not part of a dataset."""

    def __init__(self, folder: Path, now: datetime, left_out: Sequence[str]) -> None:
        self.name = str(folder)
        self._left_out = left_out
        self._folder = folder
        self._settled_ns = int((now - _SETTLED).timestamp() * 1e9)

    def scan(self) -> list[Found]:
        left_out = {identity for path in self._left_out for identity in _identity(path)}
        if left_out.intersection(_identity(self.name)):
            raise InvalidSpec(
                f"{self.name} is the storage itself, or its cache; give another folder"
            )
        with readable(self.name):
            found = list(self._below(self.name, "", (), left_out))
        found.sort()
        return found

    def open(self, key: str) -> BinaryIO:
        return (self._folder / key).open("rb")

    def fingerprint_of(self, file: BinaryIO) -> str | None:
        return self._fingerprint(os.fstat(file.fileno()))

    def _below(
        self,
        folder: str,
        prefix: str,
        above: tuple[tuple[int, int], ...],
        left_out: Collection[tuple[int, int]],
    ) -> Iterator[Found]:
        here = Path(folder).stat()
        if (here.st_dev, here.st_ino) in left_out:
            return
        if (here.st_dev, here.st_ino) in above:
            raise InvalidSpec(f"{folder} links back to a folder above it; remove the link")
        above = (*above, (here.st_dev, here.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                key = prefix + entry.name
                if entry.is_dir():
                    yield from self._below(entry.path, f"{key}/", above, left_out)
                elif entry.is_file():
                    stat = entry.stat()
                    executable = bool(stat.st_mode & 0o100)
                    fingerprint = self._fingerprint(stat)
                    yield Found(check_key(key), stat.st_size, fingerprint, executable)
                else:
                    raise InvalidSpec(
                        f"{entry.path} is neither a file nor a folder (a broken link?); remove it"
                    )

    def _fingerprint(self, stat: os.stat_result) -> str:
        """Empty while the file is so young that an edit might not change its times."""
        if max(stat.st_mtime_ns, stat.st_ctime_ns) > self._settled_ns:
            return ""
        return f"{stat.st_mtime_ns}.{stat.st_ctime_ns}.{stat.st_ino}.{stat.st_dev}"


class _Prefix:
    """Objects of another store. Only an ETag proves that one is unchanged."""

    def __init__(self, url: str, left_out: Collection[str]) -> None:
        self.name = url.rstrip("/")
        base = f"{_plain(self.name)}/"
        self._left_out = tuple(
            f"{_plain(other).removeprefix(base)}/"
            for other in left_out
            if _plain(other).startswith(base)
        )
        self._fs, self._root = fsspec.core.url_to_fs(url)

    def scan(self) -> list[Found]:
        base = self._root.rstrip("/") + "/"
        self._fs.invalidate_cache()  # of listings: others write there too
        with readable(self.name):
            try:
                listed = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                listed = {}
        found = [
            Found(check_key(name.removeprefix(base)), int(info["size"]), _etag(info))
            for name, info in listed.items()
            if name.startswith(base)
            and not name.endswith("/")
            and not name.removeprefix(base).startswith(self._left_out or ("/",))
        ]
        if not found:
            raise InvalidSpec(f"there are no files below {self.name}; nothing to commit")
        found.sort()
        return found

    def open(self, key: str) -> BinaryIO:
        file: BinaryIO = self._fs.open(f"{self._root.rstrip('/')}/{key}", "rb")
        return file

    def fingerprint_of(self, file: BinaryIO) -> str | None:  # noqa: ARG002 - the protocol's
        return None


def _etag(info: dict[str, Any]) -> str:
    return str(info.get("ETag") or info.get("etag") or "")


def _identity(path: str) -> list[tuple[int, int]]:
    """Device and inode of a folder; none where there is no such folder."""
    try:
        found = Path(path).stat()
    except OSError:
        return []
    return [(found.st_dev, found.st_ino)]


def _plain(url: str) -> str:
    """A store's URL in one form."""
    return url.rstrip("/").replace("s3a://", "s3://", 1)
