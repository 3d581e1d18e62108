"""Calls that have to succeed, however long the storage is away."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from spotfirst.errors import SpotfirstError, StorageDenied, StorageUnavailable

__all__ = ["until_answered"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_PAUSE_S = 1.0
_DENIED_S = 60.0
"""A new instance's role may take this long to be known everywhere."""


def until_answered(what: str, call: Callable[[], _T]) -> _T:
    """The result of ``call``, tried every second while the storage does not answer.

    There is no limit here: the guard ends what waits longer than the instance's life. Raises
    :class:`StorageDenied` when the storage refuses for a minute.
    """
    denied_until = time.monotonic() + _DENIED_S
    waiting = False
    while True:
        try:
            return call()
        except StorageUnavailable as error:
            problem: SpotfirstError = error
        except StorageDenied as error:
            if time.monotonic() > denied_until:
                raise
            problem = error
        if not waiting:
            _log.warning("waiting for the storage to %s: %s", what, problem)
        waiting = True
        time.sleep(_PAUSE_S)
