"""A thread that listens to one queue for as long as this process looks after runs.

It waits inside SQS (a long poll), so a message is handled within moments, at three calls a minute
while there is none. A process that does not come back, such as one command on a command line,
never starts it: it would take messages with it when it ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from spotfirst.errors import FleetError

__all__ = ["Listener"]

_T = TypeVar("_T")
_R = TypeVar("_R")

_log = logging.getLogger(__name__)

LONG_POLL_S = 20.0
IDLE_S = 120.0
"""How long after the last look at an instance it listens."""
_AT_ONCE = 16
"""Messages that are handled at the same time: each waits for the storage, not for a core. When
AWS takes back many instances at once, the last of them has its two minutes as well."""
_LONGEST_PAUSE_S = 60.0
_EMPTY_PAUSE_S = 0.2


class Listener:
    """Calls ``poll(wait_s)`` again and again from its own thread, while it is heeded.

    ``poll`` returns how many messages there were.
    """

    def __init__(
        self,
        poll: Callable[[float], int],
        *,
        name: str = "",
        long_poll_s: float = LONG_POLL_S,
        idle_s: float = IDLE_S,
    ) -> None:
        self._poll = poll
        self._name = name
        self._long_poll_s = long_poll_s
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._heeded_at = 0.0
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()
        self._pool: ThreadPoolExecutor | None = None

    def heed(self) -> None:
        """Someone cares: listen, from now on and for ``idle_s`` at least."""
        with self._lock:
            self._heeded_at = time.monotonic()
            if self._thread is None and not self._stopped.is_set():
                self._thread = threading.Thread(
                    target=self._listen, name="spotfirst-notices", daemon=True
                )
                self._thread.start()

    def stop(self) -> None:
        """Listen no more; what is being received is still handled."""
        self._stopped.set()

    @property
    def is_listening(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None

    def map(self, handle: Callable[[_T], _R], items: Iterable[_T]) -> Iterator[_R]:
        """Like the builtin, many at once."""
        return self._workers().map(handle, items)

    def submit(self, action: Callable[..., object], *arguments: Any) -> Future[object]:
        """Do something without making the queue wait for it."""
        return self._workers().submit(action, *arguments)

    def _workers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="spotfirst-notice")
            return self._pool

    def _listen(self) -> None:
        failures = 0
        while self._is_wanted():
            began = time.monotonic()
            try:
                received = self._poll(self._long_poll_s)
            except Exception as error:  # noqa: BLE001 - a thread that ends says nothing
                if not threading.main_thread().is_alive():
                    return  # the process ends, and its pools are closed
                failures += 1
                pause_s = min(_LONGEST_PAUSE_S, 2.0**failures)
                _log.warning(
                    "Cannot receive from %s; trying again in %.0f s. Until then, instances and "
                    "EC2 itself say what happens. %s: %s",
                    self._name, pause_s, type(error).__name__, error,
                    exc_info=not isinstance(error, FleetError),
                )  # fmt: skip
                self._stopped.wait(pause_s)
            else:
                failures = 0
                if not received and time.monotonic() - began < _EMPTY_PAUSE_S:
                    self._stopped.wait(_EMPTY_PAUSE_S)  # a queue that does not wait

    def _is_wanted(self) -> bool:
        """Whether to go on. Once it says no, the next :meth:`heed` starts another thread."""
        with self._lock:
            idle = time.monotonic() - self._heeded_at > self._idle_s
            if idle or self._stopped.is_set():
                self._thread = None
                return False
            return True
