"""What checkpoints cost the training and what the storage takes, as measured in this process."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import TYPE_CHECKING

from spotfirst.checkpoints.last import Estimate

if TYPE_CHECKING:
    from spotfirst.checkpoints.saving import Saved  # it needs torch

__all__ = ["Pace"]

_SAVES = 5
_STEPS = 101
_FEWEST_STEPS = 3


class Pace:
    """Fed on the training thread, at step boundaries. All times are of one monotonic clock.

    The cost of a checkpoint is what the steps beside it take longer than the median of the steps
    beside none, which includes the stall; at least the measured stall, and at most the stall and
    all the time that it was being saved. Of the last saves the median counts: an evaluation that
    happened to fall beside one does not. Nothing is said before there are steps to compare with.
    """

    def __init__(self) -> None:
        self._boundary_s: float | None = None
        self._quiet: deque[float] = deque(maxlen=_STEPS)
        self._costs: deque[float] = deque(maxlen=_SAVES)
        self._saves: deque[Saved] = deque(maxlen=_SAVES)
        self._beside: list[float] | None = None
        self._stall_s = 0.0
        self._waited_s = 0.0
        self._step = 0

    @property
    def cost_s(self) -> float | None:
        """Training time that a checkpoint takes."""
        return median(self._costs) if self._costs else None

    @property
    def durable_s(self) -> float | None:
        """How long a checkpoint takes until it is stored."""
        return median(saved.took_s for saved in self._saves) if self._saves else None

    @property
    def estimate(self) -> Estimate | None:
        """What the next checkpoint has to store, and how long that takes; to be on the safe side.

        It will have as many new bytes as the last one, and takes as long, or as these bytes do at
        the mean throughput when the last one was lucky.
        """
        if not self._saves:
            return None
        last = self._saves[-1]
        bytes_per_byte_s = sum(s.took_s for s in self._saves) / max(
            1, sum(s.new_bytes for s in self._saves)
        )
        return Estimate(last.new_bytes, max(last.took_s, last.new_bytes * bytes_per_byte_s))

    def boundary(self, now_s: float, *, saving: bool, waited_s: float, last: Saved | None) -> bool:
        """A step has ended; whether a checkpoint has been stored since the last one.

        ``waited_s`` is the total that ``optimizer.step()`` has waited for copies, ``last`` the
        newest checkpoint that this process has stored.
        """
        took_s = None if self._boundary_s is None else now_s - self._boundary_s
        self._boundary_s = now_s
        if self._beside is None:
            if took_s is not None and not saving:
                self._quiet.append(took_s)
            return False
        if took_s is not None:
            self._beside.append(took_s)
        if saving:
            return False
        beside, self._beside = self._beside, None
        if last is None or last.step != self._step:
            return False  # it failed
        self.stored(last)
        if len(self._quiet) >= _FEWEST_STEPS:
            stall_s = self._stall_s + waited_s - self._waited_s
            extra_s = sum(beside) - len(beside) * median(self._quiet)
            self._costs.append(max(stall_s, min(extra_s, stall_s + last.took_s)))
        return True

    def begin(self, step: int, *, stall_s: float, waited_s: float) -> None:
        """A save of ``step`` was begun at this boundary, which took ``stall_s``."""
        self._beside = []
        self._step, self._stall_s, self._waited_s = step, stall_s, waited_s

    def pause(self) -> None:
        """Training stood still on purpose: the time since the last boundary says nothing."""
        self._boundary_s = self._beside = None

    def stored(self, saved: Saved) -> None:
        """A checkpoint is stored; saying so twice does nothing."""
        if not self._saves or self._saves[-1].seq != saved.seq:
            self._saves.append(saved)
