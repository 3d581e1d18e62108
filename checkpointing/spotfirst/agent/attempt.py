"""The life of one attempt: boot, fetch, run, drain, report.

The main thread runs a loop of fifty milliseconds that never calls the storage: it watches the
command and the trainer's progress, and decides. What may block runs beside it, each in a thread
of its own: beats, the look for a handover, notices, the log, and the preparation. So an outage of
the storage delays what is told, and never what is done about a notice.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TypeVar

import msgspec

from spotfirst.agent.command import Command, adopt_orphans, command_environment, reap_orphans
from spotfirst.agent.exits import Ending, classify
from spotfirst.agent.guard import Guard
from spotfirst.agent.logs import LogShipper
from spotfirst.agent.notices import NoticeSource
from spotfirst.agent.periodic import Periodic
from spotfirst.agent.preparing import Preparation
from spotfirst.agent.settings import Settings
from spotfirst.agent.stopping import IDLE_S, Stop, Watch
from spotfirst.channel import CHANNEL_VARIABLE, Channel, Drain
from spotfirst.errors import (
    ClaimLost,
    InvalidSpec,
    SpotfirstError,
    StorageDenied,
    StorageUnavailable,
)
from spotfirst.events import EndCause
from spotfirst.heartbeat import AgentPhase, ExitReport, Handover, Heartbeat, Progress, Timings
from spotfirst.market import Notice
from spotfirst.run import Run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage
from spotfirst.wire import Clock, Record, encode, utc_now

__all__ = ["Agent", "AgentClaim"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_TICK_S = 0.05
_HANDOVER_POLL_S = 0.25
_SLOW_HANDOVER_POLL_S = 5.0
_HOUSEKEEPING_S = 5.0
_DENIED_S = 60.0
"""A new instance's role may take this long to be known everywhere."""
_FLUSH_S = 10.0
_TERM_GRACE_S = 10.0


class AgentClaim(Record):
    """``attempts/{n}/agent.json``: who runs the attempt. Created once, so there is one agent."""

    attempt: int
    at: datetime
    nonce: str
    host: str
    pid: int


class Agent:
    """Runs one attempt to its end. ``run`` must be called in the main thread."""

    def __init__(
        self, settings: Settings, storage: Storage, *, guard: Guard, clock: Clock = utc_now
    ) -> None:
        self._settings = settings
        self._attempt = settings.attempt
        self._run = Run(storage, settings.run_id)
        self._guard = guard
        self._clock = clock
        self._booted = clock()
        self._folder = settings.folder
        self._channel = Channel(self._folder / "channel")
        self._spec: RunSpec  # read at boot
        self._life_s = settings.max_life_s

        # Each of these has one writer, and is replaced, never changed in place.
        self._phase: AgentPhase = "booting"
        self._timings = Timings(booted=self._booted)
        self._progress: Progress | None = None
        self._warnings: tuple[str, ...] = ()
        self._notice: Notice | None = None
        self._handover: Handover | None = None
        self._handover_at: datetime | None = None
        self._terminated_at: datetime | None = None
        self._preparation: Preparation | None = None
        self._beat = 0
        self._step_s = 0.0
        self._step_seen: tuple[int, float] | None = None
        self._told: tuple[object, ...] = ()
        self._housekeeping_at = 0.0

        for name in ("channel", "checkpoints", "dataset", "code"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        settings.cache.mkdir(parents=True, exist_ok=True)
        self.logs = LogShipper(self._put_segment, local=self._folder / "output.log")
        self._beats = Periodic("heartbeat", self._send_beat)
        self._handovers = Periodic("look for a handover", self._look_for_handover)
        self._notices = Periodic("notices", self._look_for_notice)
        self._shipping = Periodic("log", self._ship)
        self._source = NoticeSource(settings.metadata_url, clock=clock)

    def terminate(self) -> None:
        """The instance is being shut down. Safe in a signal handler."""
        self._terminated_at = self._terminated_at or self._clock()

    def run(self) -> int:
        """The whole life; the agent's exit code, which is 0 once the end is reported."""
        adopt_orphans()
        if not self._boot():
            return 0
        for thread in (self._beats, self._handovers, self._notices, self._shipping):
            thread.start()
        try:
            cause, message, code = self._live()
        except Exception as error:
            _log.exception("the agent failed")
            cause, message, code = (
                "lost",
                f"the agent failed: {type(error).__name__}: {error}",
                None,
            )
        self._report(cause, message, code)
        return 0

    # -- boot and preparation ---------------------------------------------------------------

    def _boot(self) -> bool:
        """Read the spec and become this attempt's only agent; ``False`` when there is one."""
        self._spec = self._patiently("read the spec", self._run.spec)
        if self._patiently("look for another agent", self._has_traces):
            _log.warning("attempt %d has run elsewhere: nothing to do here", self._attempt)
            return False
        claim = encode(
            AgentClaim(
                attempt=self._attempt, at=self._clock(), nonce=secrets.token_hex(8),
                host=socket.gethostname(), pid=os.getpid(),
            )
        )  # fmt: skip
        path = self._run.attempt_path(self._attempt, "agent.json")
        if not self._patiently("claim", lambda: self._run.storage.create(path, claim)):
            _log.warning("attempt %d has an agent elsewhere: nothing to do here", self._attempt)
            return False
        if self._spec.max_life_s < self._life_s:
            self._life_s = self._spec.max_life_s
            self._guard.limit_life(self._life_s)
        return True

    def _has_traces(self) -> bool:
        return any(
            self._run.storage.exists(self._run.attempt_path(self._attempt, name))
            for name in ("exit.json", "heartbeat.json")
        )

    def _live(self) -> tuple[EndCause, str, int | None]:
        """(cause, message, exit code of the command)."""
        self._enter("fetching")
        preparation = Preparation(
            self._run, self._spec, self._attempt, self._folder, self._settings.cache,
            patiently=self._patiently,
        )  # fmt: skip
        self._preparation = preparation
        preparation.start()
        while not preparation.is_done:
            stop = self._watch().stop(self._clock(), None)
            if stop is not None:
                preparation.leave()
                return self._ended(Ending(code=None), stop)
            if preparation.is_waiting:
                self._enter("standby")
            time.sleep(_TICK_S)
        if isinstance(preparation.error, ClaimLost):
            return self._ended(Ending(code=None, superseded=True), None)
        if isinstance(preparation.error, SpotfirstError):
            return "script_failed", f"the attempt could not begin: {preparation.error}", None
        if preparation.error is not None:
            raise preparation.error
        self._stamp(fetched=preparation.fetched_at)
        try:
            command = self._start_command()
        except InvalidSpec as error:
            return "script_failed", str(error), None
        try:
            return self._train(command, preparation)
        finally:
            command.end()
            self._guard.watch_group(0)

    def _start_command(self) -> Command:
        self._enter("starting")
        environment = command_environment(
            os.environ,
            self._spec.env,
            {
                "SPOTFIRST_STORAGE": self._settings.storage_url,
                "SPOTFIRST_RUN": self._settings.run_id,
                "SPOTFIRST_ATTEMPT": str(self._attempt),
                CHANNEL_VARIABLE: str(self._folder / "channel"),
                "SPOTFIRST_CHECKPOINT_DIR": str(self._folder / "checkpoints"),
                "SPOTFIRST_CHECKPOINT_PERIOD_S": repr(self._spec.checkpoint_period_s),
                "SPOTFIRST_DATASET_DIR": str(self._folder / "dataset"),
            },
        )
        command = Command(
            self._spec.command, self._folder / "code", environment, self.logs.feed,
            spare={self._guard.pid},
        )  # fmt: skip
        self._guard.watch_group(command.group)
        self._stamp(started=self._clock())
        return command

    # -- while the command runs -------------------------------------------------------------

    def _train(
        self, command: Command, preparation: Preparation
    ) -> tuple[EndCause, str, int | None]:
        files = preparation.files
        if files is not None:
            self._enter("training")
            files.start(self._spec.checkpoint_period_s)
        stop: Stop | None = None
        began = self._clock()
        terminated = killed = False
        while (code := command.poll()) is None:
            self._look_at_progress(command)
            now = self._clock()
            wanted = self._watch().stop(now, self._seen(), self._step_s)
            if stop is None and wanted is not None:
                stop, began = wanted, now
                self._ask_to_drain(stop)
                if files is not None:
                    command.signal(signal.SIGTERM)
                    terminated = True
            if files is not None and files.superseded:
                break
            if stop is not None and now >= self._kill_at(wanted or stop, began):
                killed = True
                break
            time.sleep(_TICK_S)
        if code == -signal.SIGTERM and not terminated:
            time.sleep(0.2)  # our own signal, of the same shutdown, may be a moment behind
        code = command.end()
        self._look_at_progress(command)
        ending = Ending(code=code, terminated=terminated, killed=killed)
        if files is not None:
            if code == 0 or stop is not None:
                files.finish(self._patiently)
            ending = msgspec.structs.replace(ending, superseded=files.superseded)
        elif self._seen().timings.drained is None:  # else it let go before anyone took
            superseded = self._patiently("read the checkpoint chain", self._is_superseded)
            ending = msgspec.structs.replace(ending, superseded=superseded)
        return self._ended(ending, stop)

    def _ask_to_drain(self, stop: Stop) -> None:
        why = self._handover.reason if self._handover and stop.reason == "handover" else stop.reason
        _log.info("asking for a last checkpoint by %s: %s", f"{stop.by:%H:%M:%S}", why)
        self._enter("draining")
        try:
            self._channel.ask_to_drain(Drain(reason=why, by=stop.by))
        except OSError as error:  # a full disk: what was checkpointed before is safe
            _log.warning("could not ask the trainer to drain: %s", error)

    def _kill_at(self, stop: Stop, began: datetime) -> datetime:
        """When patience with a draining command is over."""
        preparation = self._preparation
        if preparation is not None and preparation.files is not None:
            # The files can be captured only once nobody writes them any more.
            reserve_s = 2 * preparation.files.capture_s + 1.0
            latest = stop.by - timedelta(seconds=reserve_s)
            return min(latest, began + timedelta(seconds=_TERM_GRACE_S))
        progress = self._progress
        if progress is None or (progress.timings.claimed is None and progress.step is None):
            return min(stop.by, began + timedelta(seconds=IDLE_S))
        return stop.by

    def _look_at_progress(self, command: Command) -> None:
        self._progress = self._channel.progress() or self._progress
        progress = self._progress
        now = time.monotonic()
        if progress is not None and progress.step is not None:
            seen = self._step_seen
            if seen is None or progress.step != seen[0]:
                if seen is not None and progress.step > seen[0]:
                    self._step_s = (now - seen[1]) / (progress.step - seen[0])
                self._step_seen = (progress.step, now)
        if now >= self._housekeeping_at:
            self._housekeeping_at = now + _HOUSEKEEPING_S
            reap_orphans({self._guard.pid, command.group})
            self._look_for_forgotten_checkpoints()
        self._wake_for_news()

    def _look_for_forgotten_checkpoints(self) -> None:
        """Warn about files that nobody saves, before an interruption proves it."""
        if self._warnings or self._progress is not None or self._spec.checkpoint_mode == "files":
            return
        if any((self._folder / "checkpoints").iterdir()):
            message = (
                "the script writes into $SPOTFIRST_CHECKPOINT_DIR but uses no Checkpointer, so "
                'nothing of it is kept: run with checkpoint_mode="files"'
            )
            self._warnings = (message,)
            _log.warning("%s", message)

    def _is_superseded(self) -> bool:
        chain = self._run.chain().refresh()
        return chain.holder is not None and chain.holder > self._attempt

    # -- the end ----------------------------------------------------------------------------

    def _ended(self, ending: Ending, stop: Stop | None) -> tuple[EndCause, str, int | None]:
        notice = self._notice
        known = msgspec.structs.replace(
            ending,
            progress=self._seen(),
            asked=stop.reason if stop else None,
            interruption=notice is not None and notice.kind == "interruption",
            shutdown=self._terminated_at is not None,
        )
        cause, message = classify(known)
        return cause, message, ending.code

    def _report(self, cause: EndCause, message: str, code: int | None) -> None:
        for thread in (self._handovers, self._notices):
            thread.stop(0)
        self._shipping.stop(0)
        _log.info("ended: %s%s", cause, f": {message}" if message else "")
        self.logs.finish(within_s=self._flush_s())
        report = ExitReport(
            attempt=self._attempt, at=self._clock(), cause=cause, exit_code=code, message=message,
            log_tail=self.logs.tail(), progress=self._merged(), log_segments=self.logs.segments,
            moved_bytes=self._moved_bytes(),
        )  # fmt: skip
        self._patiently("report the end", lambda: self._run.report_exit(report))
        # After the report, which says more; a beat that is under way must not come after ours.
        self._beats.stop(2.0)
        self._phase = "exited"
        try:
            self._send_beat()
        except SpotfirstError as error:
            _log.warning("no last beat: %s", error)

    def _flush_s(self) -> float:
        """The report matters more than the end of the log when time is short."""
        notice = self._notice
        if notice is None or notice.time is None:
            return _FLUSH_S
        left_s = (notice.time - self._clock()).total_seconds()
        return min(_FLUSH_S, max(0.2, left_s / 2))

    # -- what is told -----------------------------------------------------------------------

    def _enter(self, phase: AgentPhase) -> None:
        if phase != self._phase:
            self._phase = phase
            self._wake_for_news()

    def _stamp(self, **times: datetime | None) -> None:
        self._timings = msgspec.structs.replace(self._timings, **times)

    def _wake_for_news(self) -> None:
        """Beat at once for what a controller or a successor waits for."""
        progress = self._seen()
        news = (
            self._shown_phase(),
            progress.checkpoint_seq,
            progress.timings.first_step is not None,
            progress.released,
            progress.warnings,
            self._warnings,
        )
        if news != self._told:
            self._told = news
            self._beats.wake()

    def _seen(self) -> Progress:
        """The trainer's progress, or what the agent knows of files that it captures itself."""
        if self._progress is not None:
            return self._progress
        files = self._preparation.files if self._preparation else None
        return files.progress if files is not None else Progress()

    def _shown_phase(self) -> AgentPhase:
        """The trainer knows better than the agent once it runs; a drain is shown by either."""
        if self._phase == "starting" and self._progress is not None:
            return self._progress.phase
        return self._phase

    def _merged(self) -> Progress:
        progress = self._seen()
        changes = {
            name: value
            for name, value in msgspec.structs.asdict(self._timings).items()
            if value is not None and getattr(progress.timings, name) is None
        }
        return msgspec.structs.replace(
            progress,
            timings=msgspec.structs.replace(progress.timings, **changes),
            warnings=(*progress.warnings, *self._warnings),
        )

    def _moved_bytes(self) -> int:
        return self._preparation.moved_bytes if self._preparation else 0

    def _send_beat(self) -> float:
        self._beat += 1
        self._run.beat(
            Heartbeat(
                attempt=self._attempt, beat=self._beat, at=self._clock(),
                phase=self._shown_phase(), progress=self._merged(), notice=self._notice,
                log_segments=self.logs.segments, moved_bytes=self._moved_bytes(),
            )
        )  # fmt: skip
        return self._spec.heartbeat_s

    def _put_segment(self, number: int, data: bytes) -> None:
        self._run.storage.create(self._run.log_path(self._attempt, number), data)

    def _ship(self) -> float:
        self.logs.ship()
        return self._settings.log_period_s

    # -- what is heard ----------------------------------------------------------------------

    def _watch(self) -> Watch:
        notice = self._notice
        interruption = notice if notice is not None and notice.kind == "interruption" else None
        return Watch(
            booted=self._booted,
            life_ends=self._booted + timedelta(seconds=self._life_s),
            interruption_at=interruption.time if interruption else None,
            interruption_seen=interruption.seen_at if interruption else None,
            terminated_at=self._terminated_at,
            handover_at=self._handover_at,
            patience_s=self._settings.drain_patience_s,
            shutdown_window_s=self._settings.shutdown_window_s,
        )

    def _look_for_notice(self) -> float:
        found = self._source.poll()
        known = self._notice
        if found is not None and (known is None or _is_graver(found, known)):
            when = f" at {found.time:%H:%M:%S}" if found.time else ""
            _log.info("notice: %s%s", found.kind, when)
            # When it was first seen is what the window is measured from.
            self._notice = found
            self._beats.wake()
            self._handovers.wake()
        return self._spec.notice_poll_s

    def _look_for_handover(self) -> float:
        handover = self._run.handover(self._attempt)
        if handover is not None:
            _log.info("handover to attempt %s: %s", handover.to, handover.reason)
            self._handover, self._handover_at = handover, self._clock()
            return float("inf")
        if self._notice is not None:
            return _HANDOVER_POLL_S
        return min(self._spec.heartbeat_s, _SLOW_HANDOVER_POLL_S)

    def _patiently(self, what: str, call: Callable[[], _T]) -> _T:
        """Call until the storage answers. The guard ends what waits longer than its life."""
        denied_until = time.monotonic() + _DENIED_S
        waiting = False
        while True:
            try:
                return call()
            except StorageUnavailable as error:
                problem: SpotfirstError = error
            except StorageDenied as error:
                if time.monotonic() > denied_until:
                    raise
                problem = error
            if not waiting:
                _log.warning("waiting for the storage to %s: %s", what, problem)
            waiting = True
            time.sleep(1.0)


def _is_graver(found: Notice, known: Notice) -> bool:
    if found.kind == known.kind:
        return found.time != known.time and found.time is not None
    return found.kind == "interruption"
