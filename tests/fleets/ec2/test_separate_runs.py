"""Whole runs whose instances reach the storage by their run's access point only, as it decides."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst.errors import StorageDenied
from spotfirst.state import Phase
from spotfirst_airflow import controller
from tests.fakes.agent import SimulatedAgent, Work
from tests.fakes.cloud import CloudInstance, Weather
from tests.fakes.faults import Faults, FaultyStorage, Rates
from tests.fakes.world import Process, World
from tests.fleets.ec2.apart import URL, Guarded, admitted, stack_of, way_of

CALM = Weather(down_s=0, rebalance_share=0)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


class Apart(World):
    """A world in which an instance sees the storage by what it was started with."""

    def __init__(self, seed: object, **more: Any) -> None:
        super().__init__(seed, url=URL, options=stack_of("us-east-1"), **more)

    def _agent(self, instance: CloudInstance) -> SimulatedAgent:
        agent = self.agents.get(instance.instance_id)
        if agent is None:
            faults = Faults(f"{self.seed}/{instance.instance_id}", self.agent_rates)
            self.agent_faults.append(faults)
            agent = SimulatedAgent(instance, self.storage, self.work)
            guarded: Any = Guarded(self.storage, instance, self.cloud)
            view: Any = FaultyStorage(guarded, faults)
            agent.see_through(view)
            self.agents[instance.instance_id] = agent
        return agent


def play(world: World, until: Callable[[], bool] | None = None, limit_s: int = 4 * 3600) -> None:
    """Time passes; what lies heavy on the run for hours is over then."""
    condition = until or world.is_over
    while not condition():
        assert world.clock.since_start_s < limit_s, (world.state, world.news[-20:])
        world.tick()
        if world.clock.since_start_s > limit_s / 2:
            world.disarm()
            world.come_back()


def test_a_run_trains_and_leaves_no_access_point() -> None:
    world = Apart("calm", policy="spot_only", weather=CALM)
    try:
        play(
            world,
            lambda: (
                world.state.checkpoint_step is not None or bool(world.run.chain().refresh().commits)
            ),
        )
        [point] = world.cloud.access_points.values()
        assert admitted(world.cloud, point["Alias"]) == set(world.cloud.instances)
        play(world)
        assert world.state.phase is Phase.SUCCEEDED
        assert world.cloud.access_points == {}
    finally:
        world.close()


def test_an_instance_that_is_not_let_in_does_nothing_and_waits() -> None:
    world = Apart("late", policy="spot_only", weather=CALM)
    try:
        play(world, lambda: bool(world.cloud.instances))
        world.processes = []  # it dies before the list is put
        for _ in range(200):
            world.tick()
        [agent] = world.agents.values()
        assert agent.phase == "booting"
        assert not world.run.storage.list("attempts")
        world.processes = [Process(world, "another", Rates())]
        play(world)
        assert world.state.phase is Phase.SUCCEEDED
        assert len(world.cloud.instances) == 1
    finally:
        world.close()


def test_during_a_change_of_instance_both_are_let_in_and_then_one() -> None:
    world = Apart("change", policy="spot_only", weather=CALM, work=Work(total_steps=200))
    try:
        play(world, lambda: world.clock.since_start_s > 300)
        [old] = world.cloud.instances.values()
        old.interrupt()
        play(world, lambda: len(world.cloud.instances) == 2)
        for _ in range(10):
            world.tick()
        [point] = world.cloud.access_points.values()
        assert admitted(world.cloud, point["Alias"]) == set(world.cloud.instances)
        assert len({way_of(each) for each in world.cloud.instances.values()}) == 1
        play(world, lambda: world.state.attempts[0].ended is not None)
        for _ in range(10):
            world.tick()
        assert admitted(world.cloud, point["Alias"]) == set(world.cloud.instances) - {
            old.instance_id
        }
        play(world)
        assert world.state.phase is Phase.SUCCEEDED
        assert [a.ended.cause for a in world.state.attempts if a.ended] == [
            "interrupted",
            "completed",
        ]
    finally:
        world.close()


def test_the_reaper_removes_what_a_controller_that_was_killed_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller, "dismiss", lambda *_, **__: None)
    world = Apart("killed", policy="spot_only", weather=CALM)
    try:
        play(world)
        assert world.state.phase is Phase.SUCCEEDED
        play(world, lambda: not world.cloud.access_points)
    finally:
        world.close()


def test_a_run_fails_at_once_where_no_access_point_may_be_made() -> None:
    world = Apart("refused", policy="spot_only", weather=CALM)
    try:
        world.cloud.access_point_error = ("AccessDenied", "may not CreateAccessPoint")
        play(world)
        assert world.state.failure is not None
        assert "separate_runs" in world.state.failure.message
        assert world.cloud.instances == {}
    finally:
        world.close()


def test_a_permission_that_was_taken_away_is_a_warning_and_holds_up_nothing_else() -> None:
    world = Apart("denied", policy="spot_only", weather=CALM)
    try:
        play(world, lambda: bool(world.cloud.instances))
        world.cloud.access_point_policy_error = ("AccessDenied", "may not PutAccessPointPolicy")
        [instance] = world.cloud.instances.values()
        play(world, lambda: bool(world.agents))
        told = [w for w in world.state.warnings if w.startswith("its instances cannot use")]
        assert len(told) == 1
        assert "separate_runs" in told[0]
        instance.interrupt(notice_s=None)
        world.cloud.access_point_policy_error = None
        play(world)
        assert world.state.phase is Phase.SUCCEEDED
        assert [a.ended.cause for a in world.state.attempts if a.ended] == [
            "interrupted",
            "completed",
        ]
    finally:
        world.close()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_whatever_fails_dies_and_races_every_instance_is_let_in_and_nothing_is_left(
    seed: int,
) -> None:
    rates = Rates(refused=0.03, lost=0.03, died=0.03, held_up=0.03)
    world = Apart(
        f"rough/{seed}", policy="fallback", controllers=2, rates=rates, agent_rates=Rates(refused=0.02),
        weather=Weather(up_s=3600, down_s=60, life_s=900), work=Work(total_steps=100),
    )  # fmt: skip
    try:
        play(world)
        assert world.broken == []
        # Whatever the last of its instances says: they trained to the end.
        newest = world.run.chain().refresh().newest()
        assert newest is not None
        assert newest[1].step == world.work.total_steps
        world.disarm()
        play(world, lambda: not world.cloud.access_points)
    finally:
        world.close()


def test_what_guards_the_storage_in_these_tests_refuses_an_instance_of_another_run() -> None:
    world = Apart("other", policy="spot_only", weather=CALM)
    try:
        play(world, lambda: bool(world.cloud.instances) and world.clock.since_start_s > 200)
        [mine] = world.cloud.instances.values()
        other = world.cloud.launch(next(iter(world.cloud.pools)), spot=False)
        other.template = mine.template
        guarded: Any = Guarded(world.storage, other, world.cloud).child("runs/run")
        with pytest.raises(StorageDenied):
            guarded.read("attempts/1/heartbeat.json")
        with pytest.raises(StorageDenied):
            guarded.write("attempts/1/heartbeat.json", b"x")
        with pytest.raises(StorageDenied):
            guarded.list("checkpoints")
    finally:
        world.close()
