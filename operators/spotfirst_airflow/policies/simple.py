"""One market from the first second to the last."""

from __future__ import annotations

from typing import ClassVar

from spotfirst.market import Market
from spotfirst_airflow.policies.base import Decision, Options, View, cheapest

__all__ = ["OnDemand", "SpotOnly"]


class OnDemand(Options):
    """On demand from the first second to the last: dear, and never interrupted."""

    only: ClassVar[Market] = Market.ON_DEMAND

    def decide(self, view: View) -> Decision:
        """On demand, or wait for it."""
        if view.current:
            return Decision(reason="on demand, as asked")
        return cheapest(view, Market.ON_DEMAND, self.retry_s, "on demand, as asked")


class SpotOnly(Options):
    """Spot, or wait for it. The deadline may pass."""

    only: ClassVar[Market] = Market.SPOT

    def decide(self, view: View) -> Decision:
        """Spot, or wait for it."""
        if view.current:
            return Decision(reason="on spot, as asked")
        return cheapest(view, Market.SPOT, self.retry_s, "spot, as asked")
