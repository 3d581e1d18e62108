"""The journal of a run: whoever appends event n + 1 has decided.

Each event is signed together with the signature of the one before it, so an event cannot be
changed, replaced, moved or left out. See :mod:`spotfirst.signing`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

import msgspec

from spotfirst.errors import InvalidSpec, LostRace
from spotfirst.events import Event, decode_event, encode_event
from spotfirst.sequence import Sequence
from spotfirst.signing import Seal, default_keys
from spotfirst.state import RunState
from spotfirst.storage import Storage
from spotfirst.wire import LIMIT_BYTES

__all__ = ["Journal"]


class Journal:
    """Reads, folds and appends. One object per process and run; not shared between threads."""

    def __init__(
        self,
        storage: Storage,
        prefix: str = "journal",
        *,
        by: str = "",
        seal: Seal | None = None,
    ) -> None:
        self._entries = Sequence(storage, prefix)
        self._seal = seal or Seal(storage.keys or default_keys(), "", storage.url)
        self._mac = ""
        self._by = by
        self._url = storage.url
        self.state = RunState()
        """The fold of what has been read so far."""
        self.events: list[Event] = []
        """What has been read so far, in order."""

    def refresh(self) -> RunState:
        """Read what is new, and fold it.

        Raises :class:`CorruptObject` or :class:`NewerFormat` at an entry that cannot be read,
        each time: a state that leaves out an event is no state to decide on. So does an event that
        no controller signed (:class:`UntrustedObject`).
        """
        for path, data in self._entries.unread():
            body, mac = self._seal.open(data, path=path, after=self._mac)
            self._take(decode_event(body, path=f"{self._url}/{path}"), mac)
        return self.state

    def append(self, event: Event) -> RunState:
        """Append on top of what has been read; the state with the event.

        Raises :class:`LostRace` when another writer was first: refresh, and decide again.
        After :class:`StorageUnavailable` the event may or may not be there: refresh tells.
        """
        if self._by and not event.by:
            event = msgspec.structs.replace(event, by=self._by)
        path = self._entries.path(self._entries.length + 1)
        body = encode_event(event, nonce=secrets.token_hex(8))
        # As every other reader will see it; and never one in their way that they cannot read.
        event = decode_event(body, path=f"{self._url}/{path}")
        data, mac = self._seal.close(body, path=path, after=self._mac)
        if len(data) > LIMIT_BYTES:
            msg = (
                f"{self._url}/{path} would have {len(data)} bytes, more than the {LIMIT_BYTES} that "
                "readers take; shorten its message"
            )
            raise InvalidSpec(msg)
        if not self._entries.append(data):
            msg = f"{self._url}/{path} was decided by another controller: refresh, and decide again"
            raise LostRace(msg)
        self._take(event, mac)
        return self.state

    def decide(self, choose: Callable[[RunState], Event | None], *, tries: int = 100) -> RunState:
        """Append what ``choose`` returns for the newest state, again after each lost race.

        ``choose`` returns ``None`` when nothing is to be appended (any more).
        """
        for _ in range(tries):
            event = choose(self.refresh())
            if event is None:
                return self.state
            try:
                return self.append(event)
            except LostRace:
                continue
        msg = (
            f"lost {tries} races in a row for {self._url}/{self._entries.path(self._entries.length + 1)}: "
            "another controller writes without end; stop it (its name is in the events' `by`)"
        )
        raise LostRace(msg)

    def _take(self, event: Event, mac: str) -> None:
        self._mac = mac
        self.state = self.state.apply(event)
        self.events.append(event)
