"""The storage in memory, without what retries: its faults are injected above it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TypeVar

from spotfirst._storage_memory import MemoryStorage
from spotfirst.storage import Storage
from spotfirst.wire import Clock

_T = TypeVar("_T")


class QuickMemory(MemoryStorage):
    """Shares its objects with ``open_storage("memory://…")``.

    ``created_at`` says when each object that was created only if absent came to be, truly: what a
    process writes carries the time at which it began to look.
    """

    def __init__(self, url: str, root: str, clock: Clock, created_at: dict[str, datetime]) -> None:
        super().__init__(url, root)
        self.clock, self.created_at = clock, created_at

    def _at(self, url: str, root: str) -> Storage:
        return QuickMemory(url, root, self.clock, self.created_at)

    def _create(self, full: str, data: bytes) -> None:
        super()._create(full, data)
        self.created_at[full.rpartition("/runs/")[2]] = self.clock()

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _call(self, verb: str, path: str, action: Callable[[str], _T], *, tries: int = 1) -> _T:
        return self._translated(verb, path, action, self._full(path) if path else self._root)
