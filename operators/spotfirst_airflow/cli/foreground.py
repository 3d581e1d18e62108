"""A run in the foreground: its controller, its display, and what Ctrl-C means.

Ctrl-C once asks for a checkpointed stop, after a moment in which a second one detaches instead
and leaves the run training. SIGTERM asks for the stop at once.
"""

from __future__ import annotations

import contextlib
import getpass
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from spotfirst.errors import FleetUnavailable, StorageDenied, StorageUnavailable
from spotfirst.run import Run
from spotfirst_airflow.cli.display import Display
from spotfirst_airflow.cli.watching import Glance, Watcher
from spotfirst_airflow.following import Follower
from spotfirst_airflow.submission import request_stop, storage_environment

__all__ = ["Interrupts", "follow", "owner_name"]

SECOND_THOUGHTS_S = 2.0
"""How long after the first Ctrl-C a second one detaches rather than stops."""
_LONGEST_WAIT_S = 0.5
_PASSING = (StorageUnavailable, StorageDenied, FleetUnavailable)


def owner_name() -> str:
    """Who follows the run, as its journal names it."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"cli:{user}@{socket.gethostname()}:{os.getpid()}"


class Interrupts:
    """Counts Ctrl-C and SIGTERM instead of raising in the middle of a write.

    Catch them before a run is taken over: from then on, ending without a word would leave its
    instances without a controller. While ``attaching``, a second signal raises
    :class:`KeyboardInterrupt`, as an upload may be long; a first one stops the run once it is
    attached.
    """

    def __init__(self) -> None:
        self.attaching = False
        self.first_at: float | None = None
        self.stop_now = False
        self.detach = False
        self._woken = threading.Event()

    def wait(self, seconds: float) -> None:
        """Sleep, but not through a signal."""
        self._woken.wait(seconds)
        self._woken.clear()

    def is_stop_due(self, now_s: float) -> bool:
        """Whether the run is to be stopped: nobody pressed Ctrl-C again in time."""
        if self.stop_now:
            return True
        return self.first_at is not None and now_s - self.first_at >= SECOND_THOUGHTS_S

    @contextlib.contextmanager
    def caught(self) -> Iterator[Interrupts]:
        """Handle the signals here, in the main thread."""
        before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGINT, self._on_interrupt)
        signal.signal(signal.SIGTERM, self._on_terminate)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_interrupt(self, _number: int, _frame: FrameType | None) -> None:
        if self.attaching:
            self._stop_after_attaching()
        elif self.first_at is None:
            self.first_at = time.monotonic()
        else:
            self.detach = True
        self._woken.set()

    def _on_terminate(self, _number: int, _frame: FrameType | None) -> None:
        if self.attaching:
            self._stop_after_attaching()
        self.stop_now = True
        self._woken.set()

    def _stop_after_attaching(self) -> None:
        if self.stop_now:
            raise KeyboardInterrupt
        self.stop_now = True


def follow(
    run: Run, display: Display, interrupts: Interrupts, *, owner: str, from_now: bool = False
) -> Glance | None:
    """Reconcile and show the run until it is over; ``None`` when the user detached.

    ``from_now`` leaves out what happened before.
    """
    watcher = Watcher(run, from_now=from_now)
    follower = Follower(
        lambda: (run, storage_environment()),
        log=_Quietly(display),
        owner=owner,
        show_output=False,
    )
    asked = warned = False
    look_at = -math.inf
    while True:
        if not asked and interrupts.is_stop_due(time.monotonic()):
            # Before the look, which would launch an instance for a run that is to stop.
            with contextlib.suppress(*_PASSING):  # the follower says so; asked again next time
                request_stop(run, reason="stopped from the command line", owner=owner)
                asked, look_at = True, -math.inf
        wait_s: float | None = _LONGEST_WAIT_S
        if time.monotonic() >= look_at:  # the display is brought up to date more often
            wait_s = follower.look()
            look_at = time.monotonic() + (wait_s or 0.0) if follower.is_failing else -math.inf
        try:
            glance = watcher.look()
        except _PASSING:  # the follower has said so
            interrupts.wait(_LONGEST_WAIT_S)
            continue
        display.show(glance)
        if glance.is_over:
            return glance
        if interrupts.detach:
            return None
        if interrupts.first_at is not None and not warned:
            warned = True
            display.say(
                f"Stopping with a checkpoint in {SECOND_THOUGHTS_S:.0f} s. "
                "Ctrl-C again: detach, and leave it running.",
                "bold yellow",
            )
        if not asked and interrupts.is_stop_due(time.monotonic()):
            continue
        interrupts.wait(min(_LONGEST_WAIT_S, wait_s if wait_s is not None else 0.1))


class _Quietly:
    """What the follower logs: the watcher tells the news, so only its troubles are shown."""

    def __init__(self, display: Display) -> None:
        self._display = display

    def info(self, *_: Any) -> None:
        """The watcher tells this."""

    def error(self, *_: Any) -> None:
        """The watcher tells this."""

    def warning(self, text: str, *values: Any) -> None:
        """Show it."""
        self._display.say(text % values if values else text, "yellow")
