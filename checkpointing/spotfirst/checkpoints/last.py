"""Asked to leave: whether a last checkpoint can be stored in the time that is left. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["COMMIT_S", "Decision", "Estimate", "Running", "decide", "drain_s", "needed_s"]

COMMIT_S = 0.5
"""Kept at the end, for the release of the chain and the last word to the agent."""
_SPREAD = 1.2
"""How much longer than estimated a checkpoint is given: throughput to one store varies by about
a fifth from one minute to the next."""
_TELLING_SHARE = 0.25
"""From here on, how fast the running save is says more than how fast others were."""


@dataclass(frozen=True)
class Estimate:
    """What one more checkpoint has to store, and how long it takes until its commit."""

    new_bytes: int
    took_s: float

    def __str__(self) -> str:
        rate = self.new_bytes / max(self.took_s, 1e-9)
        return f"{_bytes(self.new_bytes)} at {_bytes(rate)}/s, {self.took_s:.2g} s"


@dataclass(frozen=True)
class Running:
    """A save that is under way since ``elapsed_s``; ``left_bytes`` of its ``size_bytes`` remain."""

    step: int
    left_bytes: int
    size_bytes: int
    elapsed_s: float

    def left_s(self, estimate: Estimate | None) -> float | None:
        """How long it still takes; ``None`` when there is nothing to tell from."""
        left = self.left_bytes / max(1, self.size_bytes)
        by_others_s = None if estimate is None else left * estimate.took_s
        if 1 - left < _TELLING_SHARE:
            return by_others_s
        by_itself_s = self.elapsed_s * left / (1 - left)
        return max(by_itself_s, by_others_s or 0.0)


@dataclass(frozen=True)
class Decision:
    """``finish`` the running save (and decide again), ``take`` a last one, or ``stop``.

    What is begun or goes on is given up after ``patience_s``; ``None`` for never.
    """

    action: Literal["finish", "take", "stop"]
    reason: str
    patience_s: float | None = None


def needed_s(estimated_s: float) -> float:
    """The time that has to be left for a checkpoint to be begun."""
    return _SPREAD * estimated_s + COMMIT_S


def drain_s(estimate: Estimate) -> float:
    """How long before the end to ask for a last checkpoint.

    The request may come when a save has just begun: it is finished, and then the last one taken.
    """
    return estimate.took_s + needed_s(estimate.took_s)


def decide(
    left_s: float | None, *, estimate: Estimate | None, running: Running | None = None
) -> Decision:
    """What to do with the ``left_s`` until everything must be committed; ``None`` for no limit.

    Nothing is begun that by the estimate, a fifth and half a second is not committed in time. What
    is running goes on as long as it can make it by the estimate itself: it costs no more than the
    wait. Where nothing was measured yet, it is tried.
    """
    if left_s is None:
        if running is not None:
            return Decision("finish", f"finishing the checkpoint of step {running.step}: no limit")
        return Decision("take", "taking a last checkpoint: no limit")
    patience_s = max(0.0, left_s - COMMIT_S)
    time_left = f"{left_s:.3g} s left"
    if patience_s == 0.0:
        return Decision("stop", f"{time_left}: no time for a checkpoint", 0.0)
    if running is not None:
        rest_s = running.left_s(estimate)
        rest = f"{_bytes(running.left_bytes)} of {_bytes(running.size_bytes)} left"
        what = f"the checkpoint of step {running.step} ({rest} after {running.elapsed_s:.3g} s"
        if rest_s is None:
            return Decision("finish", f"{time_left}: trying to finish {what})", patience_s)
        what += f", needs {rest_s:.2g} s)"
        if rest_s > patience_s:
            return Decision("stop", f"{time_left}: giving up {what}", 0.0)
        return Decision("finish", f"{time_left}: finishing {what}", patience_s)
    if estimate is None:
        return Decision("take", f"{time_left}: trying a last checkpoint, the first", patience_s)
    needs = f"({estimate}; with a margin {needed_s(estimate.took_s):.2g} s)"
    if needed_s(estimate.took_s) > left_s:
        return Decision("stop", f"{time_left}: not enough for a last checkpoint {needs}", 0.0)
    return Decision("take", f"{time_left}: taking a last checkpoint {needs}", patience_s)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 999.5:  # what is rounded up to 1000
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
