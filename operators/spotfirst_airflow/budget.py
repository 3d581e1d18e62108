"""The budget: what may still be begun, when to stop, and whom to tell. Money in dollars.

**At every look, what is spent, and what all instances that are there cost until the next look and
until they have ended with a checkpoint, fit into the budget.** Nothing is launched that would not fit
besides, with its start; and a launch whose outcome is not known is judged again before it is
repeated. When that does not hold any more, the run is stopped. So the most that it can be over is by
how much the last checkpoint takes longer than the ones before.

A controller keeps this while its looks succeed. When they do not (no fleet, no storage, no
controller), each instance's agent keeps the same, by the same prices (:mod:`spotfirst.agent.limits`).
"""

from __future__ import annotations

from decimal import Decimal
from typing import Literal

from spotfirst.wire import Record
from spotfirst_airflow.costs import usd

__all__ = ["SHUTDOWN_S", "Budget", "OnBudget", "run_usd"]

OnBudget = Literal["stop", "continue_cheaper", "alert"]
SHUTDOWN_S = 7.0
"""A checkpoint of a second, and the rest of an end, while nothing was measured yet."""
_ALERTS = (70, 90, 100)
_CHEAPLY_FROM = Decimal("0.9")


class Budget(Record):
    """How much a run may cost, and what happens as it comes near that.

    - ``stop``: it stops, checkpointed, before it passes.
    - ``continue_cheaper``: as ``stop``; and once 90 % are spent, it goes on without on demand, even
      if the deadline passes.
    - ``alert``: people are told, and it goes on.

    ``simulated``: the dollars are those of the local fleet, and messages say so.
    """

    usd: Decimal
    on_budget: OnBudget = "stop"
    simulated: bool = False

    def alerts(self, spent_usd: Decimal) -> tuple[str, ...]:
        """What to tell people by now. The same words every time, so that they are told once."""
        return tuple(
            f"{percent} % of the budget of {usd(self.usd)} are spent"
            for percent in _ALERTS
            if spent_usd * 100 >= self.usd * percent
        )

    def is_cheaply(self, spent_usd: Decimal) -> bool:
        """Whether on demand is out of the question from here on."""
        return self.on_budget == "continue_cheaper" and spent_usd >= self.usd * _CHEAPLY_FROM

    def why_stop(self, *, spent_usd: Decimal, committed_usd: Decimal, shutdown_usd: Decimal) -> str:
        """Why the run has to stop now; empty when it may go on until the next look.

        ``committed_usd`` is what is spent until then whatever is decided.
        """
        if self.on_budget == "alert" or spent_usd + committed_usd + shutdown_usd < self.usd:
            return ""
        return (
            f"the budget of {usd(self.usd)} is used up: {usd(spent_usd, simulated=self.simulated)} "
            f"are spent, and stopping with a checkpoint takes about {usd(committed_usd + shutdown_usd)}"
        )

    def can_start(
        self,
        price_usd_h: Decimal,
        *,
        spent_usd: Decimal,
        changeover_s: float,
        shutdown_s: float,
        clock_rate: float,
    ) -> bool:
        """Whether the rest can start an instance at this price, and then end it with a checkpoint.

        ``spent_usd`` with what is committed.
        """
        needs_usd = run_usd(price_usd_h, changeover_s + shutdown_s, clock_rate)
        return self.on_budget == "alert" or spent_usd + needs_usd < self.usd


def run_usd(price_usd_h: Decimal, seconds: float, clock_rate: float = 1.0) -> Decimal:
    """What an instance at this price costs in so many seconds."""
    return price_usd_h * Decimal(repr(seconds * clock_rate)) / 3600
