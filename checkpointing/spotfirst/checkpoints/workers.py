"""Threads for hashing and writing, beside the training."""

from __future__ import annotations

import itertools
import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias, TypeVar

__all__ = ["Workers", "when_all_done"]

_T = TypeVar("_T")

_LOOK_S = 5.0
"""How often idle threads look whether they are still wanted."""


_Tasks: TypeAlias = "queue.PriorityQueue[tuple[int, int, Any]]"


class Workers:
    """A few daemon threads: a storage that does not answer must not keep a dead script alive.

    (The threads of :mod:`concurrent.futures` are waited for when Python ends.) A task of a lower
    ``priority`` number goes first. Once the object is gone, they do what is left, and end.
    """

    def __init__(self, count: int, name: str) -> None:
        self._tasks: _Tasks = queue.PriorityQueue()
        self._number = itertools.count()
        gone: list[bool] = []
        for index in range(count):
            threading.Thread(
                target=_work, args=(self._tasks, gone), name=f"{name}-{index}", daemon=True
            ).start()
        # No lock is taken in it: the garbage collector may run it while a thread holds the queue's.
        weakref.finalize(self, gone.append, True).atexit = False

    def submit(self, action: Callable[[], _T], *, priority: int = 0) -> Future[_T]:
        """What ``action`` will return or raise."""
        future: Future[_T] = Future()
        self._tasks.put((priority, next(self._number), (future, action)))
        return future


def _work(tasks: _Tasks, gone: list[bool]) -> None:
    while True:
        try:
            _, _, (future, action) = tasks.get(timeout=_LOOK_S)
        except queue.Empty:
            if gone:
                return
            continue
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(action())
        except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(error)
        del future, action  # they hold memory


def when_all_done(tasks: Sequence[Future[Any]], action: Callable[[], None]) -> None:
    """Call ``action`` once, when all of them are done, whatever came of them."""
    left = set(tasks)
    lock = threading.Lock()

    def done(task: Future[Any]) -> None:
        with lock:
            left.discard(task)
            is_last = not left
        if is_last:
            action()

    for task in tasks:
        task.add_done_callback(done)
