"""When the next checkpoint is due: the period in force, and what it is chosen from."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from spotfirst.checkpoints.last import Estimate, Running, drain_s
from spotfirst.checkpoints.pace import Pace
from spotfirst.checkpoints.period import Period, choose_period
from spotfirst.errors import InvalidSpec
from spotfirst.market import INTERRUPTION_MEAN_VARIABLE
from spotfirst.reporting import ProgressReporter

if TYPE_CHECKING:
    from spotfirst.checkpoints.saving import Saved, Saver  # they need torch

__all__ = ["PERIOD_VARIABLE", "Schedule"]

_log = logging.getLogger(__name__)

PERIOD_VARIABLE = "SPOTFIRST_CHECKPOINT_PERIOD_S"
"""The most training time that a kill may lose; set by the agent, from the spec."""
_DEFAULT_PERIOD_S = 300.0


class Schedule:
    """Used on the training thread only. A period that the script gives stands as it is."""

    def __init__(
        self,
        period_s: float | Literal["auto"] | None,
        reporter: ProgressReporter,
        *,
        environment: Mapping[str, str] = os.environ,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises :class:`InvalidSpec` for a period, or for variables, that are no seconds."""
        self._reporter = reporter
        self._monotonic = monotonic
        self._pace = Pace()
        self._begun_at = 0.0
        self._mean_s: float | None = None
        self._told: Period | None = None
        self._fixed = isinstance(period_s, (int, float))
        if isinstance(period_s, (int, float)):
            self._limit_s = _checked(float(period_s), "the checkpoint period", zero=True)
            self.period = Period(period_s=self._limit_s, reason="given by the script")
            return
        if period_s not in {None, "auto"}:
            msg = f'the checkpoint period is {period_s!r}; give seconds, or "auto"'
            raise InvalidSpec(msg)
        limit_s = _seconds(environment, PERIOD_VARIABLE, zero=True)
        self._limit_s = _DEFAULT_PERIOD_S if limit_s is None else limit_s
        self._mean_s = _seconds(environment, INTERRUPTION_MEAN_VARIABLE)
        self.period = choose_period(self._limit_s, interruption_mean_s=self._mean_s)

    @property
    def estimate(self) -> Estimate | None:
        """What one more checkpoint takes."""
        return self._pace.estimate

    def start(self) -> None:
        """Training begins."""
        self._begun_at = self._monotonic()
        self._tell()

    def boundary(self, saver: Saver) -> None:
        """A step has ended."""
        measured = self._pace.boundary(
            self._monotonic(), saving=saver.busy, waited_s=saver.waited_s, last=saver.last
        )
        if measured and not self._fixed:
            self.period = choose_period(
                self._limit_s,
                cost_s=self._pace.cost_s,
                durable_s=self._pace.durable_s,
                interruption_mean_s=self._mean_s,
            )
        if measured:
            self._tell()

    def is_due(self, saver: Saver) -> bool:
        """Whether to begin a checkpoint now. A slow one puts off the next, with one warning."""
        elapsed_s = self._monotonic() - self._begun_at
        if elapsed_s < self.period.period_s:
            return False
        if saver.busy and elapsed_s >= self._limit_s:
            self._reporter.warn(
                f"a checkpoint takes longer than its period of {self._limit_s:g} s: "
                f"{elapsed_s:.3g} s so far, and {saver.left_bytes() / 1e6:.3g} MB are left. "
                "Training goes on, the next one begins when this one is stored, and a kill "
                "without notice can lose more than that",
                key="a checkpoint takes longer than its period",
            )
        return not saver.busy

    def begun(self, step: int, saver: Saver, *, since_s: float) -> None:
        """A save was begun, on the training thread's time since ``since_s`` (monotonic)."""
        self._begun_at = since_s
        stall_s = self._monotonic() - since_s
        self._pace.begin(step, stall_s=stall_s, waited_s=saver.waited_s)

    def waited(self, saver: Saver) -> None:
        """Training has waited for a save to be complete."""
        self._begun_at = self._monotonic()
        self._pace.pause()
        self.stored(saver.last)

    def stored(self, saved: Saved | None) -> None:
        """A checkpoint is stored, if there is one; may be said twice."""
        if saved is not None:
            self._pace.stored(saved)

    def running(self, saver: Saver) -> Running | None:
        """The save that is under way."""
        if not saver.busy:
            return None
        elapsed_s = self._monotonic() - self._begun_at
        return Running(saver.step, saver.left_bytes(), saver.size_bytes, elapsed_s)

    def _tell(self) -> None:
        estimate = self._pace.estimate
        self._reporter.tell(
            now=False, period=self.period, drain_s=drain_s(estimate) if estimate else None
        )
        if not self.period.differs(self._told):
            return
        self._told = self.period
        _log.info("%s", self.period)
        at_stake_s = self.period.period_s + (self.period.durable_s or 0.0)
        if not self._fixed and at_stake_s > 1.01 * self._limit_s:
            self._reporter.warn(f"checkpoints are slow: {self.period}", key="checkpoints are slow")


def _seconds(environment: Mapping[str, str], name: str, *, zero: bool = False) -> float | None:
    text = environment.get(name, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError as error:
        msg = f"{name} is {text!r}; give seconds, such as 300"
        raise InvalidSpec(msg) from error
    return _checked(value, name, zero=zero)


def _checked(value: float, what: str, *, zero: bool) -> float:
    if value > 0 or (zero and value == 0):
        return value
    msg = f"{what} is {value:g}; give seconds" + (", 0 for every step" if zero else " above 0")
    raise InvalidSpec(msg)
