from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from spotfirst.checkpoints.blobs import BlobStore
from spotfirst.checkpoints.manifest import PartReader, StateManifest, read_manifest
from spotfirst.checkpoints.weights import state_digest
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from tests.checkpointing.conftest import LONG_AGO

KILLS = 12
SCRIPT = Path(__file__).with_name("killed.py")


class Trainings:
    """Starts real processes that train, one at a time."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def start(self, run: Run, attempt: int, steps: int) -> int:
        """The process's id. Its predecessor's end is as good as a release."""
        chain = run.chain().refresh()
        if chain.holder is not None and not chain.released:
            chain.release(chain.holder)
        assert self._server.stdin is not None
        self._server.stdin.write(f"{run.root.url} {attempt} {steps}\n")
        self._server.stdin.flush()
        return int(self._line())

    def end(self) -> int:
        """The exit status of the one that was started last, as of :func:`os.waitpid`."""
        word, status = self._line().split()
        assert word == "ended"
        return int(status)

    def _line(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline()


@pytest.fixture
def trainings() -> Iterator[Trainings]:
    command = [sys.executable, str(SCRIPT)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
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
    blobs = BlobStore(run.blobs())
    manifest = read_manifest(blobs, newest[1].manifest)
    assert isinstance(manifest, StateManifest)
    reader = PartReader(blobs, manifest.blobs)
    for array in manifest.arrays:
        assert len(reader.read(array.parts)) == array.size_bytes
    assert manifest.step == newest[1].step
    return manifest.step


def _weights(run: Run) -> str:
    newest = run.chain().refresh().newest()
    assert newest is not None
    return state_digest(BlobStore(run.blobs()), newest[1].manifest)


def _wait_for_a_commit(run: Run, beyond: int) -> None:
    until = time.monotonic() + 60
    chain = run.chain()
    while len(chain.refresh().commits) <= beyond:
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
        commits = len(run.chain().refresh().commits)
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
