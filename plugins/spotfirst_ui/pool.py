"""Threads of the pages' own, so that a storage that hangs takes none of Airflow's.

Starlette runs what is not async in one pool of threads for the whole API server, Airflow's health
included. A page may wait for a storage for as long as that likes, so pages have a few threads to
themselves, a queue with an end, and a time after which the reader gets an answer in any case.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["Busy", "PagePool", "TooSlow"]

_T = TypeVar("_T")


class Busy(Exception):
    """All threads are taken, and the queue is full."""


class TooSlow(Exception):
    """The page was not ready in time. Its thread is free once the storage has answered."""


class PagePool:
    """Makes at most ``threads`` pages at a time, and lets ``waiting`` more wait for a thread."""

    def __init__(self, *, threads: int = 8, waiting: int = 32, patience_s: float = 20.0) -> None:
        self._threads = threads
        self._most = threads + waiting
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._taken = 0
        self._started = 0
        # A SimpleQueue and daemon threads: an API server that ends waits for no storage.
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()

    async def run(self, action: Callable[[], _T]) -> _T:
        """What ``action`` returns, or raises. Raises :class:`Busy` and :class:`TooSlow`."""
        future: Future[_T] = Future()
        with self._lock:
            if self._taken >= self._most:
                raise Busy
            self._taken += 1
            if self._started < min(self._threads, self._taken):
                self._started += 1
                threading.Thread(target=self._serve, name="spotfirst-page", daemon=True).start()
        self._work.put((future, action))
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._patience_s)
        except asyncio.TimeoutError:
            if future.done() and not future.cancelled():
                return future.result()  # just now, or the page's own error
            raise TooSlow from None

    def _serve(self) -> None:
        while True:
            future, action = self._work.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(action())
                except BaseException as error:  # noqa: BLE001 - it belongs to the page
                    future.set_exception(error)
            del future, action
            with self._lock:
                self._taken -= 1
