"""Where the files of a commit come from: a local folder, or a prefix of any fsspec store."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import fsspec

from spotfirst.datasets._keys import check_key
from spotfirst.errors import InvalidSpec

__all__ = ["Found", "Source", "open_source"]

_SETTLED = timedelta(seconds=2)  # the coarsest file times in use, those of FAT


class Found(NamedTuple):
    """A file as a listing shows it. Same ``fingerprint`` and size: same bytes, unless empty."""

    key: str
    size: int
    fingerprint: str


class Source(Protocol):
    """Files below one place. ``name`` says which, for messages and for the cache."""

    name: str

    def scan(self) -> list[Found]: ...

    def open(self, key: str) -> BinaryIO: ...

    def fingerprint_of(self, file: BinaryIO) -> str | None:
        """The fingerprint of an open file; ``None`` when only a listing tells."""


def open_source(source: Path | str, now: datetime) -> Source:
    """Raises :class:`InvalidSpec` when there is nothing at ``source``."""
    if isinstance(source, Path) or "://" not in source or source.startswith("file://"):
        folder = Path(str(source).removeprefix("file://")).expanduser().absolute()
        if not folder.is_dir():
            raise InvalidSpec(f"{folder} is not a folder, so it cannot be committed as a dataset")
        return _Folder(folder, now)
    return _Prefix(source)


class _Folder:
    """A local folder. Links are followed, empty folders are not part of a dataset."""

    def __init__(self, folder: Path, now: datetime) -> None:
        self.name = str(folder)
        self._folder = folder
        self._settled_ns = int((now - _SETTLED).timestamp() * 1e9)

    def scan(self) -> list[Found]:
        found = list(self._below(self.name, "", ()))
        found.sort()
        return found

    def open(self, key: str) -> BinaryIO:
        return (self._folder / key).open("rb")

    def fingerprint_of(self, file: BinaryIO) -> str | None:
        return self._fingerprint(os.fstat(file.fileno()))

    def _below(
        self, folder: str, prefix: str, above: tuple[tuple[int, int], ...]
    ) -> Iterator[Found]:
        here = Path(folder).stat()
        if (here.st_dev, here.st_ino) in above:
            raise InvalidSpec(f"{folder} links back to a folder above it; remove the link")
        above = (*above, (here.st_dev, here.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                key = prefix + entry.name
                if entry.is_dir():
                    yield from self._below(entry.path, f"{key}/", above)
                elif entry.is_file():
                    stat = entry.stat()
                    yield Found(check_key(key), stat.st_size, self._fingerprint(stat))
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

    def __init__(self, url: str) -> None:
        self.name = url.rstrip("/")
        self._fs, self._root = fsspec.core.url_to_fs(url)

    def scan(self) -> list[Found]:
        base = self._root.rstrip("/") + "/"
        self._fs.invalidate_cache()  # of listings: others write there too
        try:
            listed = self._fs.find(self._root, detail=True)
        except FileNotFoundError:
            listed = {}
        found = [
            Found(check_key(name.removeprefix(base)), int(info["size"]), _etag(info))
            for name, info in listed.items()
            if name.startswith(base) and not name.endswith("/")
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
