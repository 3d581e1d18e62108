"""An append-only sequence of small objects, ``00000001.json`` …, written by racing writers.

Entry n exists once, because it is created only if absent. That is the only lock in Spotfirst:
both the journal of a run and its checkpoint chain are such sequences.
"""

from __future__ import annotations

import re

from spotfirst.storage import Storage

__all__ = ["Sequence"]

_ENTRY = re.compile(r"(\d{8})\.json")


class Sequence:
    """A reader's and writer's view of one sequence; it remembers how far it has read."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
        self._prefix = prefix
        self.length = 0
        """Entries that :meth:`read_new` has returned so far."""

    def path(self, number: int) -> str:
        return f"{self._prefix}/{number:08d}.json"

    def read_new(self) -> list[tuple[str, bytes]]:
        """Entries beyond those read before, in order, as (path, bytes).

        The first read lists; later ones only probe for the next entry: one small call when
        nothing is new.
        """
        found: list[tuple[str, bytes]] = []
        if self.length == 0:
            numbers = {
                int(match[1])
                for name in self._storage.list(self._prefix)
                if (match := _ENTRY.fullmatch(name))
            }
            count = next(n for n in range(len(numbers) + 1) if n + 1 not in numbers)
            paths = [self.path(number) for number in range(1, count + 1)]
            entries = self._storage.read_many(paths)
            found = [(path, entries[path]) for path in paths]
        while (
            data := self._storage.read_or_none(self.path(self.length + len(found) + 1))
        ) is not None:
            found.append((self.path(self.length + len(found) + 1), data))
        self.length += len(found)
        return found

    def append(self, data: bytes) -> bool:
        """Write ``data`` as the entry after the last one read; whether it is ours.

        ``data`` carries a nonce, so an append whose answer was lost still counts as ours. On
        success the entry counts as read.
        """
        won = self._storage.create(self.path(self.length + 1), data)
        if won:
            self.length += 1
        return won
