"""What the page of a run shows, gathered from the run's files."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from spotfirst.checkpoints.chain import Commit
from spotfirst.heartbeat import Heartbeat
from spotfirst.run import Run
from spotfirst.spec import RunSpec
from spotfirst.state import RunState
from spotfirst_airflow.costs import Bill, bill

__all__ = ["RunView", "look_at"]

_LINES = 60
_SEGMENTS = 4
_COMMITS = 8


class RunView(NamedTuple):
    """A run at one moment. ``output`` are the newest attempt's last lines, oldest first."""

    now: datetime
    url: str
    spec: RunSpec
    state: RunState
    bill: Bill
    commits: Sequence[tuple[int, Commit]]
    heartbeat: Heartbeat | None
    output: Sequence[str]


def look_at(run: Run, now: datetime) -> RunView:
    """Read what is needed, and no more: the cost of a look must not grow with the log."""
    spec = run.spec()
    state = run.journal().refresh()
    newest = next((a.number for a in reversed(state.attempts) if a.launched), None)
    return RunView(
        now=now,
        url=run.url,
        spec=spec,
        state=state,
        bill=bill(state, now=now, tags=spec.tags),
        commits=run.chain().refresh().commits[-_COMMITS:],
        heartbeat=run.heartbeat(newest) if newest else None,
        output=_tail(run, newest) if newest else [],
    )


def _tail(run: Run, attempt: int) -> list[str]:
    """The last lines of the newest attempt that has written any."""
    for number in range(attempt, 0, -1):
        folder = run.attempt_path(number, "log")
        names = run.storage.list(folder)[-_SEGMENTS:]
        text = "".join(
            (run.storage.read_or_none(f"{folder}/{name}") or b"").decode("utf-8", "replace")
            for name in names
        )
        if text:
            return text.splitlines()[-_LINES:]
    return []
