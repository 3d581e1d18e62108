"""Leaving the instance of a failed script to people, for some hours, with a price on it.

The run does not wait for them: its attempt has ended with the script, its run fails at once, and
says how to get a shell on what is left. The instance is marked with the time until which it is
wanted (:data:`~spotfirst_airflow.fleets.base.KEEP_TAG`); then the reaper ends it, if it has not
ended itself. The journal says until when, so the bill counts these hours, at most.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Protocol, runtime_checkable

from spotfirst.state import Attempt, RunState
from spotfirst_airflow.costs import bill, usd

__all__ = ["Keeps", "kept_until", "warning"]

SHORTEST_S = 600.0
"""Nobody is at the shell sooner, so less is not worth its price."""


@runtime_checkable
class Keeps(Protocol):
    """A fleet that can leave an instance up after its script has failed. Optional."""

    keep_s: float
    """For how long it is asked to; 0 when it is not."""

    def keep(self, token: str, *, until: datetime) -> str:
        """Mark the instance as wanted until then; the command that opens a shell on it.

        Idempotent. The instance still ends itself at its maximum life. Raises
        :class:`~spotfirst.errors.LaunchRejected` when that is not allowed, or it is gone, and
        :class:`~spotfirst.errors.FleetUnavailable`.
        """


def kept_until(
    state: RunState,
    attempt: Attempt,
    *,
    failed_at: datetime,
    keep_s: float,
    max_life_s: float,
    budget_usd: Decimal | None,
) -> datetime | None:
    """Until when the instance of a script that failed is kept; ``None`` when it is not.

    Within its maximum life, and within what the budget leaves. The same in every controller: it
    depends on the journal and on when the script failed, not on when anybody looks.
    """
    launched = attempt.launched
    if launched is None or (attempt.notice and attempt.notice.kind == "interruption"):
        return None
    life_left_s = max_life_s - (failed_at - launched.started_at).total_seconds()
    seconds = min(keep_s, life_left_s)
    if budget_usd is not None and launched.price_usd_h > 0:
        left_usd = budget_usd - bill(state, now=failed_at).total_usd
        hourly = launched.price_usd_h * Decimal(repr(launched.clock_rate))
        seconds = min(seconds, float(left_usd / hourly) * 3600)
    if seconds < SHORTEST_S:
        return None
    return failed_at + timedelta(seconds=seconds)


def warning(attempt: Attempt, *, failed_at: datetime, until: datetime, shell: str) -> str:
    """What people are told: where it is, how to get in and rid of it, and what it costs."""
    launched = attempt.launched
    assert launched is not None
    hourly = launched.price_usd_h * Decimal(repr(launched.clock_rate))
    hours = Decimal(repr((until - failed_at).total_seconds())) / 3600
    return (
        f"attempt {attempt.number}: its script failed, and its instance {launched.instance_id} is "
        f"kept until {until:%Y-%m-%d %H:%M} UTC at {usd(hourly)}/h: {usd(hourly * hours)} at most, "
        f"which the run's cost includes. A shell: `{shell}`; there, `sudo poweroff` ends it"
    )
