"""Objects in this process's memory, for tests. All storages of one process share them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from spotfirst.errors import StorageError
from spotfirst.storage import Storage, missing

__all__ = ["MemoryStorage"]

_objects: dict[str, bytes] = {}
_lock = threading.Lock()


class MemoryStorage(Storage):
    """A dictionary; a lock makes ``create`` atomic."""

    def _at(self, url: str, root: str) -> Storage:
        return MemoryStorage(url, root)

    def _read(self, full: str) -> bytes:
        return _objects[full]

    def _read_range(self, full: str, start: int, end: int) -> bytes:
        return _objects[full][start:end]

    def _write(self, full: str, data: bytes) -> None:
        with _lock:
            _objects[full] = bytes(data)

    def _create(self, full: str, data: bytes) -> None:
        with _lock:
            if full in _objects:
                raise FileExistsError(full)
            _objects[full] = bytes(data)

    def _size_bytes(self, full: str) -> int:
        return len(_objects[full])

    def _list(self, full: str) -> Iterable[str]:
        return [name.partition("/")[0] for name, _ in self._walk(full)]

    def _walk(self, full: str) -> Iterable[tuple[str, int]]:
        start = f"{full}/" if full else ""
        with _lock:
            return [
                (name.removeprefix(start), len(data))
                for name, data in _objects.items()
                if name.startswith(start)
            ]

    def _delete(self, full: str) -> None:
        with _lock:
            _objects.pop(full, None)

    def _upload(self, local: Path, full: str) -> None:
        self._write(full, local.read_bytes())

    def _download(self, full: str, local: Path) -> None:
        local.write_bytes(self._read(full))

    def _translate(self, error: Exception, what: str) -> StorageError | None:
        return missing(what) if isinstance(error, KeyError) else None
