"""Leaving the instance of a failed script to people, for some hours, with a price on it.

The run does not wait for them: its attempt has ended with the script, its run fails at once, and
says how to get a shell on what is left. The instance is marked with the time until which it is
wanted (:data:`~spotfirst_airflow.fleets.base.KEEP_TAG`); then the reaper ends it, if it has not
ended itself. The journal says until when, so the bill counts these hours, at most.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Protocol, runtime_checkable

from spotfirst.state import Attempt, RunState
from spotfirst_airflow.costs import bill, usd

__all__ = ["Keeps", "cost_usd", "is_taken_back", "over_budget", "still_kept", "warning"]


@runtime_checkable
class Keeps(Protocol):
    """A fleet that can leave an instance up after its script has failed. Optional."""

    keep_s: float
    """For how long it is asked to; 0 when it is not."""

    def keep(self, token: str, *, until: datetime) -> str:
        """Mark the instance as wanted until then; the command that opens a shell on it.

        Idempotent. The instance ends itself then, too, whoever is left to do it. Raises
        :class:`~spotfirst.errors.LaunchRejected` when that is not allowed, or it is gone, and
        :class:`~spotfirst.errors.FleetUnavailable`.
        """


def is_taken_back(attempt: Attempt) -> bool:
    """Whether the fleet takes the instance anyway: there is nothing to keep."""
    return attempt.notice is not None and attempt.notice.kind == "interruption"


def cost_usd(attempt: Attempt, *, failed_at: datetime, until: datetime) -> Decimal:
    """What the instance costs at most between the script's failure and then."""
    hours = Decimal(repr((until - failed_at).total_seconds())) / 3600
    return _usd_h(attempt) * hours


def over_budget(
    state: RunState,
    attempt: Attempt,
    *,
    failed_at: datetime,
    until: datetime,
    budget_usd: Decimal | None,
) -> str:
    """Why the run cannot afford to keep it; empty when it can.

    All of the time or none of it: nothing on the instance would know of a shorter one. The same
    in every controller: it depends on the journal and on when the script failed, not on when
    anybody looks.
    """
    if budget_usd is None:
        return ""
    left_usd = budget_usd - bill(state, now=failed_at).total_usd
    wanted_usd = cost_usd(attempt, failed_at=failed_at, until=until)
    if wanted_usd <= left_usd:
        return ""
    return (
        f"attempt {attempt.number}: its script failed, and its instance was not kept: that would "
        f"cost {usd(wanted_usd)}, and the budget leaves {usd(left_usd)}"
    )


def warning(attempt: Attempt, *, failed_at: datetime, until: datetime, shell: str) -> str:
    """What people are told: where it is, how to get in and rid of it, and what it costs."""
    assert attempt.launched is not None
    most = usd(cost_usd(attempt, failed_at=failed_at, until=until))
    return (
        f"attempt {attempt.number}: its script failed, and its instance "
        f"{attempt.launched.instance_id} is kept until {until:%Y-%m-%d %H:%M} UTC at "
        f"{usd(_usd_h(attempt))}/h: {most} at most, which the run's cost includes. "
        f"A shell: `{shell}`; there, `sudo poweroff` ends it"
    )


def still_kept(state: RunState, *, now: datetime) -> str:
    """A sentence about what is kept at this moment; empty when nothing is."""
    return " ".join(
        f"Its instance {a.launched.instance_id} is kept until {a.ended.kept_until:%Y-%m-%d %H:%M} "
        f"UTC at {usd(_usd_h(a))}/h: its warning says how to get in."
        for a in state.attempts
        if a.launched and a.ended and a.ended.kept_until and a.ended.kept_until > now
    )


def _usd_h(attempt: Attempt) -> Decimal:
    launched = attempt.launched
    assert launched is not None
    return launched.price_usd_h * Decimal(repr(launched.clock_rate))
