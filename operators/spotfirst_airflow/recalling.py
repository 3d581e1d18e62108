"""What the journal knows of instances, for a fleet whose memory ends with its process.

A process that has just begun asks its fleet for tokens, and an answer that lacks one proves
nothing: a cloud's lists are eventually consistent, and an instance that is over may have lost the
tags by which it is found. But the journal has its id, and by its id a cloud says what became of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Protocol, runtime_checkable

from spotfirst.state import Attempt
from spotfirst_airflow.fleets import Fleet, Instance, InstanceState

__all__ = ["Recalls", "recall"]


@runtime_checkable
class Recalls(Protocol):
    """A fleet that asks for an instance's id when its answers lack it. Optional."""

    def recall(self, instances: Collection[Instance]) -> None:
        """These were launched. What the fleet knows of them by itself stands. Asks nobody."""


def recall(fleet: Fleet, attempts: Iterable[Attempt]) -> None:
    """Tell the fleet of these attempts' instances, if it wants to know."""
    if not isinstance(fleet, Recalls):
        return
    fleet.recall(
        [
            Instance(
                token=attempt.token,
                instance_id=launched.instance_id,
                state=InstanceState.PENDING,
                market=attempt.market,
                pool=attempt.pool,
                started_at=launched.started_at,
                price_usd_h=launched.price_usd_h,
                price_source=launched.price_source,
                on_demand_usd_h=launched.on_demand_usd_h,
                clock_rate=launched.clock_rate,
                read_usd_gb=launched.read_usd_gb,
                write_usd_gb=launched.write_usd_gb,
            )
            for attempt in attempts
            if (launched := attempt.launched)
        ]
    )
