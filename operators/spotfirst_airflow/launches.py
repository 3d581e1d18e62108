"""How many instances a run may launch: no storm, whatever goes wrong with each of them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from spotfirst.state import Attempt

__all__ = ["next_launch_at"]

HOUR_S = 3600.0


def next_launch_at(attempts: Iterable[Attempt], *, per_hour: int, now: datetime) -> datetime | None:
    """From when on the run may launch again; ``None`` when it may now.

    An hour is one of the run's own clock, by which it is billed: in a local market that runs a
    hundred times faster, it is over after 36 s. What was asked for and never launched does not
    count: it costs nothing, and policies leave pools alone that refuse.
    """
    free_again = sorted(
        launched.at + timedelta(seconds=HOUR_S / launched.clock_rate)
        for attempt in attempts
        if (launched := attempt.launched)
    )
    counted = [at for at in free_again if at > now]
    return None if len(counted) < per_hour else counted[len(counted) - per_hour]
