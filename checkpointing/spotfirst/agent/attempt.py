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
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec

from spotfirst.agent.command import Command, adopt_orphans, command_environment, reap_orphans
from spotfirst.agent.exits import Ending, classify, is_finished
from spotfirst.agent.fitness import environment_problem
from spotfirst.agent.freezing import Freezer
from spotfirst.agent.guard import Guard
from spotfirst.agent.limits import Purse
from spotfirst.agent.listening import Listener
from spotfirst.agent.logs import LogShipper
from spotfirst.agent.periodic import Periodic
from spotfirst.agent.preparing import Preparation
from spotfirst.agent.retrying import until_answered
from spotfirst.agent.settings import Settings
from spotfirst.agent.stopping import IDLE_S, Stop
from spotfirst.agent.telling import Teller
from spotfirst.channel import CHANNEL_VARIABLE, Channel, Drain
from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst.errors import ClaimLost, FormatError, InvalidSpec, SpotfirstError
from spotfirst.events import EndCause
from spotfirst.heartbeat import Progress
from spotfirst.run import Run
from spotfirst.spec import SPEC_DIGEST_VARIABLE, RunSpec
from spotfirst.storage import Storage
from spotfirst.wire import Clock, Record, encode, utc_now

__all__ = ["Agent", "AgentClaim"]

if TYPE_CHECKING:
    from spotfirst.agent.filemode import FileMode

_log = logging.getLogger(__name__)

_TICK_S = 0.05
_HOUSEKEEPING_S = 2.0
_LONG_START_S = 60.0
"""No warning of a missing Checkpointer before: imports and downloads take their time."""
_FLUSH_S = 10.0
_LINGER_S = 30.0
_REPORT_S = 20.0
"""For the end of the log and the last report, once the command is gone."""
_TERM_GRACE_S = 10.0
_FILES_GRACE_S = 5.0
"""What a script in files mode is given to end after SIGTERM when time is short."""

_End = tuple[EndCause, str, "int | None"]
"""Cause, message for people, exit code of the command."""


class AgentClaim(Record):
    """``attempts/{n}/agent.json``: who runs the attempt. Created once, so there is one agent."""

    attempt: int
    at: datetime
    nonce: str
    host: str
    pid: int


class Agent:
    """Runs one attempt to its end. Call ``boot``, then ``run``, in the main thread."""

    def __init__(
        self, settings: Settings, storage: Storage, *, guard: Guard, clock: Clock = utc_now
    ) -> None:
        self._settings = settings
        self._attempt = settings.attempt
        self._run = Run.on_instance(storage, settings.run_id, settings.spec_digest)
        self._guard = guard
        self._clock = clock
        self._folder = settings.folder
        for name in ("channel", "checkpoints", "dataset", "code"):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
        settings.cache.mkdir(parents=True, exist_ok=True)
        self._channel = Channel(self._folder / "channel")
        self._spec: RunSpec  # read at boot
        self._housekeeping_at = 0.0
        self._started_at = 0.0
        self.logs = LogShipper(self._put_segment, local=self._folder / "output.log")
        self._shipping = Periodic("ship the log", self._ship)
        self._guarded_s = 0.0
        self._tell = Teller(
            self._run, self._attempt, self.logs, clock=clock, notice=lambda: self._heard.notice
        )
        self._heard = Listener(
            self._run,
            settings,
            clock=clock,
            on_notice=self._on_notice,
            warn=self._tell.warn,
        )

    def terminate(self) -> None:
        """The instance is being shut down. Safe in a signal handler."""
        self._heard.terminate()

    def run(self) -> int:
        """The whole life after :meth:`boot`; the agent's exit code, 0 once the end is reported."""
        self._tell.start(self._spec.heartbeat_s)
        self._heard.start(
            notice_poll_s=self._spec.notice_poll_s, handover_poll_s=self._spec.heartbeat_s
        )
        self._shipping.start()
        self._keep_limits()
        try:
            cause, message, code = self._live()
        except Exception as error:  # noqa: BLE001 - the run goes on elsewhere; this says why
            _log.exception("the agent failed")
            cause, code = "lost", None
            message = f"the agent failed: {type(error).__name__}: {error}"
        self._heard.stop()
        self._shipping.stop(0)
        _log.info("ended: %s%s", cause, f": {message}" if message else "")
        self.logs.finish(within_s=self._flush_s())
        self._tell.report(cause, message, code)
        if cause == "interrupted":
            self._linger()
        return 0

    def _linger(self) -> None:
        """Leave an interrupted instance to the fleet, which may take it back free of charge.

        Ending it ourselves would make us pay for it (``spotfirst_airflow.costs`` has the rule).
        When it is not free, the controller terminates it; when the interruption does not come, or
        nobody said when, this ends by itself. So it does when the budget is spent before: the fleet
        may not keep its word.
        """
        interruption = self._heard.interruption
        if interruption is None or interruption.time is None:
            return
        until = interruption.time + timedelta(seconds=_LINGER_S)
        while self._heard.terminated_at is None and self._clock() < until:
            empty_at = self._heard.budget_ends()
            if empty_at is not None and self._clock() >= empty_at:
                return
            time.sleep(_TICK_S)

    # -- boot and preparation ---------------------------------------------------------------

    def boot(self) -> bool:
        """Read the spec and become this attempt's only agent.

        ``False`` when there is one, or when nobody waits for this attempt any more.
        """
        adopt_orphans()
        if not until_answered("read the journal", self._is_wanted):
            _log.warning("attempt %d is not wanted any more: nothing to do here", self._attempt)
            return False
        self._spec = until_answered("read the spec", self._run.spec)
        claim = encode(
            AgentClaim(
                attempt=self._attempt, at=self._clock(), nonce=secrets.token_hex(8),
                host=socket.gethostname(), pid=os.getpid(),
            )
        )  # fmt: skip
        path = self._run.attempt_path(self._attempt, "agent.json")
        if until_answered("look for another agent", self._has_traces) or not until_answered(
            "claim the attempt", lambda: self._run.storage.create(path, claim)
        ):
            _log.warning("attempt %d has an agent already: nothing to do here", self._attempt)
            return False
        if self._spec.max_life_s < self._heard.life_s:
            self._heard.life_s = self._spec.max_life_s
            self._guard.limit_life(self._spec.max_life_s)
        return True

    def _keep_limits(self) -> None:
        """Stop at the deadline and before the budget, also when no controller says so.

        The guard ends what does not stop then: an agent that hangs, or a last report to a storage
        that takes nothing.
        """
        self._heard.deadline = self._spec.deadline
        purse = Purse(self._run, self._attempt, self._spec, clock=self._clock)
        if purse.is_watched:
            Periodic("look at the budget", purse.look).start()
            self._heard.budget_ends = lambda: purse.empty_at
            self._heard.checkpoint_s = lambda: purse.checkpoint_s

    def _limit_life(self, step_s: float) -> None:
        """Have the guard end everything soon after the run's limits, as they are known now."""
        ends = self._heard.watch().run_ends(self._tell.progress, step_s)
        if ends is None:
            return
        life_s = (ends - self._heard.booted).total_seconds() + _REPORT_S
        life_s = max(_REPORT_S, min(life_s, self._heard.life_s))
        if abs(life_s - self._guarded_s) >= 1.0:
            self._guarded_s = life_s
            self._guard.limit_life(life_s)

    def _is_wanted(self) -> bool:
        """Whether the journal has not given this attempt up while its instance was booting.

        A launch whose answer was lost may come true after the controller has withdrawn it.
        """
        try:
            state = self._run.journal().refresh()
        except FormatError as error:  # of a newer release: no reason to leave what it launched
            _log.warning("cannot read the journal: %s", error)
            return True
        mine = [attempt for attempt in state.attempts if attempt.number == self._attempt]
        return not state.is_final and all(attempt.is_open for attempt in mine)

    def _has_traces(self) -> bool:
        return any(
            self._run.storage.exists(self._run.attempt_path(self._attempt, name))
            for name in ("exit.json", "heartbeat.json")
        )

    def _live(self) -> _End:
        preparation = Preparation(
            self._run, self._spec, self._attempt, self._folder, self._settings.cache,
            freezer=Freezer(
                spare=frozenset({self._guard.pid}), on_stopped=self._guard.watch_stopped
            ),
            clock=self._clock,
        )  # fmt: skip
        self._tell.enter("fetching")
        preparation.start()
        while not preparation.is_done:
            stop = self._heard.watch().stop(self._clock(), None)
            if stop is not None:
                preparation.leave()
                return self._ended(Ending(code=None), stop)
            self._limit_life(0.0)
            if preparation.is_waiting:
                self._tell.enter("standby")
            time.sleep(_TICK_S)
        self._tell.moved_bytes = preparation.moved_bytes
        self._tell.stamp(fetched=preparation.fetched_at)
        if isinstance(preparation.error, ClaimLost):
            return self._ended(Ending(code=None, superseded=True), None)
        if isinstance(preparation.error, SpotfirstError):
            return "script_failed", f"the attempt could not begin: {preparation.error}", None
        if preparation.error is not None:
            if problem := environment_problem(preparation.error):
                _log.error("the attempt cannot begin", exc_info=preparation.error)
                return "unfit", problem, None
            raise preparation.error
        stop = self._heard.watch().stop(self._clock(), None)
        if stop is not None:
            return self._ended(Ending(code=None), stop)
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
        self._tell.enter("starting")
        environment = command_environment(
            # torchrun's shared store hands ranks that it starts anew the addresses of dead ones.
            {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", **os.environ},
            self._spec.env,
            {
                "SPOTFIRST_STORAGE": self._settings.storage_url,
                "SPOTFIRST_RUN": self._settings.run_id,
                "SPOTFIRST_ATTEMPT": str(self._attempt),
                SPEC_DIGEST_VARIABLE: self._settings.spec_digest,
                CHANNEL_VARIABLE: str(self._folder / "channel"),
                "SPOTFIRST_CHECKPOINT_DIR": str(self._folder / "checkpoints"),
                "SPOTFIRST_CHECKPOINT_PERIOD_S": repr(self._spec.checkpoint_period_s),
            }
            | (
                {"SPOTFIRST_DATASET_DIR": str(self._folder / "dataset")}
                if self._spec.dataset
                else {}
            ),
        )
        command = Command(self._spec.command, self._folder / "code", environment, self.logs.feed)
        self._guard.watch_group(command.group)
        self._tell.stamp(started=self._clock())
        self._started_at = time.monotonic()
        return command

    # -- while the command runs -------------------------------------------------------------

    def _train(self, command: Command, preparation: Preparation) -> _End:
        files = preparation.files
        if files is not None:
            self._tell.enter("training")
            files.start(self._spec.checkpoint_period_s, command)
        stop: Stop | None = None
        drain_until = None
        began = self._clock()
        killed = has_notice = False
        while (code := command.poll()) is None or self._is_leaving(command, files, stop):
            self._look(command, preparation)
            now = self._clock()
            last_s = self._tell.step_s if files is None else _FILES_GRACE_S
            self._limit_life(last_s)
            wanted = self._heard.watch().stop(now, self._tell.progress, last_s)
            if files is not None and not has_notice and self._heard.interruption is not None:
                has_notice = True
                files.capture_now()
            if stop is None and wanted is not None:
                if files is not None and self._waits_for_save(files, wanted, now):
                    wanted = None
                else:
                    stop, began = wanted, now
                    self._drain(stop, command, preparation)
            if wanted is not None:  # a notice may come while a handover is under way
                drain_until = self._patience(wanted, began, preparation)
            killed = drain_until is not None and now >= drain_until
            if killed or (files is not None and files.superseded):
                break
            time.sleep(_TICK_S)
        if stop is None and code is not None:
            self._look(command, preparation)
            if code != 0 or not is_finished(self._tell.progress):
                self._heard.look_again()  # what made the script leave may be a moment behind
        has_more = files is not None and not command.is_over()
        if files is not None and has_more:
            files.signal(command, signal.SIGKILL)
        code = command.end()
        self._look(command, preparation)
        ending = Ending(code=code, killed=killed, terminated=files is not None and stop is not None)
        return self._ended(self._settle(ending, preparation, was_cut=has_more), stop)

    def _drain(self, stop: Stop, command: Command, preparation: Preparation) -> None:
        handover = self._heard.handover
        why = handover.reason if handover and stop.reason == "handover" else stop.reason
        _log.info("asking for a last checkpoint by %s: %s", f"{stop.by:%H:%M:%S}", why)
        self._tell.enter("draining")
        try:
            self._channel.ask_to_drain(Drain(reason=why, by=stop.by))
        except OSError as error:  # a full disk: what was checkpointed before is safe
            _log.warning("could not ask the trainer to drain: %s", error)
        if preparation.files is not None:
            preparation.files.signal(command, signal.SIGTERM)

    def _is_leaving(self, command: Command, files: FileMode | None, stop: Stop | None) -> bool:
        """Whether the first process has gone and others of the command still save their files."""
        return files is not None and stop is not None and not command.is_over()

    def _waits_for_save(self, files: FileMode, wanted: Stop, now: datetime) -> bool:
        """Whether a move to another instance waits for the script's own next save."""
        handover = self._heard.handover
        if wanted.reason != "handover" or handover is None or handover.to is None:
            return False
        wait_s = files.wait_for_save_s(now)
        if wait_s <= 0:
            return False
        self._heard.put_off_handover()
        return True

    def _patience(self, stop: Stop, began: datetime, preparation: Preparation) -> datetime:
        """Until when a draining command may run."""
        if preparation.files is not None:
            # The files can be captured only once nobody writes them any more.
            reserve = timedelta(seconds=2 * preparation.files.capture_s + 1.0)
            return min(stop.by - reserve, began + timedelta(seconds=_TERM_GRACE_S))
        progress = self._tell.progress
        if progress.timings.claimed is None and progress.step is None:
            return min(stop.by, began + timedelta(seconds=IDLE_S))
        return stop.by

    def _settle(self, ending: Ending, preparation: Preparation, *, was_cut: bool) -> Ending:
        """Keep what the command left behind; find out whether someone else has taken over.

        ``was_cut``: the first process had ended, or was killed, while others ran on.
        """
        files = preparation.files
        superseded = False
        if files is not None:
            heard = self._heard
            stopped = ending.terminated or heard.terminated_at or heard.interruption
            files.finish(
                by_itself=ending.code == 0 and not was_cut,
                asked=ending.terminated or was_cut,
                crashed=ending.code != 0 and not stopped,
            )
            self._tell.take(files.progress)
            superseded = files.superseded
        elif self._tell.progress.timings.drained is None:  # else it let go before anyone took
            chain = until_answered("read the checkpoint chain", self._run.chain().refresh)
            superseded = chain.holder is not None and chain.holder > self._attempt
            self._tell.take(self._with_newest_checkpoint(chain))
        return msgspec.structs.replace(ending, superseded=superseded)

    def _with_newest_checkpoint(self, chain: CheckpointChain) -> Progress:
        """The trainer's progress, or what the chain proves: on a full disk it cannot be written."""
        progress, newest = self._tell.progress, chain.newest()
        if newest is None or newest[1].attempt != self._attempt:
            return progress
        seq, step = newest[0], newest[1].step
        if progress.checkpoint_step is not None and progress.checkpoint_step >= step:
            return progress
        return msgspec.structs.replace(
            progress,
            step=max(step, progress.step or 0), checkpoint_step=step, checkpoint_seq=seq,
        )  # fmt: skip

    def _look(self, command: Command, preparation: Preparation) -> None:
        files = preparation.files
        progress = files.progress if files is not None else self._channel.progress()
        if progress is not None:
            self._tell.take(progress)
        now = time.monotonic()
        if now >= self._housekeeping_at:
            self._housekeeping_at = now + _HOUSEKEEPING_S
            reap_orphans({self._guard.pid, command.group})
            if progress is None:
                self._warn_of_no_checkpointer(now)

    def _warn_of_no_checkpointer(self, now: float) -> None:
        """Before an interruption proves it."""
        if any((self._folder / "checkpoints").iterdir()):
            self._tell.warn(
                "the script writes into $SPOTFIRST_CHECKPOINT_DIR but uses no Checkpointer, "
                'so nothing of it is kept: run with checkpoint_mode="files"'
            )
            return
        long_s = max(self._spec.checkpoint_period_s, _LONG_START_S)
        if now - self._started_at >= long_s:
            self._tell.warn(
                f"the script has run for {long_s:g} s and has restored no Checkpointer yet: an "
                "interruption would lose all of it. Add one to the script, or write checkpoints "
                'into $SPOTFIRST_CHECKPOINT_DIR and run with checkpoint_mode="files"'
            )

    # -- the end ----------------------------------------------------------------------------

    def _ended(self, ending: Ending, stop: Stop | None) -> _End:
        known = msgspec.structs.replace(
            ending,
            progress=self._tell.progress,
            asked=stop.reason if stop else None,
            interruption=self._heard.interruption is not None,
            shutdown=self._heard.terminated_at is not None,
        )
        cause, message = classify(known)
        return cause, message, ending.code

    def _flush_s(self) -> float:
        """The report matters more than the end of the log when time is short."""
        interruption = self._heard.interruption
        if interruption is None or interruption.time is None:
            return _FLUSH_S
        left_s = (interruption.time - self._clock()).total_seconds()
        return min(_FLUSH_S, max(0.2, left_s / 2))

    def _on_notice(self) -> None:
        self._tell.wake()

    def _put_segment(self, number: int, data: bytes) -> None:
        self._run.storage.create(self._run.log_path(self._attempt, number), data)

    def _ship(self) -> float:
        self.logs.ship()
        return self._settings.log_period_s
