"""An append-only sequence of small objects, ``00000001.json`` …, written by racing writers.

Entry n exists once, because it is created only if absent. That is the only lock in Spotfirst:
both the journal of a run and its checkpoint chain are such sequences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from spotfirst.errors import CorruptObject
from spotfirst.storage import Storage
from spotfirst.wire import LIMIT_BYTES

__all__ = ["Sequence"]

MOST_BYTES = 256 << 20
"""Of all entries of a sequence together: readers keep what is in them."""
_AT_ONCE = 64
_ENTRY = re.compile(r"(\d{8})\.json")


class Sequence:
    """A reader's and writer's view of one sequence; it remembers how far it has read."""

    def __init__(self, storage: Storage, prefix: str) -> None:
        self._storage = storage
        self._prefix = prefix
        self.length = 0
        """Entries that were read, or appended here, so far."""
        self._read_bytes = 0

    def path(self, number: int) -> str:
        """The name of entry ``number``, from 1 on."""
        return f"{self._prefix}/{number:08d}.json"

    def unread(self) -> Iterator[tuple[str, bytes]]:
        """Entries beyond those read before, in order, as (path, bytes).

        An entry counts as read once the caller asks for the one after it, so one that the caller
        cannot understand comes again at the next call instead of being skipped. The first read
        lists; later ones only probe for the next entry: one small call when nothing is new.
        """
        count = 0
        if self.length == 0:
            numbers = {
                int(match[1])
                for name in self._storage.list(self._prefix)
                if (match := _ENTRY.fullmatch(name))
            }
            # Up to a gap: a listing may be older than an entry that it shows none of.
            count = next(n for n in range(len(numbers) + 1) if n + 1 not in numbers)
        known: dict[str, bytes] = {}
        while True:
            number = self.length + 1
            path = self.path(number)
            if number <= count and path not in known:
                # Some at a time: whoever writes them may write large ones.
                last = min(count, self.length + _AT_ONCE)
                wanted = [self.path(n) for n in range(number, last + 1)]
                known = self._storage.read_many(wanted, limit_bytes=LIMIT_BYTES)
            data = known.pop(path, None)
            if data is None:
                data = self._storage.read_or_none(path, limit_bytes=LIMIT_BYTES)
            if data is None:
                return
            if self._read_bytes + len(data) > MOST_BYTES:
                msg = (
                    f"{self._storage.url}/{path}: with it, the entries there have more than "
                    f"{MOST_BYTES} bytes, which Spotfirst never writes. Something else wrote them: "
                    "look at them, and remove the run"
                )
                raise CorruptObject(msg)
            yield path, data
            self.length += 1
            self._read_bytes += len(data)

    def read_new(self) -> list[tuple[str, bytes]]:
        """All of :meth:`unread` at once. When that fails half-way, none of it counts as read."""
        before = self.length, self._read_bytes
        try:
            return list(self.unread())
        except BaseException:
            self.length, self._read_bytes = before
            raise

    def append(self, data: bytes) -> bool:
        """Write ``data`` as the entry after the last one read; whether it is ours.

        ``data`` carries a nonce, so an append whose answer was lost still counts as ours. On
        success the entry counts as read.
        """
        won = self._storage.create(self.path(self.length + 1), data)
        if won:
            self.length += 1
        return won
