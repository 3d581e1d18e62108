"""A storage whose answers get lost, and whose calls can be interleaved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from spotfirst.errors import StorageUnavailable
from spotfirst.storage import Storage, open_storage

_names = itertools.count()


def fresh() -> Storage:
    return open_storage(f"memory://faults-{next(_names)}")


class Lossy:
    """Passes calls on. ``fate()`` decides each ``create``: fine, refused, or applied and lost."""

    def __init__(self, inner: Storage, fate: Callable[[], str] = lambda: "fine") -> None:
        self._inner, self._fate = inner, fate
        self.url = inner.url

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create(self, path: str, data: bytes) -> bool:
        fate = self._fate()
        if fate == "refused":
            raise StorageUnavailable("not applied", path=path)
        result = self._inner.create(path, data)
        if fate == "lost":
            raise StorageUnavailable("applied, but the answer was lost", path=path)
        return result


def entries(storage: Storage, prefix: str) -> Iterator[bytes]:
    for name in storage.list(prefix):
        yield storage.read(f"{prefix}/{name}")
