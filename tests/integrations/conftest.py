from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

from spotfirst.channel import Channel, Drain
from spotfirst.checkpoints.chain import Commit
from spotfirst.heartbeat import ExitReport, Progress
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from tests.waiting import wait_until

Server = subprocess.Popen[str]

HERE = Path(__file__).parent
KILLS = 3
SLOW_STEP_S = 0.05


def needs(package: str) -> pytest.MarkDecorator:
    """Skip where it is missing. Asking does not import it: that takes seconds."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed; `make setup` does it")


class Trainings:
    """Runs trainings of one script, each in a process of its own, forked from one with imports."""

    def __init__(self, server: Server, folder: Path, variant: str) -> None:
        self._server = server
        self._folder = folder
        self._variant = variant
        self._attempts = 0
        self._process: int | None = None
        self._reference = ""
        spec = RunSpec(
            run_id="r",
            created_at=datetime(2026, 1, 1, tzinfo=timezone.utc),
            command=("train",),
        )
        self.run: Run = create_run(open_storage(str(folder / "storage")), spec)

    @property
    def channel(self) -> Channel:
        """That of the attempt which was started last."""
        return Channel(self._folder / f"channel-{self._attempts}")

    def progress(self) -> Progress:
        """What the attempt that was started last told its agent."""
        progress = self.channel.progress()
        assert progress is not None
        return progress

    def newest(self) -> Commit:
        newest = self.run.chain().refresh().newest()
        assert newest is not None
        return newest[1]

    @property
    def commits(self) -> int:
        """How many checkpoints there were, pruned ones included."""
        chain = self.run.chain().refresh()
        return chain.commits[-1][0] if chain.commits else 0

    def start(self, step_s: float = 0, hold_after: int = 0) -> int:
        """Begin the next attempt; its process. Its predecessor's agent has seen it end.

        After ``hold_after`` passes through the model it waits for its interruption.
        """
        if self._attempts:
            self.run.report_exit(ExitReport(attempt=self._attempts, at=utc_now(), cause="killed"))
        self._attempts += 1
        channel = self._folder / f"channel-{self._attempts}"
        channel.mkdir()
        return self._order(
            SPOTFIRST_STORAGE=self.run.root.url,
            SPOTFIRST_RUN="r",
            SPOTFIRST_ATTEMPT=str(self._attempts),
            SPOTFIRST_CHANNEL=str(channel),
            SPOTFIRST_CHECKPOINT_PERIOD_S="0.02",
            STEP_S=str(step_s),
            HOLD_AFTER=str(hold_after),
            HELD_FILE=str(self._held),
        )

    def end(self) -> int:
        """The exit status of the one that was started last."""
        word, status = self._line().split()
        self._process = None
        assert word == "ended"
        return os.waitstatus_to_exitcode(int(status))

    def finish(self) -> str:
        """Let an attempt train to the end; the weights' digest."""
        self.start()
        assert self.end() == 0
        return self._weights()

    def uninterrupted(self) -> str:
        """The weights of a training that knows nothing of Spotfirst."""
        if not self._reference:
            self._order()
            assert self.end() == 0
            self._reference = self._weights()
        return self._reference

    def wait_for_a_commit(self, beyond: int) -> None:
        """Until there are more than ``beyond``, or the attempt waits for its interruption."""
        wait_until(lambda: self.commits > beyond or self._held.exists(), "a commit")

    @property
    def _held(self) -> Path:
        """The file by which the attempt that was started last says that it waits."""
        return self._folder / f"held-{self._attempts}"

    def abandon(self) -> None:
        """End what a failed test has left running: the next test uses the same server."""
        if self._process is not None:
            os.kill(self._process, signal.SIGKILL)
            self.end()

    def _order(self, **environment: str) -> int:
        out = self._folder / "weights"
        out.unlink(missing_ok=True)
        order = {"environment": environment, "variant": self._variant, "out": str(out)}
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        self._process = int(self._line())
        return self._process

    def _line(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()

    def _weights(self) -> str:
        return (self._folder / "weights").read_text()


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The process with the imports of the module's ``SCRIPT``."""
    command = [sys.executable, str(HERE / "server.py"), request.module.SCRIPT]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPOTFIRST_")}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.kill()


@pytest.fixture
def trainings(
    server: Server, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Trainings]:
    """Of one run, in the variant that is the test's parameter."""
    trainings = Trainings(server, tmp_path, request.param)
    yield trainings
    trainings.abandon()


def killed_often(trainings: Trainings) -> None:
    """Kill it at any instant, perhaps in the middle of restoring; let the last one finish."""
    instants = random.Random(0)
    for attempt in range(KILLS):
        commits = trainings.commits
        process = trainings.start(SLOW_STEP_S, hold_after=8)
        if attempt % 3:
            trainings.wait_for_a_commit(commits)
        time.sleep(instants.uniform(0, 0.15))
        os.kill(process, signal.SIGKILL)
        assert trainings.end() == -signal.SIGKILL
    assert trainings.finish() == trainings.uninterrupted()
    assert (trainings.progress().start_step or 0) > 0
    # A run that is over stays so.
    assert trainings.finish() == trainings.uninterrupted()
    assert trainings.progress().start_step == trainings.newest().step


def drained_once(trainings: Trainings) -> Progress:
    """Ask it to leave, as the agent does at a notice: nothing is lost, and nothing fails."""
    trainings.start(SLOW_STEP_S, hold_after=30)
    trainings.wait_for_a_commit(2)
    trainings.channel.ask_to_drain(Drain(reason="interruption"))
    assert trainings.end() == 0
    left = trainings.progress()
    assert left.released
    assert left.step == trainings.newest().step
    assert left.total_steps is None or left.step < left.total_steps
    assert trainings.finish() == trainings.uninterrupted()
    assert trainings.progress().start_step == left.step
    return trainings.progress()
