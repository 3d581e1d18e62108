"""What runs on a simulated instance: an agent that beats, trains, checkpoints and hands over.

Machines and training are simulated; what decides is production's own: the notices are read by
:class:`~spotfirst.agent.notices.NoticeSource`, :class:`~spotfirst.agent.stopping.Watch` says when
to drain, :class:`~spotfirst.agent.limits.Purse` when the budget is spent, :func:`~spotfirst.checkpoints.claiming.wait_for_claim` when the chain may be claimed, and
:func:`~spotfirst.agent.exits.classify` how an attempt ended.
"""

from __future__ import annotations

import contextlib
import random
from datetime import datetime, timedelta
from typing import Any

import msgspec

from spotfirst.agent.exits import Ending, StopReason, classify
from spotfirst.agent.limits import Purse
from spotfirst.agent.stopping import Watch
from spotfirst.checkpoints.claiming import HANDOVER_PATIENCE_S, wait_for_claim
from spotfirst.errors import ClaimLost, StorageDenied, StorageUnavailable
from spotfirst.heartbeat import AgentPhase, ExitReport, Heartbeat, Progress, Timings
from spotfirst.market import Notice
from spotfirst.run import Run
from spotfirst.storage import Storage
from tests.fakes.cloud import CloudInstance
from tests.fakes.imds import Imds, SimulatedNoticeSource

_LINGER_S = 30.0
_PURSE_S = 5.0
_REPORT_S = 20.0
_TAGS = "/latest/meta-data/tags/instance/spotfirst:"


class Work:
    """What is trained, and how it may go wrong. Shares are of attempts."""

    def __init__(
        self,
        *,
        total_steps: int = 60,
        step_s: float = 5.0,
        checkpoint_every: int = 10,
        checkpoint_s: float = 6.0,
        start_s: float = 30.0,
        crash_share: float = 0.0,
        mute_share: float = 0.0,
        dud_share: float = 0.0,
        stall_share: float = 0.0,
        checkpoint_bytes: int = 0,
        new_bytes: int = 0,
    ) -> None:
        self.total_steps, self.step_s = total_steps, step_s
        self.checkpoint_every, self.checkpoint_s = checkpoint_every, checkpoint_s
        self.checkpoint_bytes, self.new_bytes = checkpoint_bytes, new_bytes
        """What a restore reads, and what each checkpoint writes."""
        self.start_s, self.crash_share, self.mute_share = start_s, crash_share, mute_share
        self.dud_share = dud_share
        """Of instances: never boot, so that not even their timer ends them."""
        self.stall_share = stall_share
        """Their last checkpoint takes so long that a successor claims the chain meanwhile."""


class SimulatedAgent:
    """The agent and its trainer on one instance. ``storage`` is how this instance sees it."""

    def __init__(self, instance: CloudInstance, storage: Storage, work: Work) -> None:
        self.instance, self.work = instance, work
        self._random = random.Random(f"agent/{instance.cloud.seed}/{instance.instance_id}")
        self._clock = instance.cloud.clock
        imds = Imds(instance)
        self.attempt = int(_tag(imds, "attempt"))
        self._run_id = _tag(imds, "run")
        self.see_through(storage)
        self._notices = SimulatedNoticeSource(instance, self._clock)
        self.spec = self.run.spec()
        self._purse = Purse(self.run, self.attempt, self.spec, clock=self._clock)
        self._purse_at = instance.running_at
        self.phase: AgentPhase = "booting"
        self.progress = Progress(total_steps=work.total_steps)
        self.notice: Notice | None = None
        self.handover_at: datetime | None = None
        self.report: ExitReport | None = None
        self._reported = False
        self.was_fenced = False
        """Whether it wanted to write when a newer attempt had the claim."""
        self._is_only_agent: bool | None = None
        self._knows_it_is_wanted = False
        self._beats = 0
        self._beat_at = self._notice_at = self._handover_look_at = instance.running_at
        self._ready_at = instance.running_at + timedelta(
            seconds=self._random.uniform(0.5, 1.5) * work.start_s
        )
        self._asked: tuple[int, datetime] | None = None
        self._step_done_at: datetime | None = None
        self._saving_until: datetime | None = None
        self._stop: StopReason | None = None
        self.is_dud = self._random.random() < work.dud_share
        draw = self._random.random()
        bad_step = self._random.randrange(1, 2 * work.checkpoint_every)
        self._crash_after = bad_step if draw < work.crash_share else None
        self._mute_after = (
            bad_step if work.crash_share <= draw < work.crash_share + work.mute_share else None
        )
        is_stalled = self._random.random() < work.stall_share
        self._drain_s = 2 * HANDOVER_PATIENCE_S if is_stalled else work.checkpoint_s

    def see_through(self, storage: Storage) -> None:
        """How the instance reaches the storage."""
        self.run = Run(storage, self._run_id)
        self.chain = self.run.chain()
        self.chain._clock = self._clock  # the files of a run are all written by one clock here
        if hasattr(self, "spec"):
            self._purse = Purse(self.run, self.attempt, self.spec, clock=self._clock)

    @property
    def now(self) -> datetime:
        return self._clock.now

    @property
    def is_mute(self) -> bool:
        """Whether it hangs: no beat, no step."""
        return self._mute_after is not None and self._steps >= self._mute_after

    @property
    def _steps(self) -> int:
        return (self.progress.step or 0) - (self.progress.start_step or 0)

    def tick(self) -> None:
        """Do what is due. What a storage does not answer is done again at the next tick."""
        if not self.instance.is_running or self.now < self.instance.running_at or self.is_dud:
            return
        life_s = (self.now - self.instance.launched_at).total_seconds()
        if life_s >= self.spec.max_life_s:  # the timer of the user data
            self.instance.end("itself")
            return
        ends = self._watch().run_ends(self.progress, self.work.step_s)
        if ends is not None and self.now >= ends + timedelta(seconds=_REPORT_S):  # the guard
            self.instance.end("itself")
            return
        if self.is_mute:
            return
        try:
            self._tick()
        except ClaimLost:
            self.was_fenced = True
            self._end(Ending(code=None, superseded=True))
        except (StorageUnavailable, StorageDenied):
            return

    def _tick(self) -> None:
        if self._is_only_agent is None:
            path = self.run.attempt_path(self.attempt, "agent.json")
            owner = self.instance.instance_id.encode()
            self._is_only_agent = self.run.storage.create(path, owner)
        if not self._is_only_agent or not self._is_wanted():
            self.instance.end("itself")
            return
        self._look()
        if self.report is not None:
            self._leave(self.report)
        elif self.phase == "draining":
            self._drain()
        elif self._wants_to_stop():
            self.phase = "draining"
            self._tell(phase="draining")
            if self.progress.step is None:
                self._end(Ending(code=None))
            else:
                self._saving_until = self.now + timedelta(seconds=self._drain_s)
        elif self.phase == "training":
            self._train()
        elif self.now >= self._ready_at:
            self._claim()
        self._beat()

    def _is_wanted(self) -> bool:
        """Whether the journal had not given the attempt up when it booted."""
        if not self._knows_it_is_wanted:
            state = self.run.journal().refresh()
            mine = [attempt for attempt in state.attempts if attempt.number == self.attempt]
            if state.is_final or not all(attempt.is_open for attempt in mine):
                return False
            self._knows_it_is_wanted = True
        return True

    # -- looking ----------------------------------------------------------------------------

    def _look(self) -> None:
        if self._purse.is_watched and self.now >= self._purse_at:
            self._purse_at = self.now + timedelta(seconds=_PURSE_S)
            with contextlib.suppress(StorageUnavailable):
                self._purse_at = self.now + timedelta(seconds=self._purse.look())
        if self.now >= self._notice_at:
            self._notice_at = self.now + timedelta(seconds=self.spec.notice_poll_s)
            found = self._notices.poll()
            known = self.notice
            if found and (
                known is None or (known.kind, found.kind) == ("rebalance", "interruption")
            ):
                self.notice = found
        if self.now >= self._handover_look_at and self.handover_at is None:
            self._handover_look_at = self.now + timedelta(
                seconds=1 if self.notice else self.spec.heartbeat_s
            )
            if self.run.handover(self.attempt) is not None:
                self.handover_at = self.now

    def _watch(self) -> Watch:
        notice = self.notice
        interruption = notice if notice and notice.kind == "interruption" else None
        return Watch(
            deadline=self.spec.deadline,
            budget_ends=self._purse.empty_at,
            checkpoint_s=self._purse.checkpoint_s,
            life_ends=self.instance.launched_at + timedelta(seconds=self.spec.max_life_s),
            interruption_at=interruption.time if interruption else None,
            interruption_seen=interruption.seen_at if interruption else None,
            handover_at=self.handover_at,
            booted=self.instance.running_at,
        )

    def _wants_to_stop(self) -> bool:
        stop = self._watch().stop(self.now, self.progress, self.work.step_s)
        self._stop = stop.reason if stop else None
        return stop is not None

    # -- training ---------------------------------------------------------------------------

    def _claim(self) -> None:
        """One look of the waiting successor; it goes on with the next tick."""
        self.chain.refresh()
        holder, asked = self.chain.holder, self._asked
        if holder is not None and (asked is None or asked[0] != holder):
            asked = self._asked = (holder, self.now)
        waited_s = (self.now - asked[1]).total_seconds() if asked else 0.0
        looks = iter((False, True))
        self.phase = "standby"
        claimed = wait_for_claim(
            self.run, self.chain, self.attempt, leave=lambda: next(looks),
            patience_s=max(0.0, HANDOVER_PATIENCE_S - waited_s), clock=self._clock,
            monotonic=self._clock.monotonic, sleep=lambda _: None,
        )  # fmt: skip
        if not claimed:
            return
        newest = self.chain.newest()
        step = newest[1].step if newest else 0
        self.phase = "training"
        self._step_done_at = self.now + timedelta(seconds=self.work.step_s)
        timings = Timings(claimed=self.now, first_step=self.now)
        self._tell(phase="training", start_step=step, step=step, timings=timings)

    def _train(self) -> None:
        if self._saving_until is not None:
            if self.now < self._saving_until:
                return
            self._commit()
            self._saving_until = None
            self._step_done_at = self.now + timedelta(seconds=self.work.step_s)
        step = self.progress.step or 0
        while (
            step < self.work.total_steps and self._step_done_at and self.now >= self._step_done_at
        ):
            step += 1
            timings = msgspec.structs.replace(self.progress.timings, last_step=self._step_done_at)
            self._step_done_at += timedelta(seconds=self.work.step_s)
            self._tell(step=step, timings=timings)
            if self._crash_after is not None and self._steps >= self._crash_after:
                self._end(Ending(code=1))
                return
            if step == self.work.total_steps or step % self.work.checkpoint_every == 0:
                self._saving_until = self.now + timedelta(seconds=self.work.checkpoint_s)
                return
        if step >= self.work.total_steps:
            self._end(Ending(code=0))

    def _drain(self) -> None:
        if self._saving_until is not None and self.now < self._saving_until:
            return
        if not self.progress.released:
            if self.progress.step != self.progress.checkpoint_step:
                self._commit()
            self.chain.release(self.attempt)
            self._tell(released=True)
        self._end(Ending(code=0))

    def _commit(self) -> None:
        step = self.progress.step or 0
        seq = self.chain.commit(
            self.attempt, step=step, manifest=f"{step}", digest=f"{step}", content="state",
            size_bytes=self.work.checkpoint_bytes, new_bytes=self.work.new_bytes,
        )  # fmt: skip
        self._tell(checkpoint_step=step, checkpoint_seq=seq, checkpoint_s=self.work.checkpoint_s)

    def _tell(self, **changes: Any) -> None:
        self.progress = msgspec.structs.replace(self.progress, **changes)

    # -- the end ----------------------------------------------------------------------------

    def _end(self, ending: Ending) -> None:
        if self.report is not None:
            return
        interrupted = self.notice is not None and self.notice.kind == "interruption"
        known = msgspec.structs.replace(
            ending, progress=self.progress, asked=self._stop, interruption=interrupted
        )
        cause, message = classify(known)
        self.report = ExitReport(
            attempt=self.attempt, at=self.now, cause=cause, exit_code=ending.code, message=message,
            progress=self.progress, log_tail=("last words",),
        )  # fmt: skip

    def _leave(self, report: ExitReport) -> None:
        if not self._reported:
            self.run.report_exit(report)
            self._reported, self.phase = True, "exited"
            self._beat_at = self.now
        elif report.cause == "interrupted" and self.notice and self.notice.time:
            # AWS may take it back free of charge.
            empty_at = self._purse.empty_at
            is_late = self.now >= self.notice.time + timedelta(seconds=_LINGER_S)
            if is_late or (empty_at is not None and self.now >= empty_at):
                self.instance.end("itself")
        else:
            self.instance.end("itself")

    def _beat(self) -> None:
        if self.now < self._beat_at:
            return
        self._beats += 1
        self.run.beat(
            Heartbeat(
                attempt=self.attempt, beat=self._beats, at=self.now, phase=self.phase,
                progress=self.progress, notice=self.notice,
            )
        )  # fmt: skip
        self._beat_at = self.now + timedelta(seconds=self.spec.heartbeat_s)


def _tag(imds: Imds, name: str) -> str:
    """A tag as the bootstrap reads it."""
    headers = {"X-aws-ec2-metadata-token": "a-session-token"}
    status, body = imds.answer("GET", _TAGS + name, headers)
    assert status == 200, f"the instance has no tag spotfirst:{name}"
    return body.decode()
