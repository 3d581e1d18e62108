"""Background work that must neither stop the training nor stop for a failure."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from spotfirst.errors import SpotfirstError

__all__ = ["Periodic"]

_log = logging.getLogger(__name__)
_PAUSE_AFTER_FAILURE_S = 1.0
_LONGEST_PAUSE_S = 3600.0


class Periodic:
    """A daemon thread that calls ``action`` again and again; it returns the pause in seconds.

    A failed call is logged (once in a row) and tried again: an agent whose storage is away for a
    minute goes on where it was.
    """

    def __init__(self, name: str, action: Callable[[], float]) -> None:
        self._name = name
        self._action = action
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Call the action for the first time, and go on."""
        self._thread.start()

    def wake(self) -> None:
        """Call the action as soon as possible, and once more when it is running now."""
        self._wake.set()

    def stop(self, timeout_s: float) -> None:
        """Call the action no more; wait at most this long for a call that is under way."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        failing = False
        while not self._stopped.is_set():
            self._wake.clear()
            try:
                pause_s = self._action()
                if failing:
                    _log.info("%s works again", self._name)
                failing = False
            except Exception as error:  # noqa: BLE001 - a bug here must not end the attempt either
                if not failing:
                    expected = isinstance(error, SpotfirstError)
                    _log.warning("%s: %s", self._name, error, exc_info=not expected)
                failing, pause_s = True, _PAUSE_AFTER_FAILURE_S
            self._wake.wait(min(pause_s, _LONGEST_PAUSE_S))
