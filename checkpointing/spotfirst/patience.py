"""Waiting for a storage that does not answer: as long as it takes, and saying so."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from spotfirst.errors import StorageUnavailable

__all__ = ["Sleep", "patiently"]

Sleep = Callable[[float], None]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

# Its own: a draw from the global generator would change what a training script draws from it.
_jitter = random.Random()

_FIRST_S = 0.2
_LONGEST_S = 15.0


def patiently(
    action: Callable[[], _T],
    *,
    what: str,
    sleep: Sleep = time.sleep,
    warn: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> _T:
    """The result of ``action``, called again after each :class:`StorageUnavailable`.

    Waits 0.2 s at first, then longer, up to 15 s. ``warn`` is told once. Never gives up by itself:
    the agent's and the instance's own limits end a wait that has become pointless. When ``stop``
    says so, the error is raised.
    """
    delay_s = _FIRST_S
    told = False
    while True:
        try:
            return action()
        except StorageUnavailable as error:
            if stop():
                raise
            _log.warning("could not %s, trying again: %s", what, error)
            if not told:
                warn(f"could not {what}, trying again: {error}")
                told = True
        sleep(delay_s * _jitter.uniform(0.5, 1.0))
        delay_s = min(delay_s * 2, _LONGEST_S)
