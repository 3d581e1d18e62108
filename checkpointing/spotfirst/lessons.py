"""What earlier runs taught, as it is frozen into a run's spec: all its controllers know the same."""

from __future__ import annotations

from spotfirst.market import Pool
from spotfirst.steptimes import StepTimes
from spotfirst.wire import Record

__all__ = ["Lessons", "PoolHistory"]


class PoolHistory(Record):
    """What was seen of one spot pool, in seconds.

    ``up_s`` with an instance of ours in it, ended by ``losses`` that the fleet caused; ``down_s``
    without capacity until it came back, ``returns`` times.
    """

    pool: Pool
    up_s: float = 0.0
    losses: int = 0
    down_s: float = 0.0
    returns: int = 0


class Lessons(Record):
    """From the newest runs in the same storage; those of the same model tell of its training.

    ``step_times`` are by instance type, ``total_steps`` those of the newest such run.
    ``startup_s`` is what an instance usually took to its first step.
    """

    runs: tuple[str, ...] = ()
    step_times: dict[str, StepTimes] = {}
    total_steps: int | None = None
    startup_s: float | None = None
    pools: tuple[PoolHistory, ...] = ()
