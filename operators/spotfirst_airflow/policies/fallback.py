"""Spot while it holds, on demand while it does not."""

from __future__ import annotations

from datetime import timedelta

from spotfirst.market import Market
from spotfirst.state import Attempt
from spotfirst_airflow.policies.base import Decision, Options, View, cheapest, is_late, lost_at
from spotfirst_airflow.policies.rebalancing import leave_early

__all__ = ["Fallback"]


class Fallback(Options):
    """Spot first; on demand when spot is too rough, too scarce, or the deadline is too near.

    - ``losses`` spot instances lost within ``loss_window_s``: on demand until that is past;
    - nothing to run on for ``no_capacity_s``: on demand;
    - the work that is left, and two changeovers, just fit before the deadline: on demand to the
      end (the safety net of "Can't Be Late", NSDI'24).

    Back to spot once there is some, the on-demand attempt is ``return_after_s`` old, none of the
    above holds, and the work that is left is worth the move: longer than two changeovers. While
    nobody knows how much work is left, a run with a deadline takes spot when there is some, and
    does not wait for it.
    """

    losses: int = 3
    loss_window_s: float = 3600.0
    no_capacity_s: float = 300.0
    return_after_s: float = 600.0

    def decide(self, view: View) -> Decision:
        """Spot while it holds; on demand while one of the reasons above does."""
        why = self._why_on_demand(view)
        if view.current is not None:
            return self._while_training(view, view.current, why)
        if why:
            decision = cheapest(view, Market.ON_DEMAND, self.retry_s, why)
            if decision.offer is None:  # also when it is late: spot may make it, a wait cannot
                spot = cheapest(view, Market.SPOT, self.retry_s, f"{decision.reason}; spot instead")
                return spot if spot.offer else decision
            return decision
        spot = cheapest(view, Market.SPOT, self.retry_s, "spot first")
        if spot.offer is None and (why := self._why_not_wait(view)):
            return cheapest(view, Market.ON_DEMAND, self.retry_s, why)
        return spot

    def _while_training(self, view: View, current: Attempt, why: str) -> Decision:
        if current.market is Market.SPOT:
            if is_late(view):
                return cheapest(view, Market.ON_DEMAND, self.retry_s, why)
            early = leave_early(view, retry_s=self.retry_s)
            return early or Decision(reason="on spot")
        age = view.now - (current.launched.started_at if current.launched else current.intended_at)
        if why or age < timedelta(seconds=self.return_after_s):
            return Decision(reason=why or "on demand for a while yet")
        if view.work is not None and view.work.likely_s < 2 * view.changeover_s:
            return Decision(reason="on demand for the little work that is left")
        return cheapest(view, Market.SPOT, self.retry_s, "spot is back")

    def _why_on_demand(self, view: View) -> str:
        """Why spot is not to be used now; empty when it is."""
        if is_late(view):
            return "the deadline leaves no time for another interruption"
        recent = view.now - timedelta(seconds=self.loss_window_s)
        lost = sum(
            1
            for attempt in view.attempts
            if attempt.market is Market.SPOT and (at := lost_at(attempt)) and at > recent
        )
        if lost >= self.losses:
            return f"{lost} spot instances lost within {self.loss_window_s:.0f} s"
        return ""

    def _why_not_wait(self, view: View) -> str:
        """Why on demand is taken when there is no spot; empty when it is waited for.

        Asked only then: a controller that comes late to a run finds it idle for long, too.
        """
        idle_s = (view.now - view.idle_since).total_seconds()
        if idle_s >= self.no_capacity_s:
            return f"no spot capacity for {idle_s:.0f} s"
        if view.deadline is not None and view.work is None:
            return "no spot now, a deadline, and no estimate yet of the work"
        return ""
