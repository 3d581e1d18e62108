"""The storage in memory, without what retries: its faults are injected above it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from spotfirst._storage_memory import MemoryStorage
from spotfirst.storage import Storage

_T = TypeVar("_T")


class QuickMemory(MemoryStorage):
    """Shares its objects with ``open_storage("memory://…")``."""

    def _at(self, url: str, root: str) -> Storage:
        return QuickMemory(url, root)

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _call(self, verb: str, path: str, action: Callable[[str], _T], *, tries: int = 1) -> _T:
        return self._translated(verb, path, action, self._full(path) if path else self._root)
