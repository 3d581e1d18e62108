"""One instance: ``python -m spotfirst_airflow.fleets.local.supervisor FOLDER``.

Plays what surrounds a machine in a cloud: serves its metadata, starts its agent, watches the spot
market, posts the notice, and pulls the plug. Every process of the instance is a descendant of the
supervisor (it is their subreaper), so none can leave; and should the supervisor itself be killed,
the kernel kills the agent, and whoever next looks at the instance sweeps up by the environment.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from spotfirst.agent.fitness import UNFIT
from spotfirst.errors import SpotfirstError
from spotfirst.heartbeat import ExitReport
from spotfirst.market import INTERRUPTION_MEAN_VARIABLE, Notice
from spotfirst.market import Market as Purchase
from spotfirst.run import Run
from spotfirst.spec import SPEC_DIGEST_VARIABLE
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.fleets.base import EndedBy
from spotfirst_airflow.fleets.local.imds import MetadataService
from spotfirst_airflow.fleets.local.options import LocalOptions
from spotfirst_airflow.fleets.local.processes import (
    ProcessRef,
    become_subreaper,
    carrying,
    descendants,
    die_with_parent,
    kill_all,
    this_process,
)
from spotfirst_airflow.fleets.local.registry import (
    Boot,
    Claim,
    Folder,
    InterruptRequest,
    Registry,
    Running,
    Terminated,
    TerminateRequest,
)
from spotfirst_airflow.markets import Market, market_options

__all__ = ["INSTANCE_ID_VARIABLE", "LOST_BOOT", "older_instances"]

INSTANCE_ID_VARIABLE = "SPOTFIRST_INSTANCE_ID"
"""Every process of an instance carries it in its environment, unless it took care not to."""
LOST_BOOT = 3
"""The exit status of a supervisor that found the token booted or given up."""
_TICK_S = 0.2
_SIGN_OF_LIFE_S = 1.0
_LIFE_GRACE_S = 30.0
_SIGNALS = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def older_instances(registry: Registry, *, market_key: str, zone: str, before: Claim | None) -> int:
    """How many spot instances of this market are in the zone; with ``before``, older than it."""
    count = 0
    for token in registry.live():
        folder = registry.folder(token)
        claim = folder.read(Claim)
        if claim is None or (claim.market_key, claim.request.pool.zone) != (market_key, zone):
            continue
        if claim.request.market is not Purchase.SPOT or folder.has(Terminated):
            continue
        if before is None or _age(claim) < _age(before):
            count += 1
    return count


def _age(claim: Claim) -> tuple[datetime, str]:
    return claim.claimed_at, claim.request.token


class _Supervisor:
    def __init__(self, folder: Folder, claim: Claim, sign_of_life: int) -> None:
        self._folder = folder
        self._claim = claim
        self._request = claim.request
        self._options = LocalOptions.of(claim.options)
        self._registry = Registry(folder.path.parents[1])
        self._market = Market(market_options(self._options.market))
        self._sign_of_life = sign_of_life
        self._shown_at = 0.0
        self._agent: subprocess.Popen[bytes] | None = None
        self._agent_status: int | None = None
        self._stopped = False
        self._kill_at: datetime | None = None
        self._next_look_s = self._options.market_time_s(claim.claimed_at)
        life_s = self._request.max_life_s
        # The agent knows the same limit, and stops more gently.
        self._life_ends = claim.claimed_at + timedelta(
            seconds=life_s + min(_LIFE_GRACE_S, 0.1 * life_s)
        )
        self._service = MetadataService(
            {
                "meta-data/instance-id": claim.instance_id,
                "meta-data/instance-type": self._request.pool.instance_type,
                "meta-data/instance-life-cycle": str(self._request.market),
                "meta-data/placement/availability-zone": self._request.pool.zone,
            }
        )

    def run(self) -> tuple[EndedBy, str]:
        """Play the instance until something ends it. Who did, and what there is to say."""
        boot_at = self._claim.claimed_at + timedelta(seconds=self._options.boot_s)
        while True:
            self._reap()
            now = utc_now()
            end = self._end(now)
            if end is not None:
                return end
            if self._agent is None and now >= boot_at:
                self._start_agent(now)
            self._show_life()
            coming = [t for t in (self._kill_at, boot_at if self._agent is None else None) if t]
            left_s = min([(t - utc_now()).total_seconds() for t in coming] + [_TICK_S])
            caught = signal.sigtimedwait(_SIGNALS, max(0.0, left_s))
            if caught is not None and caught.si_signo != signal.SIGCHLD:
                self._stopped = True

    def kill(self) -> None:
        """End every process of the instance. Returns when there is none."""
        while not kill_all(self._processes, patience_s=10):
            _say("some processes do not die of SIGKILL; trying on")

    def _end(self, now: datetime) -> tuple[EndedBy, str] | None:
        return self._asked() or self._left() or self._due(now) or self._watch_market(now)

    def _asked(self) -> tuple[EndedBy, str] | None:
        if self._folder.has(TerminateRequest):
            return "request", ""
        if not self._folder.has(Claim):
            return "unknown", "its folder was deleted"
        if self._stopped:
            return "unknown", "its supervisor was told to stop"
        return None

    def _left(self) -> tuple[EndedBy, str] | None:
        if self._agent_status is None:
            return None
        if self._agent_status == 0:
            return "itself", ""
        if self._agent_status == UNFIT:
            return "itself", self._report_unfit()
        return "unknown", f"its agent ended with {self._agent_status}"

    def _report_unfit(self) -> str:
        """Report for an agent that could not do so itself; what it left as the reason."""
        try:
            message = (self._folder.work / "unfit.txt").read_text("utf-8")
        except OSError:
            message = "the agent cannot work on this instance; see the instance's log"
        number = self._request.attempt
        report = ExitReport(attempt=number, at=utc_now(), cause="unfit", message=message)
        try:
            run = Run(open_storage(self._request.storage_url), self._request.run_id)
            run.report_exit(report)
        except SpotfirstError as error:
            _say(f"could not report that the agent cannot work: {error}")
        return message

    def _due(self, now: datetime) -> tuple[EndedBy, str] | None:
        if self._kill_at is not None and now >= self._kill_at:
            return "fleet", ""
        if now >= self._life_ends:
            return "itself", f"its life of {self._request.max_life_s:g} s was over"
        return None

    def _watch_market(self, now: datetime) -> tuple[EndedBy, str] | None:
        """Whether it must go at once. A notice once given stands, whatever the market does."""
        if self._request.market is not Purchase.SPOT or self._kill_at is not None:
            return None
        if (asked := self._folder.read(InterruptRequest)) is not None:
            return self._interrupt(now, notice=asked.notice)
        since_s, until_s = self._next_look_s, self._options.market_time_s(now)
        if until_s < since_s:
            return None  # nothing has changed: those before this instance only become fewer
        zone = self._request.pool.zone
        older = older_instances(
            self._registry, market_key=self._claim.market_key, zone=zone, before=self._claim
        )
        shortage = self._market.first_shortage(zone, since_s=since_s, until_s=until_s, older=older)
        self._next_look_s = self._market.next_change(zone, until_s)
        return None if shortage is None else self._interrupt(now, notice=shortage.notice)

    def _interrupt(self, now: datetime, *, notice: bool) -> tuple[EndedBy, str] | None:
        if not notice:
            return "fleet", "without notice"
        self._kill_at = now + timedelta(seconds=self._options.notice_s / self._options.time_scale)
        self._service.post_notice(kill_at=self._kill_at, now=now)
        with contextlib.suppress(OSError):  # a full disk must not save the instance
            self._folder.create(Notice(kind="interruption", seen_at=now, time=self._kill_at))
        return None

    def _start_agent(self, now: datetime) -> None:
        self._folder.work.mkdir(exist_ok=True)
        request = self._request
        environment = os.environ | {
            "SPOTFIRST_STORAGE": request.storage_url,
            "SPOTFIRST_RUN": request.run_id,
            "SPOTFIRST_ATTEMPT": str(request.attempt),
            SPEC_DIGEST_VARIABLE: request.spec_digest,
            "SPOTFIRST_MAX_LIFE_S": f"{request.max_life_s:g}",
            "SPOTFIRST_CACHE": str(self._registry.cache),
            "SPOTFIRST_WORKDIR": str(self._folder.work),
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": self._service.endpoint,
        }
        if request.market is Purchase.SPOT:
            mean_s = self._market.interruption_mean_s(request.pool.zone)
            if mean_s is not None:
                environment[INTERRUPTION_MEAN_VARIABLE] = f"{mean_s / self._options.time_scale:g}"
        command = self._options.agent_command or (sys.executable, "-m", "spotfirst.agent")
        me = os.getpid()
        # Before the service's threads exist, as a fork may then still run Python code.
        self._agent = subprocess.Popen(
            command,
            cwd=self._folder.path,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: _before_agent(me),  # noqa: PLW1509 - see above
        )
        self._service.start()
        agent = next((p for p in descendants(me) if p.pid == self._agent.pid), None)
        self._folder.create(Running(at=now, endpoint=self._service.endpoint, agent=agent))

    def _reap(self) -> None:
        """Collect whatever has ended: the agent, and the orphans that became ours."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._agent is not None and pid == self._agent.pid:
                self._agent_status = self._agent.returncode = os.waitstatus_to_exitcode(status)

    def _processes(self) -> Iterable[ProcessRef]:
        self._reap()
        me = os.getpid()
        found = {p.pid: p for p in carrying(INSTANCE_ID_VARIABLE, self._claim.instance_id)}
        found |= {p.pid: p for p in descendants(me)}
        return found.values()

    def _show_life(self) -> None:
        now = time.monotonic()
        if now - self._shown_at >= _SIGN_OF_LIFE_S:
            self._shown_at = now
            os.utime(self._sign_of_life)


def _before_agent(supervisor: int) -> None:
    die_with_parent(supervisor)
    # Masks survive exec, and the agent waits for its signals in its own way.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _say(text: str) -> None:
    sys.stderr.write(f"{utc_now().isoformat(timespec='milliseconds')} supervisor: {text}\n")
    sys.stderr.flush()


def _play(folder: Folder, sign_of_life: int) -> None:
    claim = folder.read(Claim)
    assert claim is not None
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    become_subreaper()
    by: EndedBy = "unknown"
    message = "its supervisor failed; see the instance's log"
    supervisor: _Supervisor | None = None
    try:
        supervisor = _Supervisor(folder, claim, sign_of_life)
        by, message = supervisor.run()
    except Exception:  # noqa: BLE001 - whatever it was, the instance must end
        _say(traceback.format_exc())
    ended_at = utc_now()
    if supervisor is not None:
        supervisor.kill()
    _say(f"terminated by {by} {message}")
    # If this fails, the released lock tells that it ended, though not why.
    with contextlib.suppress(OSError):
        folder.create(Terminated(at=ended_at, by=by, message=message))
    Registry(folder.path.parents[1]).forget(claim.request.token)


def main(folder: Folder) -> int:
    """Become an instance, in a process that nobody waits for; or say why not."""
    heard, told = os.pipe()
    child = os.fork()
    if child:
        # Whoever launches waits for this process: it ends when the instance has booted.
        os.close(told)
        if os.read(heard, 1):
            return 0
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or 1
    os.close(heard)
    sign_of_life = folder.hold()
    if sign_of_life is None or not folder.create(Boot(at=utc_now(), process=this_process())):
        return LOST_BOOT
    os.write(told, b"1")
    os.close(told)
    _play(folder, sign_of_life)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Folder(Path(sys.argv[1]))))
