"""The period in force: measured, told once, and followed by a storage that is too slow for it."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest

from spotfirst.checkpoints.schedule import Schedule
from spotfirst.errors import InvalidSpec
from spotfirst.reporting import ProgressReporter
from spotfirst.run import Run
from tests.checkpointing.slow import STATE_S, World
from tests.checkpointing.training import progress


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTFIRST_CHECKPOINT_PERIOD_S", "100")
    monkeypatch.setenv("SPOTFIRST_INTERRUPTION_MEAN_S", "36")


def schedule(period_s: Any = None, **variables: str) -> Schedule:
    environment = {f"SPOTFIRST_{name}": value for name, value in variables.items()}
    return Schedule(period_s, ProgressReporter(None), environment=environment)


def complete(world: World) -> None:
    """Let a save that is running be stored, beside the step that follows."""
    saver = world.checkpointer._saver
    assert saver is not None
    saver.finish()


# -- where it comes from --------------------------------------------------------------------


def test_the_agent_says_what_a_kill_may_lose_and_how_often_one_is_to_be_expected() -> None:
    assert schedule().period.period_s == 300
    assert schedule(CHECKPOINT_PERIOD_S="17.5").period.period_s == 17.5
    told = schedule(CHECKPOINT_PERIOD_S="17.5", INTERRUPTION_MEAN_S="50").period
    assert told.period_s == pytest.approx(math.sqrt(2 * 50) + 1 / 3)
    assert told.interruption_mean_s == 50
    assert schedule("auto", CHECKPOINT_PERIOD_S="17.5").period.period_s == 17.5


def test_what_the_script_gives_stands(run: Run, tmp_path: Path) -> None:
    assert schedule(0, CHECKPOINT_PERIOD_S="17.5").period.period_s == 0
    world = World(run, tmp_path, period_s=5)
    for _ in range(15):
        world.train()
        complete(world)
    told = progress(world.context).period
    assert told is not None
    assert (told.period_s, told.reason) == (5, "given by the script")


@pytest.mark.parametrize(
    ("period_s", "variables", "says"),
    [
        (None, {"CHECKPOINT_PERIOD_S": "often"}, "SPOTFIRST_CHECKPOINT_PERIOD_S is 'often'"),
        (None, {"INTERRUPTION_MEAN_S": "0"}, "SPOTFIRST_INTERRUPTION_MEAN_S is 0"),
        (None, {"INTERRUPTION_MEAN_S": "nan"}, "SPOTFIRST_INTERRUPTION_MEAN_S is nan"),
        (-1, {}, "the checkpoint period is -1"),
        ("often", {}, "the checkpoint period is 'often'"),
    ],
)
def test_what_is_no_time_is_refused(period_s: Any, variables: dict[str, str], says: str) -> None:
    with pytest.raises(InvalidSpec, match=says):
        schedule(period_s, **variables)


# -- in a training --------------------------------------------------------------------------


def test_the_period_follows_from_the_measured_cost_and_is_told(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A save takes the loop two seconds, as if training stood still meanwhile."""
    with caplog.at_level(logging.INFO, logger="spotfirst.checkpoints.schedule"):
        world = World(run, tmp_path, period_s="auto")
        for _ in range(40):
            world.train()
            complete(world)
    assert world.steps()[0] == 9  # sqrt(2 * 1 * 36) + 1/3 s, for a cost of 1 s until it is known
    assert caplog.messages == [
        (
            "a checkpoint every 8.82 s: Young/Daly, for a cost of 1 s until it is measured "
            "(mean time between interruptions 36 s)"
        ),
        (
            "a checkpoint every 12.7 s: Young/Daly (cost 2.01 s, stored after 2.01 s, "
            "mean time between interruptions 36 s)"
        ),
    ]
    told = progress(world.context)
    assert told.period is not None
    assert told.period.cost_s == pytest.approx(STATE_S, rel=0.01)
    assert told.period.period_s == pytest.approx(12 + 2 / 3, rel=0.01)
    assert told.drain_s == pytest.approx(2.2 * STATE_S + 0.5, rel=0.01)
    assert not told.warnings


def test_a_storage_too_slow_for_the_limit_gets_one_save_after_the_other_and_says_so_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOTFIRST_CHECKPOINT_PERIOD_S", "3")
    world = World(run, tmp_path, period_s="auto")
    for _ in range(30):
        world.train()
        complete(world)
    assert world.steps() == [26, 27, 28, 29, 30]  # those that are kept
    (warning,) = progress(world.context).warnings
    assert warning.startswith(
        "checkpoints are slow: a checkpoint every 2.01 s: one after the other"
    )
    assert "more than the limit of 3 s" in warning


def test_a_save_that_hangs_puts_off_the_next_with_one_warning(run: Run, tmp_path: Path) -> None:
    world = World(run, tmp_path, period_s=5)
    world.gate.clear()
    for _ in range(30):
        world.train()
    (warning,) = progress(world.context).warnings
    assert "takes longer than its period of 5 s: 5" in warning
    assert len(world.packs) <= 1
    world.gate.set()
    complete(world)
    world.train()
    complete(world)
    assert world.steps() == [5, 31]  # at once when the storage is free
