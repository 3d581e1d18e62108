"""Which instances may use the storage, for a fleet that keeps the runs of one storage apart.

The list follows from the journal alone: all controllers write the same one, in any order.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from spotfirst.errors import FleetUnavailable, LaunchRejected
from spotfirst.market import Pool
from spotfirst.state import Attempt, RunState
from spotfirst_airflow.fleets import Fleet

if TYPE_CHECKING:
    from spotfirst.run import Run
    from spotfirst.spec import RunSpec

__all__ = ["Separates", "admit", "dismiss"]

_log = logging.getLogger(__name__)


@runtime_checkable
class Separates(Protocol):
    """A fleet that can give each run a way to the storage of its own. Optional.

    Both calls may be repeated, and made by several controllers at once. They raise
    :class:`~spotfirst.errors.FleetUnavailable` and :class:`~spotfirst.errors.LaunchRejected`.
    """

    def admit(self, run: Run, spec: RunSpec, instances: Sequence[tuple[str, Pool]]) -> None:
        """Let these instances of the run use the storage, and no others. Cheap while nothing changes.

        ``instances`` has ids, and the pools that they were taken from.
        """

    def dismiss(self, run: Run) -> None:
        """Remove the run's way to the storage: the run is over."""


def admit(fleet: Fleet, run: Run, spec: RunSpec, state: RunState, *, now: datetime) -> str:
    """Let the run's living instances in; why that is refused, for people, or an empty text.

    Without an answer nothing is said: it is asked again at the next pass, and instances wait.
    """
    living = [attempt for attempt in state.attempts if _lives(attempt, now)]
    if not living or not isinstance(fleet, Separates):
        return ""
    try:
        fleet.admit(run, spec, [(a.launched.instance_id, _pool(a)) for a in living if a.launched])
    except FleetUnavailable as error:
        _log.warning("Run %s: its instances cannot be let in yet: %s", run.run_id, error)
    except LaunchRejected as error:
        return f"its instances cannot use the storage: {error}"
    return ""


def dismiss(fleet: Fleet, run: Run, state: RunState, *, now: datetime) -> None:
    """Clean up after a run that is over. What cannot be removed now, the reaper removes."""
    if not isinstance(fleet, Separates) or any(_lives(a, now) for a in state.attempts):
        return
    try:
        fleet.dismiss(run)
    except (FleetUnavailable, LaunchRejected) as error:
        _log.warning("Run %s: its access point is left to the reaper: %s", run.run_id, error)


def _lives(attempt: Attempt, now: datetime) -> bool:
    """Whether it has an instance that may use the storage; one that is kept for debugging, too."""
    if attempt.launched is None:
        return False
    kept_until = attempt.ended.kept_until if attempt.ended else None
    return attempt.is_open or (kept_until is not None and now < kept_until)


def _pool(attempt: Attempt) -> Pool:
    taken = attempt.launched.pool if attempt.launched else None
    return taken or attempt.pool
