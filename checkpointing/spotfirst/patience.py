"""Waiting for a storage that does not answer, or refuses: as long as it takes, and saying so."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable
from typing import TypeVar

from spotfirst.errors import SpotfirstError, StorageDenied, StorageUnavailable

__all__ = ["DENIED_S", "Sleep", "once_taken", "patiently"]

Sleep = Callable[[float], None]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Its own: a draw from the global generator would change what a training script draws from it.
_jitter = random.Random()

DENIED_S = 600.0
"""How long to wait for a storage that refuses before anything shows that it ever did otherwise: a
role may be known everywhere only after minutes, and one that lacks a permission never is."""
_FIRST_S = 0.2
_LONGEST_S = 15.0


def patiently(
    action: Callable[[], _T],
    *,
    what: str,
    sleep: Sleep = time.sleep,
    warn: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    denied_s: float = DENIED_S,
) -> _T:
    """The result of ``action``, called again while the storage does not answer or refuses.

    Waits 0.2 s at first, then longer, up to 15 s. ``warn`` is called once, at once. Silence is
    waited out without a limit: the agent's and the instance's own limits end a wait that has become
    pointless. A refusal (:class:`StorageDenied`) is raised after ``denied_s``, which is infinite
    where the same storage has taken something before, and at once when it is ``lasting``. When
    ``stop`` says so, the error is raised.
    """
    delay_s = _FIRST_S
    refused_s = 0.0
    told = False
    while True:
        try:
            return action()
        except StorageUnavailable as error:
            problem: SpotfirstError = error
            if stop():
                raise
        except StorageDenied as error:
            problem = error
            if error.lasting or refused_s >= denied_s or stop():
                raise
        _log.warning("could not %s, trying again: %s", what, problem)
        if not told:
            warn(f"could not {what}, trying again: {problem}")
            told = True
        pause_s = delay_s * _jitter.uniform(0.5, 1.0)
        sleep(pause_s)
        if isinstance(problem, StorageDenied):
            refused_s += pause_s
        delay_s = min(delay_s * 2, _LONGEST_S)


def once_taken(taken: bool) -> float:
    """``denied_s`` for a storage that has ``taken`` what we wrote, or has not yet."""
    return math.inf if taken else DENIED_S
