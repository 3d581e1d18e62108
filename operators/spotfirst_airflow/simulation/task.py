"""The training that is simulated, and what became of it."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from spotfirst.state import RunState
from spotfirst.wire import Record
from spotfirst_airflow.budget import SHUTDOWN_S, Budget
from spotfirst_airflow.costs import Bill

__all__ = ["Played", "Task"]


class Task(Record):
    """A training, in seconds and dollars.

    ``work_s`` is its length without any interruption, ``deadline_s`` counts from its beginning.
    ``changeover_s`` is what each new instance takes, paid, from its launch to its first new step.
    ``notice_s`` is how long an instance goes on after its pool has no room for it any more; 0 is
    an end without notice, which loses what was trained since the last checkpoint: one is written
    every ``checkpoint_period_s`` (0: all the time). With ``overlaps`` the old instance of a move
    trains until the new one is ready, as in a real run; without, it ends at once, as in papers.
    ``shutdown_s`` is what a last checkpoint and the end after it take, when the run is stopped.
    ``checkpoint_bytes`` are what has to be brought to another region.
    """

    work_s: float
    deadline_s: float | None = None
    budget: Budget | None = None
    changeover_s: float = 720.0
    notice_s: float = 0.0
    checkpoint_period_s: float = 0.0
    overlaps: bool = True
    checkpoint_bytes: int = 0
    shutdown_s: float = SHUTDOWN_S


class Played(Record):
    """One simulated run.

    ``finished_s`` is when its work was done, from its beginning; ``None`` when it was stopped
    before: at its deadline (``is_late``), for its budget, or by its policy (``state.stop``).
    """

    state: RunState
    bill: Bill
    started_at: datetime
    finished_s: float | None
    is_late: bool

    @property
    def cost_usd(self) -> Decimal:
        """All of it, with the way of checkpoints to other regions."""
        return self.bill.total_usd
