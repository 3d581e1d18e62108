"""A notice in the middle of a save, before one or after one: what is committed is committed in time.

The storage stores 1 MB/s, on a clock that its writes move.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from spotfirst.channel import Drain
from spotfirst.checkpointer import Checkpointer, Drained
from spotfirst.context import TrainerContext
from spotfirst.run import Run
from spotfirst.storage import Storage
from tests.checkpointing.training import attempt, progress

BOOT = datetime(2026, 1, 1, tzinfo=timezone.utc)
BYTES_PER_S = 1_000_000
STATE_S = 2.0
"""How long the state takes to be stored."""


class World:
    """A clock, a slow storage, and a training of one step a second."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.now_s = 0.0
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.packs: list[str] = []
        self.committed_at_s: list[float] = []
        self.run = run
        self.context: TrainerContext = attempt(
            Run(cast("Storage", SlowStorage(run.root, self)), run.run_id), 1, folder
        )
        self.weights = torch.nn.Parameter(torch.zeros(int(STATE_S * BYTES_PER_S) // 4))
        self.checkpointer = Checkpointer(
            model=torch.nn.ParameterList([self.weights]), context=self.context, period_s=1e9,
            clock=lambda: BOOT + timedelta(seconds=self.now_s), monotonic=lambda: self.now_s,
        )  # fmt: skip
        self.checkpointer.restore()
        self.done = 0

    def train(self) -> None:
        """One step, which changes everything."""
        with self.lock:
            self.now_s += 1.0
        with torch.no_grad():
            self.weights.add_(torch.rand_like(self.weights))
        self.done += 1
        self.checkpointer.step(self.done)

    def notice(self, left_s: float) -> float:
        """When everything has to be committed."""
        assert self.context.channel is not None
        by_s = self.now_s + left_s
        by = BOOT + timedelta(seconds=by_s)
        self.context.channel.ask_to_drain(Drain(reason="interruption", by=by))
        return by_s

    def drain(self, left_s: float) -> float:
        """Notice and leave; when everything had to be committed."""
        by_s = self.notice(left_s + 1.0)  # the step takes one of them
        with pytest.raises(Drained):
            self.train()
        return by_s

    def steps(self) -> list[int]:
        return [commit.step for _, commit in self.run.chain().refresh().commits]

    def warnings(self) -> str:
        return "\n".join(progress(self.context).warnings)


class SlowStorage:
    """A storage whose packs take their time, and stop before the gate while that is shut."""

    def __init__(self, inner: Storage, world: World) -> None:
        self._inner, self._world = inner, world

    def child(self, path: str) -> SlowStorage:
        return SlowStorage(self._inner.child(path), self._world)

    def write(self, path: str, data: bytes) -> None:
        self.write_from(path, memoryview(data))

    def write_from(self, path: str, data: memoryview) -> None:
        if len(data) > BYTES_PER_S:
            self._world.packs.append(path)
            assert self._world.gate.wait(20)
        with self._world.lock:
            self._world.now_s += len(data) / BYTES_PER_S
        self._inner.write_from(path, data)

    def create(self, path: str, data: bytes) -> bool:
        created = self._inner.create(path, data)
        if b"manifest" in data:
            self._world.committed_at_s.append(self._world.now_s)
        return created

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@pytest.fixture
def world(run: Run, tmp_path: Path) -> Iterator[World]:
    world = World(run, tmp_path)
    yield world
    world.gate.set()


class _OpenGate(logging.Handler):
    """The storage goes on when the decision is made."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("asked to stop"):
            self._world.gate.set()


@pytest.fixture
def in_mid_save(world: World) -> Iterator[World]:
    """One checkpoint is stored, of step 1; the next one, of step 2, has just been begun."""
    world.train()
    world.checkpointer.save()
    world.gate.clear()
    world.train()
    assert world.checkpointer.save(wait=False)
    logger = logging.getLogger("spotfirst.checkpointer")
    handler = _OpenGate(world)
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield world
    logger.setLevel(level)
    logger.removeHandler(handler)


def stored_once(world: World) -> World:
    world.train()
    world.checkpointer.save()
    world.train()
    return world


# -- before a save --------------------------------------------------------------------------


def test_a_last_checkpoint_is_taken_when_there_is_time(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    stored_once(world)
    with caplog.at_level(logging.INFO):
        by_s = world.drain(3.0)
    assert world.steps() == [1, 3]
    assert world.committed_at_s[-1] <= by_s - 0.5
    assert "3 s left: taking a last checkpoint (2.01 MB at 1 MB/s, 2 s; with a margin 2.9 s)" in (
        caplog.text
    )
    assert not world.warnings()
    assert world.run.chain().refresh().released


def test_one_that_cannot_be_committed_in_time_is_not_begun(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    stored_once(world)
    packs = len(world.packs)
    with caplog.at_level(logging.INFO):
        world.drain(2.8)
    assert world.steps() == [1]
    assert len(world.packs) == packs
    assert (
        "steps 2 to 3 are given up: 2.8 s left: not enough for a last checkpoint"
        in world.warnings()
    )
    assert world.run.chain().refresh().released
    assert progress(world.context).released


def test_a_first_checkpoint_is_tried_without_any_measurement(world: World) -> None:
    world.train()
    world.drain(1.0)
    assert world.steps() == [2]


def test_one_that_is_not_stored_in_time_is_abandoned_and_never_committed(world: World) -> None:
    world.gate.clear()
    world.train()
    world.drain(0.6)
    assert (
        "steps 1 to 2 are given up: the checkpoint was not written within 0.1 s" in world.warnings()
    )
    _let_it_end(world)
    assert world.steps() == []


# -- after a save ---------------------------------------------------------------------------


def test_a_step_that_is_stored_already_needs_no_time(world: World) -> None:
    stored_once(world)
    world.checkpointer.save()
    world.notice(0.1)
    with pytest.raises(Drained):
        world.checkpointer.step(world.done)
    assert world.steps() == [1, 2]
    assert not world.warnings()


# -- in the middle of a save ----------------------------------------------------------------


def test_the_running_save_is_finished_and_a_last_one_taken(
    in_mid_save: World, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        by_s = in_mid_save.drain(7.0)
    assert in_mid_save.steps() == [1, 2, 3]
    assert in_mid_save.committed_at_s[-1] <= by_s - 0.5
    assert "finishing the checkpoint of step 2 (2 MB of 2 MB left" in caplog.text
    assert "taking a last checkpoint" in caplog.text
    assert not in_mid_save.warnings()


def test_only_the_running_save_is_finished_when_there_is_no_time_for_another(
    in_mid_save: World,
) -> None:
    by_s = in_mid_save.drain(5.0)
    assert in_mid_save.steps() == [1, 2]
    assert in_mid_save.committed_at_s[-1] <= by_s - 0.5
    assert "step 3 is given up: " in in_mid_save.warnings()


def test_a_running_save_that_cannot_make_it_is_given_up_at_once(world: World) -> None:
    world.train()
    world.checkpointer.save()
    world.gate.clear()
    world.train()
    assert world.checkpointer.save(wait=False)
    world.drain(2.0)
    assert "giving up the checkpoint of step 2" in world.warnings()
    assert "steps 2 to 3 are given up" in world.warnings()
    _let_it_end(world)
    assert world.steps() == [1]


@pytest.mark.parametrize("left_s", [0.2, 0.7, 1.5, 2.4, 2.6, 2.95, 3.5, 4.4, 5.3, 5.6, 20.0])
def test_whatever_time_is_left_nothing_is_committed_too_late(
    world: World, run: Run, left_s: float
) -> None:
    stored_once(world)
    by_s = world.drain(left_s)
    assert all(at_s <= by_s for at_s in world.committed_at_s)
    assert len(world.packs) == len(world.steps())  # all that was begun was committed


def _let_it_end(world: World) -> None:
    world.gate.set()
    saver = world.checkpointer._saver
    assert saver is not None
    _until(lambda: not saver.busy)


def _until(holds: Callable[[], bool]) -> None:
    for _ in range(2000):
        if holds():
            return
        threading.Event().wait(0.01)
    pytest.fail("waited in vain")
