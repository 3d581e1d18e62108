"""What the page of a run shows, gathered from the run's files."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from spotfirst.checkpoints.chain import Commit
from spotfirst.errors import FormatError, ObjectMissing
from spotfirst.heartbeat import Heartbeat
from spotfirst.run import Run
from spotfirst.spec import RunSpec
from spotfirst.state import RunState
from spotfirst_airflow.costs import Bill, bill
from spotfirst_airflow.logs import shown_lines

__all__ = ["RunView", "look_at"]

_LINES = 60
_SEGMENTS = 4
_SEGMENT_BYTES = 64 * 1024
_ATTEMPTS = 3
_COMMITS = 8


class RunView(NamedTuple):
    """A run at one moment. ``output`` are the newest attempt's last lines, oldest first.

    ``problems`` names what of its instances' files cannot be read.
    """

    now: datetime
    url: str
    spec: RunSpec
    state: RunState
    bill: Bill
    commits: Sequence[tuple[int, Commit]]
    heartbeat: Heartbeat | None
    output: Sequence[str]
    problems: Sequence[str] = ()


def look_at(run: Run, now: datetime) -> RunView:
    """Read what is needed, and no more: the cost of a look must not grow with the log."""
    spec = run.spec()
    state = run.journal().refresh()
    problems: list[str] = []
    newest = next((a.number for a in reversed(state.attempts) if a.launched), None)
    return RunView(
        now=now,
        url=run.url,
        spec=spec,
        state=state,
        bill=bill(state, now=now, tags=spec.tags),
        commits=_commits(run, problems),
        heartbeat=run.heartbeat(newest, warn=problems.append) if newest else None,
        output=_tail(run, state),
        problems=problems,
    )


def _commits(run: Run, problems: list[str]) -> Sequence[tuple[int, Commit]]:
    try:
        return run.chain().refresh().commits[-_COMMITS:]
    except FormatError as error:
        problems.append(str(error))
        return ()


def _tail(run: Run, state: RunState) -> list[str]:
    """The last lines of the newest attempt that has written any, as a terminal would show them."""
    launched = [attempt.number for attempt in state.attempts if attempt.launched]
    for number in launched[: -_ATTEMPTS - 1 : -1]:
        text = ""
        for segment in reversed(_newest_segments(run, number)):
            with contextlib.suppress(ObjectMissing):
                data = run.storage.read_tail(run.log_path(number, segment), _SEGMENT_BYTES)
                text = data.decode("utf-8", "replace") + text
            if text.count("\n") > _LINES:
                break
        if text:
            return shown_lines(text)[-_LINES:]
    return []


def _newest_segments(run: Run, attempt: int) -> list[int]:
    """The last few pieces of its output. A heartbeat says how many there are; or they are listed."""
    beat = run.heartbeat(attempt)
    count = beat.log_segments if beat is not None else 0
    if not count or not run.storage.exists(run.log_path(attempt, count)):
        names = run.storage.list(run.attempt_path(attempt, "log"))
        numbers = [int(name) for name in names if name.isdecimal() and len(name) == 8]
        count = max(numbers, default=0)
    return list(range(max(1, count - _SEGMENTS + 1), count + 1))
