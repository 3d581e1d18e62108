"""How long steps take: what the trainer measures, and what may be said of those to come."""

from __future__ import annotations

import math

from spotfirst.wire import Record

__all__ = ["StepTimes", "StepWatch"]

WARM_UP_STEPS = 2
"""The first steps of a process compile, allocate and fill caches: they say nothing of the rest."""
_SIGMAS = 1.96
_LEAST_SHARE = 0.01


class StepTimes(Record):
    """Of ``count`` steps: their mean and standard deviation, in seconds."""

    count: int
    mean_s: float
    spread_s: float = 0.0

    def likely_s(self, steps: float) -> float:
        """How long so many steps will take."""
        return steps * self.mean_s

    def most_s(self, steps: float) -> float:
        """How long so many steps will take at most, with a confidence of 97.5 %.

        The mean is known up to ``spread / sqrt(count)``, and the sum of n steps scatters by
        ``spread * sqrt(n)``: both together, 1.96 of them, are added; 1 % at least, as steps are
        not quite independent of each other.
        """
        likely_s = self.likely_s(steps)
        sigma_s = self.spread_s * math.sqrt(steps**2 / max(1, self.count) + steps)
        return likely_s + max(_SIGMAS * sigma_s, _LEAST_SHARE * likely_s)


class StepWatch:
    """Fed at each step's end with a monotonic clock; keeps three numbers (Welford, 1962)."""

    def __init__(self) -> None:
        self._seen = 0
        self._last: tuple[int, float] | None = None
        self._count, self._mean_s, self._squares = 0, 0.0, 0.0

    def lap(self, done: int, now_s: float) -> None:
        """So many steps are finished now, since the training began."""
        last, self._last = self._last, (done, now_s)
        if last is None or done <= last[0]:
            return
        self._seen += 1
        if self._seen < WARM_UP_STEPS:
            return
        step_s = (now_s - last[1]) / (done - last[0])
        self._count += 1
        off_s = step_s - self._mean_s
        self._mean_s += off_s / self._count
        self._squares += off_s * (step_s - self._mean_s)

    def times(self) -> StepTimes | None:
        """Of all steps so far but the first ones; ``None`` before there are two."""
        if self._count < 2:
            return None
        spread_s = math.sqrt(self._squares / (self._count - 1))
        return StepTimes(count=self._count, mean_s=self._mean_s, spread_s=spread_s)
