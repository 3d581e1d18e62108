"""A notice in the middle of a save, before one or after one: what is committed is committed in time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from spotfirst.checkpointer import Drained
from spotfirst.run import Run
from tests.checkpointing.slow import World
from tests.checkpointing.training import progress


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
    assert "finishing the checkpoint of step 2 (2.01 MB of 2.01 MB left" in caplog.text
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
