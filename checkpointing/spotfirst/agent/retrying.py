"""Calls that have to succeed, however long the storage is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from spotfirst.errors import SpotfirstError, StorageDenied, StorageUnavailable
from spotfirst.patience import DENIED_S

__all__ = ["until_answered"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_PAUSE_S = 1.0


def until_answered(what: str, call: Callable[[], _T], *, denied_s: float = DENIED_S) -> _T:
    """The result of ``call``, tried every second while the storage does not answer, or refuses.

    There is no limit here for silence: the guard ends what waits longer than the instance's life.
    Raises :class:`StorageDenied` after ``denied_s`` of refusals (an outage before them does not
    count), and at once one that is lasting.
    """
    refused_s = 0.0
    waiting = False
    while True:
        try:
            return call()
        except StorageUnavailable as error:
            problem: SpotfirstError = error
        except StorageDenied as error:
            if error.lasting or refused_s >= denied_s:
                raise
            problem = error
            refused_s += _PAUSE_S
        if not waiting:
            _log.warning("waiting for the storage to %s: %s", what, problem)
        waiting = True
        time.sleep(_PAUSE_S)
