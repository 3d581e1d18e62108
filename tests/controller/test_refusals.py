"""A refused launch fails a run only when nothing else is possible."""

from __future__ import annotations

from datetime import timedelta
from itertools import pairwise

import pytest

from spotfirst.errors import FleetError, LaunchRejected, QuotaReached
from spotfirst.market import Market
from spotfirst.state import Phase
from tests.controller.world import START, World

QUOTA = QuotaReached("MaxSpotInstanceCountExceeded: the quota is used up")
PERMISSION = LaunchRejected("UnauthorizedOperation: not allowed")
IMAGE = LaunchRejected("InvalidAMIID.NotFound: no such image")
REFUSALS = [QUOTA, PERMISSION, IMAGE]
OTHER = {Market.SPOT: Market.ON_DEMAND, Market.ON_DEMAND: Market.SPOT}


def until_training(world: World, market: Market | None = None) -> None:
    for _ in range(3000):
        if any(m.phase == "training" and market in {None, m.request.market} for m in world.alive()):
            return
        world.reconcile()
        world.tick()
    raise AssertionError("nothing trains:\n" + "\n".join(world.news))


def could_go_back_to_spot() -> World:
    """A world that trains on demand, where there is spot capacity again."""
    world = World(
        total_steps=4000, policy_options={"return_after_s": 60.0, "no_capacity_s": 1.0},
    )  # fmt: skip
    world.capacity = dict.fromkeys(world.capacity, False)
    until_training(world, Market.ON_DEMAND)
    world.capacity = dict.fromkeys(world.capacity, True)
    return world


@pytest.mark.parametrize("refusal", REFUSALS, ids=["quota", "permission", "image"])
@pytest.mark.parametrize("market", list(Market))
@pytest.mark.parametrize("deadline_s", [None, 400, 3600])
@pytest.mark.parametrize("policy", ["spotfirst", "fallback", "greedy", "uniform_progress"])
def test_one_market_that_refuses_is_done_without(
    policy: str, deadline_s: float | None, market: Market, refusal: FleetError
) -> None:
    deadline = START + timedelta(seconds=deadline_s) if deadline_s else None
    world = World(policy=policy, deadline=deadline, training_time_s=60.0)
    world.refuses[market] = refusal
    state = world.until_done(limit_s=8000).state
    assert state.phase is Phase.SUCCEEDED
    assert sum("launches are refused" in warning for warning in state.warnings) <= 1


@pytest.mark.parametrize("refusal", REFUSALS, ids=["quota", "permission", "image"])
def test_a_refused_move_leaves_what_trains_alone_and_is_tried_ever_more_seldom(
    refusal: FleetError,
) -> None:
    world = could_go_back_to_spot()
    world.refuses[Market.SPOT] = refusal
    trainer = world.trainer()
    for _ in range(3000):
        world.reconcile()
        world.tick()
    assert trainer.ended_at is None
    state = world.run.journal().refresh()
    assert state.phase is Phase.ACTIVE
    assert sum("launches are refused" in warning for warning in state.warnings) == 1
    times = [at for at, market in world.refused if market is Market.SPOT]
    pauses_s = [(later - at).total_seconds() for at, later in pairwise(times)]
    assert 2 <= len(times) <= 30
    assert max(pauses_s) >= 4 * min(pauses_s), "it backs off"
    world.refuses.clear()
    assert world.until_done(limit_s=5000).state.phase is Phase.SUCCEEDED


def test_a_move_to_instances_that_cannot_run_the_agent_leaves_what_trains_alone() -> None:
    world = could_go_back_to_spot()
    trainer = world.trainer()
    for _ in range(3000):
        world.reconcile()
        for machine in world.alive():
            if machine.request.market is Market.SPOT and not machine.exited:
                machine.exit("unfit", message="the agent cannot work with this image: no blake3")
        world.tick()
    assert trainer.ended_at is None
    state = world.run.journal().refresh()
    assert state.phase is Phase.ACTIVE
    ended = [a.ended.at for a in state.attempts if a.ended and a.ended.cause == "unfit"]
    pauses_s = [(later - at).total_seconds() for at, later in pairwise(ended)]
    assert 2 <= len(ended) <= 30
    assert max(pauses_s) >= 4 * min(pauses_s), "it backs off"
    assert any("no blake3" in warning for warning in state.warnings)
    assert world.until_done(limit_s=5000).state.phase is Phase.SUCCEEDED


@pytest.mark.parametrize("first", list(Market))
def test_it_fails_when_both_markets_refuse_for_good_with_what_both_say(first: Market) -> None:
    world = World(policy="fallback" if first is Market.SPOT else "uniform_progress")
    world.refuses = {Market.SPOT: PERMISSION, Market.ON_DEMAND: IMAGE}
    state = world.until_done(limit_s=1000).state
    assert state.phase is Phase.FAILED
    assert state.failure is not None
    assert "not allowed" in state.failure.message
    assert "no such image" in state.failure.message
    assert not state.failure.retryable
    assert {market for _, market in world.refused} == set(Market)


def test_quotas_of_both_markets_are_waited_for_and_warned_about() -> None:
    world = World()
    world.refuses = {Market.SPOT: QUOTA, Market.ON_DEMAND: QUOTA}
    for _ in range(2000):
        world.reconcile()
        world.tick()
    state = world.run.journal().refresh()
    assert state.phase is Phase.ACTIVE
    assert [w.split()[0] for w in state.warnings if "quota is used up" in w] == [
        "spot", "on-demand",
    ]  # fmt: skip
    assert len(world.refused) < 100
    world.refuses.clear()
    assert world.until_done().state.phase is Phase.SUCCEEDED


@pytest.mark.parametrize(
    ("policy", "market"), [("spot_only", Market.SPOT), ("on_demand", Market.ON_DEMAND)]
)
def test_a_policy_of_one_market_waits_for_its_quota_and_is_not_taken_elsewhere(
    policy: str, market: Market
) -> None:
    world = World(policy=policy)
    world.refuses[market] = QUOTA
    for _ in range(300):
        world.reconcile()
        world.tick()
    assert world.run.journal().refresh().phase is Phase.ACTIVE
    world.refuses[market] = PERMISSION
    state = world.until_done(limit_s=1000).state
    assert state.phase is Phase.FAILED
    assert world.machines == {}


def test_what_was_refused_once_is_forgotten_with_the_next_launch_there() -> None:
    world = World(total_steps=2000)
    world.refuses[Market.SPOT] = PERMISSION
    until_training(world, Market.ON_DEMAND)
    world.refuses.clear()
    until_training(world, Market.SPOT)
    world.refuses[Market.ON_DEMAND] = PERMISSION
    world.interrupt(world.trainer())
    assert world.until_done(limit_s=5000).state.phase is Phase.SUCCEEDED


def test_a_run_that_fails_lets_what_trains_checkpoint_first() -> None:
    world = World(total_steps=2000)
    until_training(world)
    first = world.trainer()
    world.interrupt(first)
    while len(world.alive()) < 2 or world.alive()[-1].phase != "training":
        world.reconcile()
        world.tick()
    second = world.alive()[-1]
    while (second.progress.step or 0) % world.checkpoint_every != 5:
        world.reconcile()
        world.tick()
    # The first one's report comes late, and says that its script had failed.
    first.phase, first.exited = "training", False
    world.run.storage.delete(world.run.attempt_path(1, "exit.json"))
    first.exit("script_failed", code=1, message="a bug")
    first.die("request")
    state = world.until_done().state
    ended = state.attempts[-1].ended
    assert ended is not None
    assert state.phase is Phase.FAILED
    assert ended.cause == "handed_over"
    assert (ended.step or 0) % world.checkpoint_every != 0
    assert ended.step == ended.checkpoint_step
