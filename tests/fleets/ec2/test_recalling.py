"""What a process does about instances that others launched, and that EC2 does not list."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from spotfirst.state import Phase
from spotfirst_airflow.costs import bill
from tests.fakes.agent import Work
from tests.fakes.cloud import CloudInstance, Weather
from tests.fakes.faults import Rates
from tests.fakes.world import Process, World


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    world = World(
        request.node.name, policy="spot_only", work=Work(total_steps=200),
        weather=Weather(down_s=0, untag_s=30, rebalance_share=0),
    )  # fmt: skip
    yield world
    world.close()


def tick_until(world: World, condition: Callable[[], bool], limit_s: int = 4000) -> None:
    while not condition():
        assert world.clock.since_start_s < limit_s, world.news
        world.tick()


def trained_for_a_while(world: World) -> CloudInstance:
    tick_until(world, lambda: bool(world.cloud.instances) and world.clock.since_start_s > 200)
    (instance,) = world.cloud.instances.values()
    return instance


def replace_controller(world: World) -> None:
    """The only process dies, and another begins, which knows nothing."""
    world.processes = [Process(world, "another", Rates())]


def test_an_answer_that_lacks_a_running_instance_does_not_end_its_attempt(world: World) -> None:
    trained_for_a_while(world)
    replace_controller(world)
    world.cloud.weather.flicker_share = 1.0
    for _ in range(200):
        world.tick()
    assert world.state.attempts[0].is_open
    assert len(world.cloud.instances) == 1, "nothing was launched in its place"
    world.cloud.weather.flicker_share = 0.0
    tick_until(world, world.is_over)
    assert world.state.phase is Phase.SUCCEEDED
    assert len(world.state.attempts) == 1


def test_an_end_is_told_as_it_was_though_the_instance_has_lost_its_tags(world: World) -> None:
    instance = trained_for_a_while(world)
    world.processes = []
    instance.interrupt()
    for _ in range(600):
        world.tick()
    replace_controller(world)
    tick_until(world, lambda: world.state.attempts[0].ended is not None)
    ended = world.state.attempts[0].ended
    assert ended is not None
    assert ended.by_fleet
    assert ended.ended_at == instance.ends_at
    assert bill(world.state, now=world.now).charges[0].cost_usd == instance.cost_usd() == 0


def test_an_instance_that_ec2_has_forgotten_ended_when_its_agent_said_so(world: World) -> None:
    instance = trained_for_a_while(world)
    world.processes = []
    for _ in range(5 * 3600):
        world.tick()
    assert instance.ended_by == "itself"
    replace_controller(world)
    tick_until(world, world.is_over, limit_s=8 * 3600)
    (charge,) = bill(world.state, now=world.now).charges
    assert instance.ends_at is not None
    assert abs((charge.end - instance.ends_at).total_seconds()) < 30


def test_a_launch_that_comes_true_after_it_was_given_up_is_ended_and_billed(world: World) -> None:
    slow = world.processes[0].faults
    slow.hold_once, slow._hold_up = "CreateFleet", lambda: [world.tick() for _ in range(60)]
    world.processes.append(Process(world, "second", Rates()))
    world.processes[1].due_at = world.now.replace(minute=1)
    world.stop_at = world.now
    world.processes[0].turn()
    tick_until(world, world.is_over)
    for _ in range(60):
        world.tick()
    (instance,) = world.cloud.instances.values()
    (attempt,) = world.state.attempts
    assert attempt.not_launched is not None
    assert attempt.ended is not None
    assert instance.used_s() < 30
    assert bill(world.state, now=world.now).total_usd == instance.cost_usd() > 0
