"""Seeing a run through: the loop around the controller that triggers and workers share.

One *look* is a reconcile step, then what is new for people: decisions and the training's output.
A look blocks for milliseconds up to the storage's patience, so callers in an event loop run it in
a thread. Nothing that may pass by itself ends the loop: a run whose storage or fleet does not
answer is still training.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from spotfirst import events as e
from spotfirst.errors import (
    FleetUnavailable,
    FormatError,
    InvalidSpec,
    LostRace,
    StorageDenied,
    StorageUnavailable,
)
from spotfirst.run import Run
from spotfirst.spec import RunSpec
from spotfirst.state import RunState
from spotfirst.wire import Clock, utc_now
from spotfirst_airflow.controller import Controller, Step
from spotfirst_airflow.costs import bill, usd
from spotfirst_airflow.logs import LogFollower
from spotfirst_airflow.news import describe, is_bad, progress_line
from spotfirst_airflow.submission import open_controller, request_stop

__all__ = ["Follower"]

_PASSING = (StorageUnavailable, StorageDenied, FleetUnavailable, LostRace)
_LASTING = (InvalidSpec, FormatError)
_LONGEST_PAUSE_S = 60.0
_TRIES = 5
_LINES_PER_LOOK = 1000
_LINES_BEFORE = 20
_PROGRESS_S = (10.0, 300.0)
"""The shortest and the longest time between two lines of progress."""


class Follower:
    """Reconciles one run until it is final and every instance is gone.

    ``open_run`` gives the run and the environment for its instances; it is asked again after
    every failure, as keys may have changed. ``stop_at`` is when the run is stopped whatever the
    controller says.
    """

    def __init__(
        self,
        open_run: Callable[[], tuple[Run, Mapping[str, str]]],
        *,
        log: Any = None,
        owner: str | None = None,
        stop_at: datetime | None = None,
        stop_reason: str = "time is up",
        show_output: bool = True,
        clock: Clock = utc_now,
    ) -> None:
        self._open_run = open_run
        self._log = log if log is not None else logging.getLogger(__name__)
        self._owner = owner
        self._stop_at = stop_at
        self._stop_reason = stop_reason
        self._show_output = show_output
        self._clock = clock
        self._controller: Controller | None = None
        self._output: LogFollower | None = None
        self._failures = 0
        self._shown_before = False
        self._told = 0
        self._began: datetime | None = None
        self._progress_at: datetime | None = None
        self._is_new = True
        self.state: RunState | None = None
        """What the newest look found."""

    @property
    def is_failing(self) -> bool:
        """Whether the last look failed, so that the next one is to wait for as long as it said."""
        return self._failures > 0

    def look(self) -> float | None:
        """Do what is to be done now; seconds until the next look, or ``None`` when it is over.

        Raises what does not pass by itself, after a few tries: a journal of a newer release, say.
        """
        try:
            wait_s = self._look()
        except _PASSING as error:
            return self._pause(error)
        except Exception as error:
            # Possibly a bug of ours. The run trains on meanwhile, so it is worth some tries.
            if isinstance(error, _LASTING) or self._failures >= _TRIES:
                raise
            return self._pause(error)
        if self._failures:
            self._log.info("The run can be reached again.")
            self._failures = 0
        return wait_s

    def _look(self) -> float | None:
        if self._controller is None:
            run, environment = self._open_run()
            if self._output is None and self._show_output:
                self._output = LogFollower(run)
            self._controller = open_controller(run, environment=environment, clock=self._clock)
            self._is_new = True
        if self._stop_at is not None and self._clock() >= self._stop_at:
            run, _ = self._open_run()
            request_stop(run, reason=self._stop_reason, owner=self._owner, cause="deadline")
            self._stop_at = None
        step = self._controller.step()
        self.state = step.state
        attempts = len(step.state.attempts)
        if step.done:  # the last output, then how it ended
            self._show(attempts, is_last=True)
        self._tell(step.events, step.state)
        if not step.done:
            self._show(attempts, is_last=False)
            if self._show_output:
                self._tell_progress(self._controller.spec, step)
        return None if step.done else step.wait_s

    def _tell(self, events: Sequence[e.Event], state: RunState) -> None:
        """Log what is new. A new controller tells the run's story from its beginning."""
        fresh = events[self._told :] if self._is_new else events
        self._told += len(fresh)
        self._is_new = False
        for event in fresh:
            if line := describe(event, state):
                getattr(self._log, is_bad(event) or "info", self._log.warning)("%s", line)

    def _tell_progress(self, spec: RunSpec, step: Step) -> None:
        """Say where the run stands: every ten seconds at first, every five minutes in the end."""
        now = self._clock()
        if self._began is None:
            self._began = self._progress_at = now
        assert self._progress_at is not None
        due_s = min(_PROGRESS_S[1], max(_PROGRESS_S[0], (now - self._began).total_seconds() / 10))
        if (now - self._progress_at).total_seconds() < due_s:
            return
        self._progress_at = now
        account = bill(step.state, now=now)
        cost = usd(account.total_usd, simulated=account.is_simulated)
        self._log.info("%s", progress_line(spec, step.state, step.heartbeat, cost=cost, now=now))

    def _show(self, attempts: int, *, is_last: bool) -> None:
        if self._output is None:
            return
        most = _LINES_PER_LOOK
        if not self._shown_before:
            # What was there before this process looked is in the log of the one that looked then.
            most = _LINES_BEFORE
            if self._output.skip_to_end(attempts, keep=1):
                self._log.info("(earlier output left out here)")
        lines = self._output.newest_lines(attempts, is_last=is_last)
        self._shown_before = True
        if len(lines) > most:
            self._log.info("(%d lines of output left out here)", len(lines) - most)
        for attempt, line in lines[-most:]:
            self._log.info("[attempt %d] %s", attempt, line)

    def _pause(self, error: Exception) -> float:
        self._controller = None
        self._failures += 1
        pause_s = min(_LONGEST_PAUSE_S, 2.0 ** min(self._failures, 10))
        if not isinstance(error, LostRace):
            self._log.warning(
                "Cannot look after the run now; trying again in %.0f s. It goes on by itself. %s: %s",
                pause_s, type(error).__name__, error,
            )  # fmt: skip
        return 0.1 if isinstance(error, LostRace) and self._failures < _TRIES else pause_s
