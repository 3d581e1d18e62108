"""Whatever fails, dies and races on a simulated EC2: one commits, nothing leaks, the bill is true.

The seeds are Hypothesis's: of one that fails it prints the seed, and
``python -m benchmarks.schedules --seed SEED --story`` tells what happened there.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.schedules import play, world_of
from tests.fleets.ec2 import planted


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """What fails here fails on purpose, thousands of times."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_one_attempt_commits_nothing_leaks_and_the_bill_is_true(seed: int) -> None:
    assert play(seed).violations == []


@pytest.mark.parametrize("seed", [1, 3])
def test_the_same_seed_is_the_same_story(seed: int) -> None:
    first, second = play(seed), play(seed)
    assert first.calls == second.calls > 50
    assert first.faults == second.faults
    assert first.simulated_s == second.simulated_s


def test_schedules_are_of_many_kinds_and_reach_their_end() -> None:
    outcomes = [play(seed) for seed in range(100, 110)]
    assert {"succeeded", "stopped"} <= {outcome.phase for outcome in outcomes}
    kinds = {kind for outcome in outcomes for kind in outcome.faults}
    assert kinds == {"refused", "lost", "died", "held up"}
    assert any(outcome.interrupted for outcome in outcomes)
    assert sum(outcome.exact for outcome in outcomes) > 5


@pytest.mark.parametrize(
    ("plant", "seed", "finding"),
    [
        (planted.no_fence, 405, "wrote while attempt"),
        (planted.no_token, 439, "2 instances"),
        (planted.hasty, 403, "was said to have ended"),
        (planted.all_paid, 406, "truly \\$0"),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_a_planted_bug_is_found_out(
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    seed: int,
    finding: str,
) -> None:
    """The checks can fail. From that seed on: which one shows it first changes with each call."""
    plant(monkeypatch)
    outcomes = (play(each) for each in range(seed, seed + 150))
    assert any(re.search(finding, "; ".join(outcome.violations)) for outcome in outcomes)


def _moving(seed: int) -> Iterator[int]:
    for each in itertools.count(seed):
        world = world_of(each)
        world.close()
        if world.work.stall_share == 1.0:
            yield each


def test_the_schedules_reach_what_must_hold_there() -> None:
    """Seeds in which an instance is replaced while its last checkpoint is under way."""
    assert any(play(seed).fenced for seed in itertools.islice(_moving(400), 20))


def test_an_instance_that_nobody_owns_is_found_out() -> None:
    """The check itself can fail."""
    world = world_of(3)
    try:
        world.reaper.due_at = world.now.replace(year=2030)
        pool = next(iter(world.cloud.pools))
        stray = world.cloud.launch(pool, spot=False)
        stray.tags = {
            "spotfirst:run": "run", "spotfirst:attempt": "99", "spotfirst:token": "stray",
            "spotfirst:storage": world.storage.url,
        }  # fmt: skip
        stray.running_at = world.now.replace(year=2030)  # its agent never starts
        while world.clock.since_start_s < 1000:
            world.tick()
        assert any(stray.instance_id in what for what in world.broken)
    finally:
        world.close()
