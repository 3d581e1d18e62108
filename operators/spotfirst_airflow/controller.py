"""The reconcile loop: look, decide, append what was decided, do it, say when to look again.

Any process may run it, and several may at once: a decision is an event, event n + 1 exists once,
and whoever loses that race reads again. Every action that follows a decision (launch by token,
terminate, ask for a handover) can be repeated, so a controller may die between any two lines.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import math
import os
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

import msgspec

from spotfirst import events as e
from spotfirst.agent.exits import is_finished
from spotfirst.checkpoints.restoring import MOST_BACK
from spotfirst.errors import FormatError, LaunchRejected, LostRace, NoCapacity, QuotaReached
from spotfirst.heartbeat import ExitReport, Handover, Heartbeat, Progress
from spotfirst.market import Market, Notice, Pool
from spotfirst.state import Attempt, Phase, RunState
from spotfirst.wire import Clock, Record, utc_now
from spotfirst_airflow.asking import (
    affordable,
    ask,
    carry_usd,
    clock_rate,
    cost_usd,
    current_attempt,
    idle_since,
    may_use,
    open_usd,
    same_kind,
    why_not_begin,
    with_writing,
)
from spotfirst_airflow.cautions import cautions
from spotfirst_airflow.costs import bill, promised_usd
from spotfirst_airflow.fleets import Fleet, Instance, InstanceState, LaunchRequest, Offer
from spotfirst_airflow.keeping import Keeps, is_taken_back, over_budget, warning
from spotfirst_airflow.launches import (
    Place,
    next_launch_at,
    out_of_quota,
    place_of,
    rejections,
    with_refusals,
)
from spotfirst_airflow.news import NOT_NEEDED, describe
from spotfirst_airflow.outlook import Outlook, done_share, shutdown_s, work_left
from spotfirst_airflow.policies import Decision, OnDemand, Policy, SpotOnly, View
from spotfirst_airflow.recalling import recall
from spotfirst_airflow.separating import admit, dismiss
from spotfirst_airflow.timelines import price_timeline
from spotfirst_airflow.traffic import Traffic, is_priced

if TYPE_CHECKING:
    from spotfirst.run import Run
    from spotfirst.spec import RunSpec

__all__ = ["Controller", "Step", "controller_name"]

_log = logging.getLogger(__name__)

CRASHES_WITHOUT_PROGRESS = 3
"""After so many attempts in a row that crashed without a new checkpoint, the run fails."""
CRASHES_WITH_NEW_FILES = 10
"""The same in files mode for attempts that kept new files: whether it came further is unknown."""
UNKNOWN_TO_FLEET_S = 60.0
"""How long a launched instance may be missing from the fleet's answers (AWS is eventually
consistent) before it counts as gone."""
_FARTHEST_NOTICE = timedelta(minutes=15)
HANDOVER_PATIENCE_S = 150.0
"""How long an attempt that was asked to stop may take before it is terminated."""
_WARNINGS_PER_ATTEMPT = 100
_HAS_FAILED = "the run has failed"
_TOO_DEAR = "what is left of the budget does not start it any more"
_MOMENT_S = 60.0
_FLEET_LATE_S = 60.0
"""After its notice's time an instance is not waited for any longer."""
_NOTHING_KEPT = (
    "the script wrote no file into $SPOTFIRST_CHECKPOINT_DIR, so nothing that it made is kept"
)
_CRASHES = ("script_failed", "killed", "lost")


class Step(Record):
    """What one pass found. ``done``: the run is final, and every instance is gone.

    ``news`` tells people what happened since the last pass, a line each; ``events`` are all that
    happened since.
    """

    state: RunState
    wait_s: float
    news: tuple[str, ...] = ()
    events: tuple[e.Event, ...] = ()
    heartbeat: Heartbeat | None = None
    done: bool = False


class _Money(Record):
    """What is spent, and what will be whatever is decided.

    ``promised_usd`` for what is kept for people or left to the fleet, ``until_next_usd`` until the
    next look, and ``shutdown_usd`` by a stop from there.
    """

    spent_usd: Decimal
    promised_usd: Decimal
    until_next_usd: Decimal
    shutdown_usd: Decimal

    @property
    def committed_usd(self) -> Decimal:
        """What comes to it until the next look."""
        return self.promised_usd + self.until_next_usd

    @property
    def total_usd(self) -> Decimal:
        """All of it."""
        return self.spent_usd + self.committed_usd + self.shutdown_usd


def controller_name() -> str:
    """Who decided, as written into events: this host and process."""
    return f"{socket.gethostname()}:{os.getpid()}"


class Controller:
    """Reconciles one run. Not thread-safe: one call of :meth:`step` at a time."""

    def __init__(
        self,
        run: Run,
        fleet: Fleet,
        policy: Policy,
        *,
        clock: Clock = utc_now,
        by: str = "",
    ) -> None:
        self.run = run
        self.spec: RunSpec
        self.spec, self._spec_digest = run.spec_and_digest()
        self._amendment = 0
        self._fleet = fleet
        self._policy = policy
        self._clock = clock
        self._journal = run.journal(by=by or controller_name())
        self._traffic = Traffic(run, self.spec.resume_from)
        self._beats: dict[int, tuple[int, datetime]] = {}
        self._can_go_back: dict[int, bool] = {}
        self._last_step_at: datetime | None = None
        self._told = 0
        self._watching_s = min(self.spec.heartbeat_s, 5.0)

    def step(self) -> Step:
        """One pass. Idempotent; blocks for as long as storage and fleet take to answer.

        Raises :class:`~spotfirst.errors.StorageUnavailable` and
        :class:`~spotfirst.errors.FleetUnavailable`: call again later, nothing is lost.
        """
        now = self._clock()
        try:
            self._read_amendment(self._journal.refresh())
            beats = self._observe(now)
            wait_s = self._reconcile(now, beats)
        except LostRace:
            beats, wait_s = {}, 0.05
        self._last_step_at = now
        state = self._journal.state  # with what this pass appended; the next one reads what is new
        done = state.is_final and not state.open_attempts
        if done:
            dismiss(self._fleet, self.run, state, now=now)
        news, events = self._news()
        return Step(
            state=state,
            wait_s=wait_s,
            news=news,
            events=events,
            heartbeat=_trainer(beats),
            done=done,
        )

    def _read_amendment(self, state: RunState) -> None:
        """The spec that the journal says counts; refuses an older one that was put in its place."""
        wanted = state.reopened.amendment if state.reopened else 0
        if wanted > self._amendment:
            self.spec, self._spec_digest = self.run.spec_and_digest(amendments=wanted)
            self._amendment = wanted

    # -- one pass ---------------------------------------------------------------------------

    def _reconcile(self, now: datetime, beats: Mapping[int, Heartbeat]) -> float:
        """Decide and act on what was observed; how long to wait until the next pass."""
        state = self._journal.state
        if state.is_final:
            state = self._withdraw(now, state, "the run is over")
            self._fleet.terminate([attempt.token for attempt in state.open_attempts])
            return 0.5
        outlook = Outlook.of(self.spec, state)
        self._end_dear_waits(now, state, outlook, beats)
        if self._conclude(now, state, beats):
            return 0.2
        if state.phase is Phase.STOPPING:
            self._stop(now, state, beats)
            return 0.5
        if self._must_stop(now, state, outlook, beats):
            return 0.1
        if intents := _intents(state):
            # Someone died before the outcome was told, or is about to tell. Only here, where it is
            # known to be wanted still: and nothing above waits for a launch that is not answered.
            for attempt in intents:
                if self._still_pays(now, state, outlook, beats, attempt):
                    self._launch(now, attempt)
                else:
                    self._fleet.terminate([attempt.token])
                    self._append_not_launched(now, attempt, "withdrawn", _TOO_DEAR)
            return 0.2
        return self._place(now, state, outlook, beats)

    def _observe(self, now: datetime) -> dict[int, Heartbeat]:
        """Bring the journal up to what fleet and heartbeats say; the open attempts' beats."""
        open_attempts = self._journal.state.open_attempts
        if not open_attempts:
            return {}
        recall(self._fleet, open_attempts)
        if refused := admit(self._fleet, self.run, self.spec, self._journal.state, now=now):
            self._warn(now, refused)
        for caution in cautions(self._fleet, self._journal.state.warnings):
            self._warn(now, caution)
        instances = self._fleet.describe([attempt.token for attempt in open_attempts])
        beats: dict[int, Heartbeat] = {}
        for attempt in open_attempts:
            instance = instances.get(attempt.token)
            if attempt.launched is None:
                if instance is not None:
                    self._append_launched(now, attempt, instance)
                continue
            beat = self.run.heartbeat(attempt.number, warn=self._doubt(now, attempt))
            if beat is not None:
                beats[attempt.number] = beat
            self._pass_on_notice(now, attempt, instance, beat)
            self._pass_on_warnings(now, attempt, beat)
            # With a notice that came in just now: it says whose the instance is.
            attempt = self._journal.state.attempt(attempt.number)  # noqa: PLW2901
            self._settle_end(now, attempt, instance, beat)
        return beats

    def _pass_on_notice(
        self, now: datetime, attempt: Attempt, instance: Instance | None, beat: Heartbeat | None
    ) -> None:
        known = attempt.notice
        for notice in (beat.notice if beat else None, instance.notice if instance else None):
            if notice and (
                known is None or (known.kind, notice.kind) == ("rebalance", "interruption")
            ):
                if instance is None or notice is not instance.notice:
                    notice = _bounded(notice, now)  # noqa: PLW2901
                self._append(e.Noticed(at=now, attempt=attempt.number, notice=notice))
                return

    def _pass_on_warnings(self, now: datetime, attempt: Attempt, beat: Heartbeat | None) -> None:
        """What the trainer warned about goes into the journal once, for people to see."""
        for message in beat.progress.warnings if beat else ():
            self._warn_of(attempt, now, message)

    def _warn_of(self, attempt: Attempt, now: datetime, message: str) -> None:
        """A warning that follows from what an attempt wrote: a script may write without end."""
        start = f"attempt {attempt.number}: "
        text = start + message
        known = self._journal.state.warnings
        if text not in known:
            count = sum(warning.startswith(start) for warning in known)
            if count >= _WARNINGS_PER_ATTEMPT:
                text = start + "further warnings are left out"
            self._warn(now, text, attempt=attempt.number)

    def _doubt(self, now: datetime, attempt: Attempt) -> Callable[[str], None]:
        """What takes note of a file of an attempt that cannot be read."""
        return lambda problem: self._warn_of(attempt, now, problem)

    def _exit_report(self, now: datetime, attempt: Attempt) -> ExitReport | None:
        return self.run.exit_report(attempt.number, warn=self._doubt(now, attempt))

    def _settle_end(
        self, now: datetime, attempt: Attempt, instance: Instance | None, beat: Heartbeat | None
    ) -> None:
        """Append the end of an attempt once its instance is proven gone."""
        assert attempt.launched is not None
        if instance is None:
            age_s = (now - attempt.launched.at).total_seconds()
            if age_s < UNKNOWN_TO_FLEET_S:
                return
        elif instance.state is not InstanceState.TERMINATED:
            report = self._exit_report(now, attempt) if _may_have_exited(beat) else None
            if report is not None and self._keep(now, attempt, instance, beat, report):
                return
            if report is not None:
                is_over = not _leaves_free(attempt, now)
            else:
                is_over = self._is_silent(now, attempt, beat)
            if is_over:
                self._fleet.terminate([attempt.token])
            return
        report = self._exit_report(now, attempt)
        ended = self._proven(_ended(now, attempt, instance, beat, report), beat)
        ended = self._traffic.ended(ended, attempt.launched)
        timeline = price_timeline(self._fleet, instance)
        self._append(msgspec.structs.replace(ended, price_timeline=timeline))

    def _proven(self, ended: e.Ended, beat: Heartbeat | None) -> e.Ended:
        """The end as reported, but a success only with a checkpoint of the last step in the chain.

        The agent reports by the same rule; here it does not depend on what an instance says.
        A script that trained no step has nothing to prove, and people hear that nothing is kept.
        """
        if ended.cause == "handed_over":
            return self._superseded(ended)
        if ended.cause != "completed":
            return ended
        if ended.step is None:
            unfinished = self._unfinished(ended, beat)
            return (
                msgspec.structs.replace(ended, cause="lost", message=unfinished)
                if unfinished
                else ended
            )
        newest = self.run.chain().refresh().newest()
        if not ended.step:
            if newest is None and self.spec.checkpoint_mode == "files":
                self._warn(ended.at, _NOTHING_KEPT, attempt=ended.attempt)
            return ended
        step = newest[1].step if newest else None
        if step is not None and step >= ended.step:
            return ended
        kept = f"the newest checkpoint is of step {step}" if newest else "there is no checkpoint"
        message = f"it reported success after step {ended.step}, and {kept}"
        return msgspec.structs.replace(ended, cause="lost", message=message)

    def _superseded(self, ended: e.Ended) -> e.Ended:
        """An attempt that gave way to one that this run does not have is lost: so would the next."""
        holder = None
        with contextlib.suppress(FormatError):  # a damaged chain is the next attempt's to report
            holder = self.run.chain().refresh().holder
        known = self._journal.state.attempts[-1].number
        if holder is None or holder <= known:
            return ended
        message = (
            f"attempt {holder} has claimed {self.run.url}/checkpoints, and this run has only "
            f"{known}: somebody else writes there"
        )
        return msgspec.structs.replace(ended, cause="lost", message=message)

    def _unfinished(self, ended: e.Ended, beat: Heartbeat | None) -> str:
        """Why a success without any step is none; empty where the script never tells steps.

        A script that fails before its loop may still exit with 0, and a forged report says little.
        """
        told = [a.ended for a in _recent(self._journal.state) if a.ended]
        total = max((t.total_steps for t in told if t.total_steps is not None), default=None)
        step = max((t.step for t in told if t.step is not None), default=None)
        if beat is not None and beat.progress.step is not None:
            step = max(step or 0, beat.progress.step)
            total = beat.progress.total_steps or total
        if step is None:
            return ""
        newest = self.run.chain().refresh().newest()
        saved = newest[1].step if newest else -1
        # It began with a checkpoint and saw nothing to do, or could know without looking.
        saw_it = ended.checkpoint_step is not None or (total is not None and saved >= total)
        if saved >= step and saw_it:
            return ""
        of = f" of {total}" if total is not None else ""
        return f"it reported success without a step, and the run is at step {step}{of}"

    def _keep(
        self,
        now: datetime,
        attempt: Attempt,
        instance: Instance,
        beat: Heartbeat | None,
        report: ExitReport,
    ) -> bool:
        """Leave the instance of the script with which the run fails to people; whether it was.

        Its attempt ends here: the script has, and whoever starts it again there by hand loses the
        claim to the run's next attempt. Marked before that is appended, so that no reaper sees an
        instance without an owner and without a mark.
        """
        fleet, state = self._fleet, self._journal.state
        assert attempt.launched is not None
        if report.cause != "script_failed" or not isinstance(fleet, Keeps) or fleet.keep_s <= 0:
            return False
        ended = _ended(now, attempt, instance, beat, report)
        ended = self._traffic.ended(ended, attempt.launched)
        if state.phase is not Phase.ACTIVE or self._failure(state.apply(ended)) is None:
            return False  # it goes on, on another instance
        # What an instance says of the time may not keep it for years, nor make it cheaper.
        failed_at = min(now, max(attempt.launched.started_at, report.at))
        until = failed_at + timedelta(seconds=fleet.keep_s)
        if is_taken_back(attempt) or now >= until:
            return False
        if dear := over_budget(
            state, attempt, failed_at=failed_at, until=until, budget_usd=self.spec.budget_usd
        ):
            self._warn(now, dear, attempt=attempt.number)
            return False
        try:
            shell = fleet.keep(attempt.token, until=until)
        except LaunchRejected as error:
            message = f"attempt {attempt.number}: could not keep its instance: {error}"
            self._warn(now, message, attempt=attempt.number)
            return False
        message = warning(attempt, failed_at=failed_at, until=until, shell=shell)
        self._warn(now, message, attempt=attempt.number)
        self._append(msgspec.structs.replace(ended, ended_at=failed_at, kept_until=until))
        return True

    def _warn(
        self, now: datetime, message: str, *, attempt: int | None = None, once_for: str = ""
    ) -> None:
        """Warn people, once for each message, or for all messages that begin with ``once_for``."""
        known = self._journal.state.warnings
        is_known = (
            any(each.startswith(once_for) for each in known) if once_for else message in known
        )
        if not is_known:
            self._append(e.Warned(at=now, attempt=attempt, message=message))

    def _is_silent(self, now: datetime, attempt: Attempt, beat: Heartbeat | None) -> bool:
        """Whether an instance runs, but its agent has said nothing for ``silence_s``.

        Counted only over time in which this controller looked regularly: an outage of the
        storage, or of Airflow, must not look like the death of a healthy trainer.
        """
        number = beat.beat if beat else -1
        seen, since = self._beats.get(attempt.number, (-2, now))
        looked_away = self._last_step_at is None or now - self._last_step_at > timedelta(seconds=60)
        if seen != number or looked_away:
            self._beats[attempt.number] = (number, now)
            return False
        silent_s = (now - since).total_seconds()
        if silent_s < self.spec.silence_s:
            if beat is None and silent_s >= self.spec.silence_s / 2:
                self._warn(
                    now,
                    f"attempt {attempt.number}: its instance runs, and its agent has written "
                    f"nothing yet: may the instance's role write to {self.run.root.url}? Its "
                    "console output says more",
                    attempt=attempt.number,
                )
            return False
        message = f"attempt {attempt.number}: silent for {silent_s:.0f} s; terminating its instance"
        self._append(e.Warned(at=now, attempt=attempt.number, message=message))
        self._beats[attempt.number] = (number, now)
        return True

    def _conclude(self, now: datetime, state: RunState, beats: Mapping[int, Heartbeat]) -> bool:
        """Success, or a failure that no new attempt would mend. Whether it is either."""
        completed = next(
            (a for a in _recent(state) if a.ended and a.ended.cause == "completed"), None
        )
        if completed is not None:
            if self._not_needed(now, state, f"attempt {completed.number} has completed"):
                self._append(_succeeded(now, completed, self.run))
            return True
        failure = None if state.phase is Phase.STOPPING else self._failure(state)
        if failure is None:
            self._warn_of_going_back(now, state)
            self._warn_of_unfit(now, state)
            return False
        if self._left(now, state, beats, _HAS_FAILED):
            self._append(msgspec.structs.replace(failure, at=now))
        return True

    def _not_needed(self, now: datetime, state: RunState, reason: str) -> bool:
        """End what is still open at once, as the work is done; whether all is gone."""
        reason = f"{NOT_NEEDED}: {reason}"
        state = self._withdraw(now, state, reason)
        for attempt in state.open_attempts:
            if attempt.handover is None:
                self._append(e.HandoverRequested(at=now, attempt=attempt.number, reason=reason))
        self._fleet.terminate([attempt.token for attempt in state.open_attempts])
        return not state.open_attempts

    def _failure(self, state: RunState) -> e.Failed | None:
        """Why the run cannot go on, if it cannot. ``at`` is to be filled in."""
        recent = _recent(state)
        # What ends only because the run has failed does not undo that.
        ended = [a for a in recent if a.ended and a.handover != _HAS_FAILED]
        last = ended[-1].ended if ended else None
        if last is not None and last.cause == "unfit":
            if any(attempt.handover is None for attempt in state.open_attempts):
                return None  # it was to take over from one that trains on
            # The next instance would have the same image: more of them only cost more.
            return e.Failed(at=last.at, message=_why(last), log_tail=last.log_tail, retryable=False)
        if last is None or last.cause not in _CRASHES:
            return None
        script_failures = sum(1 for a in recent if a.ended and a.ended.cause == "script_failed")
        allowed = self.spec.script_retries + self._tries_further_back(ended)
        if last.cause == "script_failed" and script_failures > allowed:
            return e.Failed(at=last.at, message=_why(last), log_tail=last.log_tail)
        crashes = state.fruitless(*_CRASHES, leave_out=_HAS_FAILED)
        if crashes >= CRASHES_WITHOUT_PROGRESS:
            message = f"{crashes} attempts in a row crashed without a new checkpoint; {_why(last)}"
            return e.Failed(at=last.at, message=message, log_tail=last.log_tail, retryable=False)
        in_a_row = sum(1 for _ in itertools.takewhile(_has_crashed, reversed(ended)))
        most = max(CRASHES_WITH_NEW_FILES, self.spec.script_retries + 1)
        if self.spec.checkpoint_mode == "files" and in_a_row >= most:
            message = (
                f"{in_a_row} attempts in a row crashed, though each kept new files; if the script "
                f"comes further each time, clear the task; {_why(last)}"
            )
            return e.Failed(at=last.at, message=message, log_tail=last.log_tail, retryable=False)
        return None

    def _warn_of_going_back(self, now: datetime, state: RunState) -> None:
        newest = next((a for a in reversed(_recent(state)) if a.ended), None)
        if newest is not None and self._can_go_back.get(newest.number):
            self._warn(
                now,
                f"attempt {newest.number} crashed before it came any further than the checkpoint "
                "that it began with: the next attempt begins with the one BEFORE it. If the script "
                "is at fault, mend it and clear the task: then the newest checkpoint is used again",
                attempt=newest.number,
            )

    def _warn_of_unfit(self, now: datetime, state: RunState) -> None:
        """Once for each market: the agent could not begin there, while another attempt trains."""
        newest = next((a for a in reversed(_recent(state)) if a.ended), None)
        if newest is not None and newest.ended is not None and newest.ended.cause == "unfit":
            start = f"{newest.market} instances cannot train, and are tried again now and then: "
            self._warn(now, start + _why(newest.ended), attempt=newest.number, once_for=start)

    def _tries_further_back(self, ended: Sequence[Attempt]) -> int:
        """How many more attempts there may be because some crashed with what they restored.

        Each begins with the checkpoint before; what instances say of theirs is bounded here.
        """
        fruitless = list(itertools.takewhile(_crashed_at_once, reversed(ended)))[:MOST_BACK]
        if not fruitless:
            return 0
        newest = fruitless[0].number
        if newest not in self._can_go_back:
            tried = [a.ended.restored_seq for a in fruitless if a.ended]
            commits = self.run.chain().refresh().commits
            steps = [commit.step for seq, commit in commits if seq in tried]
            crashed = [a.number for a in fruitless]
            self._can_go_back[newest] = any(
                seq not in tried and commit.step not in steps and commit.attempt not in crashed
                for seq, commit in commits
            )
        return len(fruitless) - 1 + self._can_go_back[newest]

    def _stop(self, now: datetime, state: RunState, beats: Mapping[int, Heartbeat]) -> None:
        """Ask every attempt to checkpoint and stop; end those that do not."""
        reason = state.stop.reason if state.stop else "stopped"
        if self._left(now, state, beats, reason):
            self._append(e.Stopped(at=now, reason=reason))

    def _left(
        self, now: datetime, state: RunState, beats: Mapping[int, Heartbeat], reason: str
    ) -> bool:
        """Ask what is open to checkpoint and stop; whether all is gone.

        What has nothing to save, or does not stop, is ended.
        """
        state = self._withdraw(now, state, reason)
        for attempt in state.open_attempts:
            asked_at = self._asked_at(attempt.number)
            if asked_at is None:
                self.run.request_handover(attempt.number, Handover(reason=reason, at=now))
                self._append(e.HandoverRequested(at=now, attempt=attempt.number, reason=reason))
                asked_at = now
            beat = beats.get(attempt.number)
            if _waits_for_fleet(attempt, beat, now):
                continue  # ending it now would have to be paid
            may_checkpoint = beat is not None and beat.phase in {"training", "draining"}
            if not may_checkpoint or (now - asked_at).total_seconds() > HANDOVER_PATIENCE_S:
                self._fleet.terminate([attempt.token])
        return not state.open_attempts

    def _asked_at(self, number: int) -> datetime | None:
        """When this attempt was asked to checkpoint and stop."""
        return next(
            (
                event.at
                for event in reversed(self._journal.events)
                if isinstance(event, e.HandoverRequested) and event.attempt == number
            ),
            None,
        )

    def _must_stop(
        self, now: datetime, state: RunState, outlook: Outlook, beats: Mapping[int, Heartbeat]
    ) -> bool:
        """The budget's cap and the deadline. Whether a stop was asked for."""
        if outlook.deadline is not None and now >= outlook.deadline:
            reason = f"the deadline {outlook.deadline:%Y-%m-%d %H:%M:%S} UTC has passed"
            self._append(e.StopRequested(at=now, reason=reason, cause="deadline"))
            return True
        if outlook.budget is None:
            return False
        money = self._money(now, state, beats)
        why = outlook.budget.why_stop(
            spent_usd=money.spent_usd,
            committed_usd=money.committed_usd,
            shutdown_usd=money.shutdown_usd,
        )
        if why:  # first: a storage that fails now and then may not take all that follows
            self._append(e.StopRequested(at=now, reason=why, cause="budget"))
        for alert in outlook.budget.alerts(money.spent_usd):
            self._warn(now, alert)
        return bool(why)

    def _money(self, now: datetime, state: RunState, beats: Mapping[int, Heartbeat]) -> _Money:
        """What all that is there has cost, and what it costs whatever is decided now."""
        egress_usd, last_usd = self._traffic.open_usd(state.open_attempts, beats)
        waits = _waiting_for_fleet(now, state, beats)
        others = [a for a in state.open_attempts if a not in waits]
        return _Money(
            spent_usd=bill(state, now=now).total_usd + egress_usd,
            promised_usd=promised_usd(state, now=now)
            + sum((cost_usd([a], _left_to_wait_s(a, now)) for a in waits), Decimal(0)),
            # With a checkpoint that comes before the next look.
            until_next_usd=cost_usd(others, self._watching_s) + last_usd,
            shutdown_usd=cost_usd(others, shutdown_s(state, _trainer(beats))) + last_usd,
        )

    def _end_dear_waits(
        self, now: datetime, state: RunState, outlook: Outlook, beats: Mapping[int, Heartbeat]
    ) -> None:
        """End what is left to the fleet where the budget would not pay for it.

        It is free only if the fleet takes it, which is not certain until it has.
        """
        if outlook.budget is None or outlook.budget.on_budget == "alert":
            return
        waits = _waiting_for_fleet(now, state, beats)
        if not waits:
            return
        money = self._money(now, state, beats)
        # Without what comes until the next look: a run that stops in time keeps what it reserved.
        if money.total_usd - money.until_next_usd > outlook.budget.usd:
            self._fleet.terminate([attempt.token for attempt in waits])

    def _still_pays(
        self,
        now: datetime,
        state: RunState,
        outlook: Outlook,
        beats: Mapping[int, Heartbeat],
        attempt: Attempt,
    ) -> bool:
        """Whether the budget starts what was decided before, perhaps long ago."""
        if outlook.budget is None or attempt.asked_usd_h is None:
            return True
        until_then_usd = open_usd(state, outlook.changeover_s)
        return outlook.budget.can_start(
            attempt.asked_usd_h,
            spent_usd=self._money(now, state, beats).total_usd + until_then_usd,
            changeover_s=outlook.changeover_s,
            shutdown_s=shutdown_s(state, _trainer(beats)),
            clock_rate=clock_rate(state),
        )

    def _place(
        self, now: datetime, state: RunState, outlook: Outlook, beats: Mapping[int, Heartbeat]
    ) -> float:
        """Ask the policy, and launch what it says; how long to wait until the next look."""
        beat = _trainer(beats)
        watching_s = self._watching_s
        current, is_moving = current_attempt(state)
        if current is not None and (is_moving or _is_settling(current, beats)):
            return min(watching_s, 0.5)
        free_at = next_launch_at(state.attempts, per_hour=self.spec.launches_per_hour, now=now)
        if free_at is not None:
            return self._hold(now, state, free_at, current)
        recent = _recent(state)
        offers = tuple(self._fleet.offers(self.spec.instance_types))
        offers = with_refusals(offers, recent, now=now)
        checkpoint_bytes = 0
        if any(map(is_priced, offers)):
            checkpoint_bytes = self._traffic.newest_bytes()
            written_bytes_h = self._traffic.written_bytes_h()
            offers = with_writing(offers, written_bytes_h, clock_rate=clock_rate(state))
        view = View(
            now=now,
            idle_since=idle_since(state, now),
            offers=offers,
            attempts=recent,
            current=current,
            deadline=outlook.deadline,
            work=work_left(self.spec, state, beat),
            changeover_s=outlook.changeover_s,
            at_risk_s=self.spec.checkpoint_period_s,
            spent_usd=self._money(now, state, beats).total_usd,
            checkpoint_bytes=checkpoint_bytes,
            carry_usd=carry_usd(offers, checkpoint_bytes),
            clock_rate=clock_rate(state),
            history=self.spec.lessons.pools,
            began=state.created_at,
            done_share=done_share(state, beat),
        )
        end_s = shutdown_s(state, beat)
        if why := why_not_begin(self._policy, outlook.budget, view, shutdown_s=end_s):
            if not state.open_attempts:
                self._append(e.StopRequested(at=now, reason=why, cause="budget"))
            return watching_s
        decision = ask(self._policy, view, budget=outlook.budget, shutdown_s=end_s)
        is_stuck = decision.offer is None and not decision.stop and not state.open_attempts
        if is_stuck and view.offers:
            rejected = rejections(recent)
            possible = self._not_refused(view.offers, rejected)
            payable = affordable(outlook.budget, view, shutdown_s=end_s)
            if rejected and not any(offer in payable for offer in possible):
                message = "; ".join(dict.fromkeys(each.message for each in rejected.values()))
                if possible:
                    message += "; and what is left of the budget starts nothing else"
                self._append(e.Failed(at=now, message=message, retryable=False))
                return 0.1
            # With a deadline, a policy goes elsewhere in time.
            quotas = out_of_quota(recent) if outlook.deadline is None else set()
            left = self._not_refused(view.offers, {*rejected, *quotas})
            if left and len(left) < len(view.offers):
                view = msgspec.structs.replace(view, offers=left)
                decision = self._instead(decision, view, outlook, end_s)
        if decision.stop:
            self._append(e.StopRequested(at=now, reason=decision.reason, cause="policy"))
            return 0.1
        if decision.offer is None:
            if current is None:
                self._wait(now, state, decision.reason)
                watching_s = min(watching_s, 1.0)
            left_s = math.inf
            if decision.until is not None:
                left_s = (decision.until - now).total_seconds()
            return max(0.05, min(watching_s, left_s))
        number = len(state.attempts) + 1
        token = _token(self.run.url, number)
        self._append(
            e.Launching(
                at=now, attempt=number, token=token, market=decision.offer.market,
                pool=decision.offer.pool, reason=decision.reason, others=decision.others,
                price_usd_h=decision.offer.price_usd_h,
            )
        )  # fmt: skip
        self._launch(now, self._journal.state.attempt(number))
        return 0.2

    def _not_refused(
        self, offers: tuple[Offer, ...], refused: Collection[Place]
    ) -> tuple[Offer, ...]:
        """Where a launch may yet do, of what the policy may use at all."""
        return tuple(
            offer
            for offer in offers
            if place_of(offer.market, offer.pool) not in refused
            and may_use(self._policy, offer.market)
        )

    def _instead(self, decision: Decision, view: View, outlook: Outlook, end_s: float) -> Decision:
        """What is left to launch, where the policy would wait for what is refused."""
        for policy in (SpotOnly(), OnDemand()):
            other = ask(policy, view, budget=outlook.budget, shutdown_s=end_s)
            if other.offer is not None:
                reason = f"launches in other markets are refused: {other.offer.market} instead"
                return msgspec.structs.replace(other, reason=reason)
        return decision

    def _hold(
        self, now: datetime, state: RunState, free_at: datetime, current: Attempt | None
    ) -> float:
        """Launch nothing, since too much was launched lately; how long to wait for a look."""
        watching_s = self._watching_s
        if current is not None:
            return watching_s
        limit = f"launches_per_hour={self.spec.launches_per_hour}"
        self._warn(
            now,
            f"the run has launched as many instances within an hour as it may ({limit}), and "
            "waits: see in `spotfirst show` why none of them lasts",
        )
        self._wait(now, state, f"{limit} were launched: the next at {free_at:%H:%M:%S} UTC")
        return min(watching_s, 1.0)

    def _wait(self, now: datetime, state: RunState, reason: str) -> None:
        """Once for each reason: a number in it that changes is no other one."""
        if state.waiting is None or not same_kind(state.waiting.reason, reason):
            self._append(e.Waiting(at=now, reason=reason))

    # -- actions ----------------------------------------------------------------------------

    def _launch(self, now: datetime, attempt: Attempt) -> None:
        """Call the fleet for an intent that stands in the journal, and append the outcome."""
        request = LaunchRequest(
            token=attempt.token,
            run_id=self.run.run_id,
            attempt=attempt.number,
            market=attempt.market,
            pool=attempt.pool,
            others=attempt.others,
            storage_url=self.run.root.url,
            max_life_s=self.spec.max_life_s,
            spec_digest=self._spec_digest,
            tags=self.spec.tags,
        )
        try:
            instance = self._fleet.launch(request)
        except NoCapacity as error:
            quota = isinstance(error, QuotaReached)
            self._append_not_launched(
                now, attempt, "no_capacity", str(error), error.pools, quota=quota
            )
        except LaunchRejected as error:
            self._append_not_launched(now, attempt, "rejected", str(error))
        else:
            self._append_launched(now, attempt, instance)

    def _withdraw(self, now: datetime, state: RunState, reason: str) -> RunState:
        """Give up what was to be launched, and nobody knows whether it was; the state then."""
        for attempt in _intents(state):
            self._fleet.terminate([attempt.token])
            self._append_not_launched(now, attempt, "withdrawn", reason)
        return self._journal.state

    def _append_launched(self, now: datetime, attempt: Attempt, instance: Instance) -> None:
        event = e.Launched(
            at=now,
            attempt=attempt.number,
            instance_id=instance.instance_id,
            started_at=instance.started_at,
            price_usd_h=instance.price_usd_h,
            price_source=instance.price_source,
            price_at=instance.started_at,
            on_demand_usd_h=instance.on_demand_usd_h,
            clock_rate=instance.clock_rate,
            pool=instance.pool,
            read_usd_gb=instance.read_usd_gb,
            write_usd_gb=instance.write_usd_gb,
        )
        try:
            self._append(event)
        except LostRace:
            # Perhaps it was given up meanwhile. It is there all the same, and costs.
            number = attempt.number
            self._journal.decide(lambda state: None if state.attempt(number).launched else event)
            raise

    def _append_not_launched(
        self,
        now: datetime,
        attempt: Attempt,
        cause: Literal["no_capacity", "rejected", "withdrawn"],
        message: str,
        pools: tuple[Pool, ...] = (),
        *,
        quota: bool = False,
    ) -> None:
        self._append(
            e.NotLaunched(
                at=now, attempt=attempt.number, cause=cause, message=message, pools=pools,
                quota=quota,
            )
        )  # fmt: skip
        if cause == "rejected" or quota:
            # What AWS says has ids and numbers in it that differ each time: once for each market.
            start = f"{attempt.market} launches are refused, and tried again now and then: "
            self._warn(now, start + message, once_for=start)

    def _append(self, event: e.Event) -> None:
        self._journal.append(event)

    def _news(self) -> tuple[tuple[str, ...], tuple[e.Event, ...]]:
        fresh = self._journal.events[self._told :]
        state = self._journal.state
        self._told = len(self._journal.events)
        lines = tuple(line for event in fresh if (line := describe(event, state)))
        return lines, tuple(fresh)


# -- small pure helpers -------------------------------------------------------------------------


def _token(run_url: str, attempt: int) -> str:
    """At most 64 ASCII characters, the same for the same run and attempt everywhere."""
    digest = hashlib.sha256(run_url.encode()).hexdigest()[:32]
    return f"spotfirst-{digest}-{attempt}"


def _intents(state: RunState) -> list[Attempt]:
    """The attempts of which it is not known what became of their launch."""
    return [attempt for attempt in state.open_attempts if attempt.launched is None]


def _may_have_exited(beat: Heartbeat | None) -> bool:
    return beat is not None and beat.phase in {"draining", "exited"}


def _trainer(beats: Mapping[int, Heartbeat]) -> Heartbeat | None:
    """The beat of the attempt that trains; during a change of instance there are two."""
    training = [beat for beat in beats.values() if beat.phase in {"training", "draining"}]
    return max(training or beats.values(), key=lambda beat: beat.attempt, default=None)


def _is_settling(attempt: Attempt, beats: Mapping[int, Heartbeat]) -> bool:
    """Whether the attempt has yet to show that it trains: no second thoughts until then."""
    beat = beats.get(attempt.number)
    return beat is None or beat.phase in {"booting", "fetching", "starting", "standby"}


def _leaves_free(attempt: Attempt, now: datetime) -> bool:
    """Whether waiting for the fleet to take the instance costs nothing.

    A spot instance that is interrupted within its first hour is free (see ``costs``), but not
    when we terminate it ourselves a minute earlier.
    """
    if attempt.market is not Market.SPOT or attempt.notice is None or attempt.launched is None:
        return False
    if attempt.notice.time is None or _left_to_wait_s(attempt, now) < 0:
        return False
    used_s = (attempt.notice.time - attempt.launched.started_at).total_seconds()
    return used_s * attempt.launched.clock_rate < 3600


def _left_to_wait_s(attempt: Attempt, now: datetime) -> float:
    """How long the fleet has yet to take what it said it would."""
    assert attempt.notice is not None
    assert attempt.notice.time is not None
    return (attempt.notice.time - now).total_seconds() + _FLEET_LATE_S


def _waits_for_fleet(attempt: Attempt, beat: Heartbeat | None, now: datetime) -> bool:
    """Whether it has nothing left to do, and is there only to be taken by the fleet."""
    return beat is not None and beat.phase == "exited" and _leaves_free(attempt, now)


def _recent(state: RunState) -> tuple[Attempt, ...]:
    """The attempts since the run was last reopened: someone looked at the others then."""
    return tuple(a for a in state.attempts if a.number > state.reopened_after)


def _waiting_for_fleet(
    now: datetime, state: RunState, beats: Mapping[int, Heartbeat]
) -> list[Attempt]:
    return [a for a in state.open_attempts if _waits_for_fleet(a, beats.get(a.number), now)]


def _has_crashed(attempt: Attempt) -> bool:
    return attempt.ended is not None and attempt.ended.cause in _CRASHES


def _crashed_at_once(attempt: Attempt) -> bool:
    """Whether an attempt began with a checkpoint, and crashed before it came any further."""
    ended = attempt.ended
    if (
        ended is None
        or ended.restored_seq is None
        or ended.cause not in {"script_failed", "killed"}
    ):
        return False
    return attempt.progress == 0 and (ended.step or 0) <= (ended.start_step or 0)


def _why(ended: e.Ended) -> str:
    if ended.message:
        return ended.message
    if ended.cause == "script_failed":
        code = ended.exit_code
        return (
            f"the command exited with {code}" if code is not None else "the command did not start"
        )
    return f"attempt {ended.attempt} was {ended.cause}"


def _ended(
    now: datetime,
    attempt: Attempt,
    instance: Instance | None,
    beat: Heartbeat | None,
    report: ExitReport | None,
) -> e.Ended:
    """What became of an attempt, from its own report or else from what the fleet knows."""
    by_fleet = instance is not None and instance.ended_by == "fleet"
    progress = report.progress if report else beat.progress if beat else None
    timings = progress.timings if progress else None
    started_at = attempt.launched.started_at if attempt.launched else attempt.intended_at
    training_s = startup_s = 0.0
    if timings and timings.first_step:
        startup_s = max(0.0, (timings.first_step - started_at).total_seconds())
        training_s = max(0.0, ((timings.last_step or now) - timings.first_step).total_seconds())
    cause: e.EndCause
    if report is not None and not (by_fleet and _may_be_of_the_end(report, instance)):
        cause = report.cause
    elif by_fleet:
        cause = "interrupted"
    elif attempt.handover is not None:
        cause = "handed_over"
    else:
        cause = "lost"
    return e.Ended(
        at=now,
        attempt=attempt.number,
        cause=cause,
        ended_at=(instance.ended_at if instance and instance.ended_at else None)
        or _unseen_end(now, attempt, report),
        by_fleet=by_fleet,
        exit_code=report.exit_code if report else None,
        message=report.message if report else (instance.ended_why if instance else ""),
        log_tail=report.log_tail if report else (),
        start_step=progress.start_step if progress else None,
        restored_seq=progress.restored_seq if progress else None,
        step=progress.step if progress else None,
        checkpoint_step=progress.checkpoint_step if progress else None,
        total_steps=progress.total_steps if progress else None,
        step_times=progress.step_times if progress else None,
        checkpoint_s=_checkpoint_s(now, attempt, progress),
        training_s=training_s,
        startup_s=startup_s,
        moved_bytes=(report or beat).moved_bytes if (report or beat) else 0,  # type: ignore[union-attr]
    )


def _checkpoint_s(now: datetime, attempt: Attempt, progress: Progress | None) -> float | None:
    """What its last checkpoint took; no longer than the attempt, whatever an instance says."""
    if progress is None or progress.checkpoint_s is None:
        return None
    return min(progress.checkpoint_s, max(0.0, (now - attempt.intended_at).total_seconds()))


def _may_be_of_the_end(report: ExitReport, instance: Instance | None) -> bool:
    """Whether the script may have left because its instance was taken, a moment later.

    The system ends processes one by one, and only the script may have heard that it is to go.
    """
    gone_at = instance.ended_at if instance else None
    if gone_at is not None and gone_at - report.at > timedelta(seconds=_MOMENT_S):
        return False
    if report.cause == "completed":
        return not is_finished(report.progress)
    return report.cause in {"script_failed", "killed"}


def _bounded(notice: Notice, now: datetime) -> Notice:
    """What an instance says of its notice: an interruption is no farther away than any fleet's.

    Until then the instance is left to the fleet where that is free.
    """
    if notice.time is None:
        return notice
    return msgspec.structs.replace(notice, time=min(notice.time, now + _FARTHEST_NOTICE))


def _unseen_end(now: datetime, attempt: Attempt, report: ExitReport | None) -> datetime:
    """When an instance ended whose fleet does not say: EC2 forgets, and nobody may have looked.

    It ends itself after its report, or is left to the interruption that it was told of.
    """
    if report is None:
        return now
    notice = attempt.notice
    told = notice.time if report.cause == "interrupted" and notice else None
    # What it says is billed by, so not before it was there.
    began = attempt.launched.at if attempt.launched else attempt.intended_at
    return min(now, max(began, report.at, told or report.at))


def _succeeded(now: datetime, attempt: Attempt, run: Run) -> e.Succeeded:
    report = run.exit_report(attempt.number)
    progress = report.progress if report else None
    newest = run.chain().refresh().newest()
    return e.Succeeded(
        at=now,
        attempt=attempt.number,
        step=progress.step if progress else None,
        checkpoint_seq=newest[0] if newest else None,
        metrics=dict(progress.metrics) if progress else {},
    )
