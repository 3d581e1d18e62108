"""Time that only moves when it is told."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

START = datetime(2026, 1, 1, tzinfo=timezone.utc)


class SteppedClock:
    """Called, it tells the time in UTC; :meth:`monotonic` and :meth:`sleep` are for those who wait."""

    def __init__(self, start: datetime = START) -> None:
        self.now = start
        self._start = start

    def __call__(self) -> datetime:
        return self.now

    def monotonic(self) -> float:
        return 1000.0 + self.since_start_s

    def time(self) -> float:
        return self.now.timestamp()

    def sleep(self, seconds: float) -> None:
        """Waiting takes no time here: the world's time moves for all at once, between their turns."""

    @property
    def since_start_s(self) -> float:
        return (self.now - self._start).total_seconds()

    def step(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
