"""Cuts a wait short when something has happened to a run that this process looks after.

Whoever looks after a run hangs up a :class:`Bell` for as long as it does, and waits with it.
Whoever learns of something rings: from any thread, and whether or not anyone listens. A ring
while nobody waits is kept for the next wait, so none falls between two looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable

__all__ = ["Bell", "ring"]

_bells: weakref.WeakSet[Bell] = weakref.WeakSet()
_lock = threading.Lock()


class Bell:
    """One waiter for one run. It hangs as long as someone holds it."""

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._rung = threading.Event()
        self._wake: Callable[[], object] | None = None
        with _lock:
            _bells.add(self)

    def wait(self, wait_s: float) -> None:
        """Block for so long, or until it rings."""
        self._rung.wait(wait_s)
        self._rung.clear()

    async def sleep(self, wait_s: float) -> None:
        """The same in an event loop."""
        loop = asyncio.get_running_loop()
        # Not asyncio.wait_for: up to Python 3.11 it loses a cancellation that meets a ring.
        over = loop.create_future()

        def finish() -> None:
            if not over.done():
                over.set_result(None)

        timer = loop.call_later(wait_s, finish)
        self._wake = lambda: loop.call_soon_threadsafe(finish)
        if self._rung.is_set():  # after _wake is there, so that a ring meets one or the other
            finish()
        try:
            await over
        finally:
            self._wake = None
            timer.cancel()
        self._rung.clear()

    def ring(self) -> None:
        """End the wait now, or the next one at once."""
        self._rung.set()
        wake = self._wake
        if wake is not None:
            with contextlib.suppress(RuntimeError):  # its loop has closed
                wake()


def ring(run_id: str) -> bool:
    """Wake all who wait for this run; whether this process has any.

    Ids are unique in one storage only. A run of the same name elsewhere is looked at once more.
    """
    with _lock:
        bells = [bell for bell in _bells if bell.run_id == run_id]
    for bell in bells:
        bell.ring()
    return bool(bells)


def _leave_to_parent() -> None:
    """A forked child has none of its parent's waiters, and perhaps a lock that is held for ever."""
    global _bells, _lock
    _bells, _lock = weakref.WeakSet(), threading.Lock()


os.register_at_fork(after_in_child=_leave_to_parent)
