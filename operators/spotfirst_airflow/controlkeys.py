"""With which key this process signs in which storage.

A fleet and its notices open the storage that an instance's tags name. They know how to reach it,
and no connection: the key is the one with which this process has opened that storage before. It is
not in their environment, since that is what instances are given.
"""

from __future__ import annotations

from spotfirst.signing import ControlKeys
from spotfirst.storage import Storage

__all__ = ["with_keys", "with_known_keys"]

_by_url: dict[str, ControlKeys | None] = {}


def with_keys(storage: Storage, keys: ControlKeys | None) -> Storage:
    """The storage with these keys (``None``: the process's own), which are remembered for it."""
    storage.keys = _by_url[storage.url] = keys
    return storage


def with_known_keys(storage: Storage) -> Storage:
    """The storage with the keys that this process has used for it, if any."""
    storage.keys = _by_url.get(storage.url)
    return storage
