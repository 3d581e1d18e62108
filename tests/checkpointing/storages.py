"""Real storages that are made to fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

from spotfirst.errors import StorageUnavailable
from spotfirst.storage import Storage

Hook = Callable[[str, str], None]


class _Faulty:
    """Passes every call on; ``before`` and ``after`` see its name and path, and may raise."""

    def __init__(self, inner: Storage, before: Hook, after: Hook) -> None:
        self._inner = inner
        self._before = before
        self._after = after

    def child(self, path: str) -> Storage:
        return faulty(self._inner.child(path), before=self._before, after=self._after)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._inner, name)
        if not callable(method):
            return method

        def call(path: str, *rest: Any, **options: Any) -> Any:
            self._before(name, path)
            result = method(path, *rest, **options)
            self._after(name, path)
            return result

        return call


def faulty(
    storage: Storage, *, before: Hook = lambda *_: None, after: Hook = lambda *_: None
) -> Storage:
    return cast("Storage", _Faulty(storage, before, after))


class Outage:
    """Nothing answers between :meth:`begin` and :meth:`end`."""

    def __init__(self) -> None:
        self._up = threading.Event()
        self._up.set()

    def over(self, storage: Storage) -> Storage:
        return faulty(storage, before=self._check)

    def begin(self) -> None:
        self._up.clear()

    def end(self) -> None:
        self._up.set()

    def wait(self) -> None:
        assert self._up.wait(120), "the outage never ended"

    def _check(self, verb: str, path: str) -> None:
        if not self._up.is_set():
            msg = f"cannot {verb} {path}: no answer"
            raise StorageUnavailable(msg, path=path)
