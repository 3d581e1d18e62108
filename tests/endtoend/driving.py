"""Sees real runs through, with their controller in this process, and does things to them.

Everything is real: storage, local fleet, supervisors, agents, trainers. When a drive ends, no
process of its run may be left, whatever happened in between.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil

from spotfirst.checkpoints.chain import Claim, Commit, Prune, Release
from spotfirst.heartbeat import Heartbeat
from spotfirst.run import Run
from spotfirst.state import Phase, RunState
from spotfirst.storage import Storage, open_storage
from spotfirst.wire import decode, utc_now
from spotfirst_airflow.changeovers import Changeover, changeovers, read_progress
from spotfirst_airflow.costs import Bill, bill
from spotfirst_airflow.fleets.local import LocalFleet
from spotfirst_airflow.following import Follower
from spotfirst_airflow.results import result
from spotfirst_airflow.submission import Request, attach, request_stop, storage_environment

Entry: Any = Claim | Commit | Prune | Release
SCRIPTS = Path(__file__).with_name("scripts")
AGENT = "spotfirst.agent"
SUPERVISOR = "spotfirst_airflow.fleets.local.supervisor"
WAIT_S = 300.0
EXIT_S = 30.0
"""A supervisor says that its instance is gone, and then has to exit itself."""


@dataclass(frozen=True)
class Place:
    """Where a drive happens: a storage, and a folder for the fleet and for what scripts tell."""

    storage: str
    folder: Path

    def open(self) -> Storage:
        """The storage."""
        return open_storage(self.storage)

    def request(self, *command: str, code: str = "train.py", **wishes: Any) -> Request:
        """A request for the local fleet: EC2's two minutes of notice, and few interruptions expected."""
        options = {"root": str(self.folder / "fleet"), "notice_s": 120.0}
        env = {"E2E_FOLDER": str(self.folder)} | wishes.pop("env", {})
        defaults = Request(
            command=("python", code, *command),
            code=str(SCRIPTS / code),
            env=env,
            fleet_options=options | wishes.pop("fleet_options", {}),
            policy="spot_only",
            checkpoint_period_s=1.0,
        )
        return msgspec.structs.replace(defaults, **wishes)


class Done(NamedTuple):
    """One step that a trainer did, as it told itself."""

    attempt: int
    step: int
    at: float


class Drive:
    """One run and the loop around its controller."""

    def __init__(self, place: Place, request: Request, run_id: str = "run") -> None:
        self.place = place
        self.storage = open_storage(place.storage)
        self.run = attach(
            self.storage, run_id, request, owner="test", environment=storage_environment()
        )
        self.request = request
        self.log = Told()
        self._follower = self._new_follower()

    @classmethod
    def watching(cls, place: Place, run: Run) -> Drive:
        """Only looks: somebody else submits the run and controls it."""
        drive = cls.__new__(cls)
        drive.place, drive.storage, drive.run, drive.log = place, run.root, run, Told()
        return drive

    # -- driving ----------------------------------------------------------------------------

    def look(self) -> float | None:
        """One pass of the controller; how long to wait, ``None`` when it is over."""
        return self._follower.look()

    def until(self, condition: Callable[[], object], *, timeout_s: float = WAIT_S) -> None:
        """Drive until this holds. Fails when the run is over before, or the time is."""
        end = time.monotonic() + timeout_s
        look_at = 0.0
        while not condition():
            assert time.monotonic() < end, f"not within {timeout_s:g} s:\n{self.story()}"
            if time.monotonic() >= look_at:
                wait_s = self.look()
                if condition():
                    return
                assert wait_s is not None, f"over before it happened:\n{self.story()}"
                look_at = time.monotonic() + wait_s
            time.sleep(0.1)

    def until_over(self, *, timeout_s: float = WAIT_S) -> RunState:
        """Drive to the end; the final state."""
        end = time.monotonic() + timeout_s
        while (wait_s := self.look()) is not None:
            assert time.monotonic() < end, f"not over after {timeout_s:g} s:\n{self.story()}"
            time.sleep(min(wait_s, 1.0))
        return self.state

    def until_step(self, attempt: int, step: int) -> None:
        """Drive until the attempt has done this step (counted from 0)."""
        self.until(lambda: any(d.attempt == attempt and d.step >= step for d in self.trace()))

    def until_training(self, attempt: int) -> int:
        """Drive until the attempt has done a step; which was its first."""
        self.until_step(attempt, 0)
        return next(done.step for done in self.trace() if done.attempt == attempt)

    def wait_for(self, condition: Callable[[], object], *, timeout_s: float = WAIT_S) -> None:
        """Wait while somebody else drives."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"not within {timeout_s:g} s:\n{self.story()}"
            time.sleep(0.1)

    def stop(self) -> None:
        """Ask for a checkpointed stop."""
        request_stop(self.run, reason="the test stops it")

    def attach_again(self, request: Request | None = None) -> None:
        """What a cleared task does: the same id, and a new look at everything."""
        self.run = attach(
            self.storage, self.run.run_id, request or self.request,
            owner="again", environment=storage_environment(),
        )  # fmt: skip
        self._follower = self._new_follower()

    # -- doing things to it -----------------------------------------------------------------

    @property
    def fleet(self) -> LocalFleet:
        return LocalFleet(self.run.spec().fleet_options, environment={})

    def interrupt(self, attempt: int, *, notice: bool) -> None:
        """Let the market take an attempt's instance."""
        assert self.fleet.interrupt(self.state.attempt(attempt).token, notice=notice)

    def kill(self, what: str, attempt: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to the ``trainer``, ``agent`` or ``supervisor`` of an attempt."""
        found = [p for p in self.processes(attempt) if _role(p) == what]
        assert found, f"no {what} among {[_role(p) for p in self.processes(attempt)]}"
        for process in found:
            process.send_signal(number)

    def slow(self, is_slow: bool) -> None:
        """Let the trainers linger, so that they are not done before what is to happen."""
        self.pace(1.0 if is_slow else 0.02)

    def pace(self, seconds: float) -> None:
        """How long the trainers' steps take from now on."""
        (self.place.folder / "pace").write_text(f"{seconds}")

    # -- looking ----------------------------------------------------------------------------

    @property
    def state(self) -> RunState:
        return self.run.journal().refresh()

    def has_checkpoint(self) -> bool:
        """Whether one is complete."""
        return bool(self.run.chain().refresh().commits)

    def heartbeat(self, attempt: int) -> Heartbeat | None:
        return self.run.heartbeat(attempt)

    def trace(self) -> list[Done]:
        """The steps that were really done, in order."""
        path = self.place.folder / "trace"
        lines = path.read_text().splitlines() if path.exists() else []
        rows = [line.split() for line in lines if line.count(" ") == 2]
        return [Done(int(a), int(s), float(t)) for a, s, t in rows]

    def repeated(self) -> list[int]:
        """Steps that were done more than once."""
        steps = [done.step for done in self.trace()]
        return sorted({step for step in steps if steps.count(step) > 1})

    def processes(self, attempt: int | None = None) -> list[psutil.Process]:
        """Living processes of the run's instances, by the mark in their environment."""
        token = f"spotfirst-{hashlib.sha256(self.run.url.encode()).hexdigest()[:32]}-"
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                mark = process.environ().get("SPOTFIRST_INSTANCE", "")
                mine = mark.startswith(token) if attempt is None else mark == f"{token}{attempt}"
                if mine and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def roles(self, attempt: int) -> set[str]:
        """What runs of an attempt."""
        return {_role(process) for process in self.processes(attempt)}

    def until_gone(self) -> list[str]:
        """Wait a moment for the last processes to exit; those that do not."""
        end = time.monotonic() + EXIT_S
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        return [f"{process.pid} {_role(process)}" for process in left]

    def result(self) -> dict[str, Any]:
        return result(self.run, self.state, now=utc_now())

    def bill(self) -> Bill:
        return bill(self.state, now=utc_now())

    def changeovers(self) -> tuple[Changeover, ...]:
        return changeovers(self.state, read_progress(self.run, self.state))

    def chain_entries(self) -> list[Any]:
        """Claims, commits, releases and prunings, as they are written."""
        names = self.storage.list(f"runs/{self.run.run_id}/checkpoints")
        paths = [f"runs/{self.run.run_id}/checkpoints/{name}" for name in names]
        return [decode(self.storage.read(path), Entry, path=path) for path in paths]

    def causes(self) -> list[str]:
        """How the attempts ended."""
        return [a.ended.cause if a.ended else "open" for a in self.state.attempts]

    def story(self) -> str:
        """All that is known, for a test that fails."""
        lines = [f"{self.run.url}: {self.state.phase}", *self.log.lines]
        for attempt in self.state.attempts:
            folder = self.place.folder / "fleet" / "instances" / attempt.token
            for path in (folder / "instance.log", *folder.glob("work/*/output.log")):
                if path.exists():
                    lines += [f"--- {path}", *path.read_text().splitlines()[-15:]]
        return "\n".join(lines)

    def _new_follower(self) -> Follower:
        return Follower(lambda: (self.run, storage_environment()), log=self.log, show_output=False)


class Told:
    """A log that a test can read."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def info(self, text: str, *values: Any) -> None:
        self.lines.append(text % values if values else text)

    warning = error = info


@contextlib.contextmanager
def driving(place: Place, request: Request, run_id: str = "run") -> Iterator[Drive]:
    """A drive that leaves nothing behind; fails when something was left that should not be."""
    place.folder.mkdir(parents=True, exist_ok=True)
    drive = Drive(place, request, run_id)
    try:
        yield drive
    except BaseException:
        kill_all(drive.processes)
        raise
    left = drive.until_gone()
    kill_all(drive.processes)
    assert left == [], f"{drive.run.url} left processes behind: {left}"


def see_through(place: Place, request: Request, run_id: str = "run") -> Drive:
    """Drive a run to its success; the drive, for what is left to look at."""
    with driving(place, request, run_id) as drive:
        state = drive.until_over()
        assert state.phase is Phase.SUCCEEDED, drive.story()
    return drive


def kill_all(find: Callable[[], list[psutil.Process]]) -> None:
    """SIGKILL what is found until there is nothing."""
    for _ in range(100):
        found = find()
        if not found:
            return
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.05)


def together(first: Callable[[], Any], *others: Callable[[], Any]) -> list[Any]:
    """Do all of this at once, ``first`` in this thread; the results in order, or a failure."""
    with ThreadPoolExecutor(max(1, len(others))) as pool:
        futures = [pool.submit(action) for action in others]
        found = [first()]
    return found + [future.result() for future in futures]


def can_mount() -> bool:
    """Whether this machine lets us mount something, in a namespace of its own."""
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    with contextlib.suppress(OSError):
        return subprocess.run(mount, check=False, capture_output=True).returncode == 0
    return False


def uninterrupted(folder: Path, steps: int) -> str:
    """The weights after so many steps without Spotfirst's agent, storage or fleet."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPOTFIRST_")}
    told = subprocess.run(
        [sys.executable, str(SCRIPTS / "train.py"), str(steps)],
        env=environment | {"E2E_FOLDER": str(folder), "E2E_PACE_S": "0"},
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    found = re.search(r"weights ([0-9a-f]{64})", told)
    assert found, told
    return found[1]


def _role(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        if AGENT in words:
            return "agent"
        if SUPERVISOR in words:
            return "supervisor"
        if any(word.endswith("_guard.py") for word in words):
            return "guard"
        if any(word.endswith(".py") for word in words):
            return "trainer"
        return " ".join(words)
    return "gone"
