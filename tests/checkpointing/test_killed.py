from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotfirst.checkpointer import Checkpointer
from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.loading import StateReader
from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.checkpoints.weights import state_digest
from spotfirst.heartbeat import ExitReport
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from tests.checkpointing.conftest import LONG_AGO
from tests.checkpointing.killed import Counter

KILLS = 12
SCRIPT = Path(__file__).with_name("killed.py")


class Trainings:
    """Starts real processes that train, one at a time."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def start(self, run: Run, attempt: int, steps: int) -> int:
        """The process's id. Its predecessor is known to have ended."""
        holder = run.chain().refresh().holder
        if holder is not None:
            run.report_exit(ExitReport(attempt=holder, at=LONG_AGO, cause="killed"))
        self._order("train", run.root.url, attempt, steps)
        return int(self._line())

    def kill_often(self, folder: Path, kills: int, seed: int) -> int:
        """The steps that were reached by processes that were killed all the time."""
        self._order("kill", folder, kills, seed)
        answer = self._line().strip()
        assert answer.isdigit(), answer
        return int(answer)

    def _order(self, *words: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.write(" ".join(map(str, words)) + "\n")
        self._server.stdin.flush()

    def end(self) -> int:
        """The exit status of the one that was started last, as of :func:`os.waitpid`."""
        word, status = self._line().split()
        assert word == "ended"
        return int(status)

    def _line(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


@pytest.fixture(scope="module")
def trainings() -> Iterator[Trainings]:
    command = [sys.executable, str(SCRIPT)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        yield Trainings(server)
        assert server.stdin is not None
        server.stdin.close()


def _run(folder: Path) -> Run:
    spec = RunSpec(run_id="r", created_at=LONG_AGO, command=("train",))
    return create_run(open_storage(str(folder)), spec)


def _whole_newest(run: Run) -> int:
    """The newest checkpoint's step, when every byte of it is there and right."""
    newest = run.chain().refresh().newest()
    if newest is None:
        return 0
    packs = run.packs()
    manifest = read_manifest(packs, newest[1].manifest, newest[1].digest)
    assert isinstance(manifest, StateManifest)
    reader = StateReader(packs, manifest)
    for tree in manifest.objects.values():
        reader.plan(tree)
    reader.fetch()
    assert manifest.step == newest[1].step
    return manifest.step


def _weights(run: Run) -> str:
    newest = run.chain().refresh().newest()
    assert newest is not None
    return state_digest(run.packs(), newest[1])


def _wait_for_a_commit(run: Run, beyond: int) -> None:
    until = time.monotonic() + 180
    chain = run.chain()
    while len(chain.refresh().commits) + len(chain.pruned) <= beyond:
        assert time.monotonic() < until, "it does not save"
        time.sleep(0.002)


@pytest.mark.slow
def test_kill_9_at_any_instant_leaves_a_whole_checkpoint_and_the_same_end(
    trainings: Trainings, tmp_path: Path
) -> None:
    instants = random.Random(0)
    run = _run(tmp_path / "killed")
    reached = 0
    for attempt in range(1, KILLS + 1):
        chain = run.chain().refresh()
        commits = len(chain.commits) + len(chain.pruned)
        process = trainings.start(run, attempt, 10**6)
        if attempt % 3:  # else: perhaps in the middle of restoring
            _wait_for_a_commit(run, commits)
        time.sleep(instants.uniform(0, 0.15))
        os.kill(process, signal.SIGKILL)
        assert trainings.end() == signal.SIGKILL
        step = _whole_newest(run)
        assert step >= reached
        reached = step
    assert reached > KILLS // 2
    uninterrupted = _run(tmp_path / "uninterrupted")
    for target in (run, uninterrupted):
        trainings.start(target, KILLS + 1, reached + 3)
        assert trainings.end() == 0
    assert _weights(run) == _weights(uninterrupted)


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """A folder in memory: a kill, unlike a power failure, loses nothing that was not synced."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_after_each_of_500_kills_every_checkpoint_is_whole_and_of_its_step(
    trainings: Trainings, memory_folder: Path, seed: int
) -> None:
    """Of a restore, a save, a commit, a pruning and a collection."""
    reached = trainings.kill_often(memory_folder, 50, seed)
    assert reached > 20
    run = Run(open_storage(str(memory_folder)), "local")
    model = Counter()
    checkpointer = Checkpointer(model=model, storage=str(memory_folder), strict=False)
    assert checkpointer.restore() == reached
    for step in range(reached + 1, reached + 8):
        checkpointer.step(step)
        checkpointer.save()
    chain = run.chain().refresh()
    named = {name for _, commit in chain.commits for name in _names(run, commit)}
    assert {name for name, _ in run.packs().walk("")} == named, "nothing is left behind"


def _names(run: Run, commit: Commit) -> set[str]:
    manifest = read_manifest(run.packs(), commit.manifest, commit.digest)
    return {commit.manifest, *(pack.name for pack in manifest.packs)}
