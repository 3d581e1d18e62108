"""What the trainer tells the agent: cheap enough for every step of a fast loop."""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from spotfirst.channel import Channel
from spotfirst.heartbeat import Progress
from spotfirst.wire import Clock, utc_now

__all__ = ["ProgressReporter", "finite"]

_log = logging.getLogger(__name__)

_INTERVAL_S = 0.1
_MOST_WARNINGS = 20


class ProgressReporter:
    """Keeps the :class:`Progress` and writes it to the channel, at most ten times a second.

    Thread-safe. Without a channel it only keeps it.
    """

    def __init__(
        self,
        channel: Channel | None,
        *,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._channel = channel
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._told_at = -math.inf
        self._metrics: dict[str, Any] = {}
        self.progress = Progress()
        self.step_done: int | None = None
        """The newest step, also while nothing of it was written."""
        if channel is not None:
            atexit.register(self._tell_last_step)

    def _tell_last_step(self) -> None:
        """A script that leaves its loop early must not seem to have done less than it has."""
        if self.step_done is not None and self.step_done != self.progress.step:
            self.tell(step=self.step_done)

    @property
    def due(self) -> bool:
        """Whether the last write is long enough ago for the next one of a step."""
        return self._monotonic() - self._told_at >= _INTERVAL_S

    def mute(self) -> None:
        """Write nothing any more: of several ranks, one tells."""
        self._channel = None

    def tell(self, *, now: bool = True, **changes: Any) -> None:
        """Change fields of the progress; with ``now``, write it whatever was written before."""
        with self._lock:
            self.progress = msgspec.structs.replace(self.progress, **changes)
            if now or self.due:
                self._write()

    def stamp(self, *names: str, now: bool = True, **changes: Any) -> None:
        """Set fields of :class:`Timings` to this moment, together with other changes."""
        times = dict.fromkeys(names, self._clock())
        timings = msgspec.structs.replace(self.progress.timings, **times)
        self.tell(now=now, timings=timings, **changes)

    def measure(self, metrics: dict[str, Any]) -> None:
        """Take metrics, numbers or one-element tensors; they are read when they are written.

        So a tensor on a GPU is waited for ten times a second at most, not at every step.
        """
        for name, value in metrics.items():
            detach = getattr(value, "detach", None)
            self._metrics[name] = value if detach is None else detach()

    def metrics(self) -> dict[str, float]:
        """The newest metrics that are finite; JSON has no other numbers."""
        values, strange = finite(self._metrics)
        for name, value in strange.items():
            self.warn(f"metric {name} is {value}", key=f"metric {name} is")
        return values

    def warn(self, message: str, *, key: str = "") -> None:
        """Put a warning before people, once per ``key`` (by default, per message)."""
        start = key or message
        with self._lock:
            if any(warning.startswith(start) for warning in self.progress.warnings):
                return
            _log.warning("%s", message)
            warnings = (*self.progress.warnings, message)[-_MOST_WARNINGS:]
            self.progress = msgspec.structs.replace(self.progress, warnings=warnings)
            self._write()

    def _write(self) -> None:
        self._told_at = self._monotonic()
        if self._channel is not None:
            self._channel.tell(self.progress)


def finite(metrics: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics as floats: the finite ones, and the others. Raises for what is no number."""
    values = {name: float(value) for name, value in metrics.items()}
    good = {name: value for name, value in values.items() if math.isfinite(value)}
    return good, {name: value for name, value in values.items() if name not in good}
