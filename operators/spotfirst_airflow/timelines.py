"""The price of an instance while it ran, where its fleet can tell.

It goes into the journal beside the price that was frozen at launch, and no bill is made of it.
By its page of spot prices, AWS bills whatever price is in force while an instance runs; by other
texts of its own, the price is fixed anew at the start of each instance-hour. Which of these an
invoice follows they do not settle. So a run's cost stays what it was when it was first told, and
who gets the invoice has what it takes to reconcile the two.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from typing import Protocol, runtime_checkable

from spotfirst.errors import SpotfirstError
from spotfirst.market import Market
from spotfirst_airflow.fleets import Fleet, Instance

__all__ = ["TellsPrices", "price_timeline"]

_log = logging.getLogger(__name__)


@runtime_checkable
class TellsPrices(Protocol):
    """A fleet that knows what an instance cost at each time. Optional."""

    def price_timeline(self, instance: Instance) -> Sequence[tuple[datetime, Decimal]]:
        """(since when, USD per hour) from the instance's start to its end, oldest first.

        Raises :class:`~spotfirst.errors.FleetError`.
        """


def price_timeline(fleet: Fleet, instance: Instance | None) -> tuple[tuple[datetime, Decimal], ...]:
    """What a spot instance cost over time. Empty when nobody can say: an end is told without."""
    if instance is None or instance.market is not Market.SPOT or not isinstance(fleet, TellsPrices):
        return ()
    try:
        return tuple(fleet.price_timeline(instance))
    except SpotfirstError as error:
        _log.warning("No price history of %s: %s", instance.instance_id, error)
        return ()
