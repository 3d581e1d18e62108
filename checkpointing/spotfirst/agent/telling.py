"""What an attempt tells: heartbeats, at once when something is new, and the exit report."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime

import msgspec

from spotfirst.agent.logs import LogShipper
from spotfirst.agent.periodic import Periodic
from spotfirst.agent.retrying import until_answered
from spotfirst.checkpoints.period import Period
from spotfirst.errors import SpotfirstError
from spotfirst.events import EndCause
from spotfirst.heartbeat import AgentPhase, ExitReport, Heartbeat, Progress, Timings, clipped
from spotfirst.market import Notice
from spotfirst.run import Run
from spotfirst.wire import Clock, plausible

__all__ = ["Teller"]

_log = logging.getLogger(__name__)

_LAST_BEAT_S = 2.0
_REPORT_DENIED_S = 3600.0
"""Without its report a finished training is begun once more, and then has nothing to do."""


class Teller:
    """Each field has one writer, and is replaced as a whole; beats go out beside the main loop."""

    def __init__(
        self,
        run: Run,
        attempt: int,
        logs: LogShipper,
        *,
        clock: Clock,
        notice: Callable[[], Notice | None],
    ) -> None:
        self._run, self._attempt, self._logs = run, attempt, logs
        self._clock, self._notice = clock, notice
        self._beats = Periodic("heartbeat", self._beat)
        self._heartbeat_s = 1.0
        self._number = 0
        self._told: tuple[object, ...] = ()
        self._period: Period | None = None
        self._step_seen: tuple[int, float] | None = None
        self._timings = Timings(booted=clock())
        self._trains = False
        self.phase: AgentPhase = "booting"
        self.progress = Progress()
        """The trainer's, or in files mode the agent's own."""
        self.warnings: tuple[str, ...] = ()
        self.moved_bytes = 0
        self.step_s = 0.0
        """How long the newest step took; 0 until two have been seen."""

    def start(self, heartbeat_s: float) -> None:
        """Beat this often from now on, and whenever there is news."""
        self._heartbeat_s = heartbeat_s
        self._beats.start()

    def wake(self) -> None:
        """Beat now."""
        self._beats.wake()

    def enter(self, phase: AgentPhase) -> None:
        """The agent's phase. While the command is ``starting``, the trainer's own is shown."""
        if phase != self.phase:
            self.phase = phase
            self._tell_news()

    def stamp(self, **times: datetime | None) -> None:
        """Set fields of the timings."""
        self._timings = msgspec.structs.replace(self._timings, **times)

    def take(self, progress: Progress) -> None:
        """The newest progress."""
        now = time.monotonic()
        self._note(progress)
        if progress.step is not None:
            seen = self._step_seen
            if seen is None or progress.step != seen[0]:
                if seen is not None and progress.step > seen[0]:
                    self.step_s = (now - seen[1]) / (progress.step - seen[0])
                self._step_seen = (progress.step, now)
        self.progress, self._trains = progress, True
        self._tell_news()

    def _note(self, progress: Progress) -> None:
        """Log what the trainer decides: a script shows nothing of it unless it sets up logging."""
        period = progress.period
        if period is not None and period.differs(self._period):
            self._period = period
            _log.info("%s", period)
        for reason in progress.leaving[len(self.progress.leaving) :]:
            _log.info("leaving, %s", reason)

    def warn(self, message: str) -> None:
        """Put a warning before people, once."""
        if message not in self.warnings:
            self.warnings = (*self.warnings, message)
            _log.warning("%s", message)
            self._tell_news()

    def report(self, cause: EndCause, message: str, code: int | None) -> None:
        """The last word, and a last beat."""
        report = clipped(ExitReport(
            attempt=self._attempt, at=self._clock(), cause=cause, exit_code=code, message=message,
            log_tail=self._logs.tail(), progress=self._merged(),
            log_segments=self._logs.segments, moved_bytes=self.moved_bytes,
        ))  # fmt: skip
        until_answered(
            "report the end", lambda: self._run.report_exit(report), denied_s=_REPORT_DENIED_S
        )
        # After the report, which says more. A beat that is under way must not come after ours.
        self._beats.stop(_LAST_BEAT_S)
        self.phase = "exited"
        try:
            self._beat()
        except SpotfirstError as error:
            _log.warning("no last beat: %s", error)

    def _tell_news(self) -> None:
        """Beat at once for what a controller, a successor or a person waits for."""
        progress = self.progress
        news = (
            self._shown_phase(), progress.checkpoint_seq, progress.released, progress.warnings,
            progress.timings.first_step is not None, self.warnings,
        )  # fmt: skip
        if news != self._told:
            self._told = news
            self._beats.wake()

    def _shown_phase(self) -> AgentPhase:
        return self.progress.phase if self._trains and self.phase == "starting" else self.phase

    def _merged(self) -> Progress:
        """The trainer's progress with what only the agent knows."""
        progress = self.progress
        changes = {
            name: value
            for name, value in msgspec.structs.asdict(self._timings).items()
            if value is not None and getattr(progress.timings, name) is None
        }
        merged = msgspec.structs.replace(
            progress,
            timings=msgspec.structs.replace(progress.timings, **changes),
            warnings=(*progress.warnings, *self.warnings),
        )
        return plausible(merged)  # what a controller would refuse must not silence the rest

    def _beat(self) -> float:
        self._number += 1
        beat = Heartbeat(
            attempt=self._attempt, beat=self._number, at=self._clock(),
            phase=self._shown_phase(), progress=self._merged(), notice=self._notice(),
            log_segments=self._logs.segments, moved_bytes=self.moved_bytes,
        )  # fmt: skip
        self._run.beat(clipped(beat))
        return self._heartbeat_s
