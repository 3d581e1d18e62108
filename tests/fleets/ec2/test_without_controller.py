"""Deadline and budget hold when every controller and the reaper are gone, on a stepped clock."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst.errors import StorageDenied
from spotfirst.run import Run
from spotfirst.storage import Storage
from spotfirst_airflow.costs import bill
from tests.fakes.agent import Work
from tests.fakes.clock import START
from tests.fakes.cloud import Weather
from tests.fakes.world import World

CALM = Weather(up_s=1e9, down_s=1, life_s=0, silent_share=0, short_share=0, rebalance_share=0)
WORK = Work(total_steps=100_000, step_s=5.0, checkpoint_s=6.0)
END_S = 5.0 + 2 * 6.0 + 5.0 + 20.0
"""A step, a checkpoint that takes twice as long as others, and the shutdown."""


class ReadOnly:
    """A storage that takes nothing from a moment on."""

    def __init__(self, inner: Storage, world: World, since: datetime) -> None:
        self._inner, self._world, self._since = inner, world, since
        self.url, self.keys = inner.url, inner.keys

    def child(self, path: str) -> ReadOnly:
        return ReadOnly(self._inner.child(path), self._world, self._since)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)
        if name not in {"create", "write", "write_from", "delete", "delete_many", "upload"}:
            return call

        def refuse(*arguments: Any) -> Any:
            if self._world.now >= self._since:
                msg = f"may not {name}: read-only file system"
                raise StorageDenied(msg)
            return call(*arguments)

        return refuse


def running(world: World) -> Iterator[Any]:
    return (i for i in world.cloud.instances.values() if i.is_running)


def until_trains(world: World) -> None:
    for _ in range(3600):
        if any(agent.phase == "training" for agent in world.agents.values()):
            return
        world.tick()
    raise AssertionError("nothing trains:\n" + "\n".join(world.news))


def until_alone(world: World) -> None:
    """Tick until no instance is left; nobody but the instances is there."""
    for _ in range(4 * 3600):
        if not any(running(world)):
            return
        world.tick()
    raise AssertionError("an instance is left")


def make(name: str, *, deadline_s: float | None = None, **options: Any) -> World:
    deadline = START + timedelta(seconds=deadline_s) if deadline_s else None
    defaults = {"weather": CALM, "work": WORK, "policy": "spotfirst", "deadline": deadline}
    return World(name, **{**defaults, **options})


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    alone_after_s=st.integers(0, 900),
    budget=st.none() | st.decimals("0.05", "0.50", places=2),
    deadline_s=st.integers(900, 2400),
    read_only=st.booleans(),
    loses_s=st.none() | st.integers(100, 600),
)
def test_without_any_controller_nothing_passes_the_limits_by_more_than_a_checkpoint_and_a_shutdown(
    *, seed: int, alone_after_s: int, budget: Decimal | None, deadline_s: int, read_only: bool,
    loses_s: int | None,
) -> None:  # fmt: skip
    weather = CALM
    if loses_s is not None:  # changes of instance, some under way when the controllers go
        weather = Weather(life_s=loses_s, silent_share=0, short_share=0, rebalance_share=0)
    world = make(f"alone/{seed}", deadline_s=deadline_s, budget_usd=budget, weather=weather)
    deadline = world.spec.deadline
    assert deadline is not None
    try:
        until_trains(world)
        for _ in range(alone_after_s):
            world.tick()
        world.outage = (world.now, world.now + timedelta(days=30))
        if read_only:
            for agent in world.agents.values():
                agent.see_through(ReadOnly(world.storage, world, world.now))  # type: ignore[arg-type]
        until_alone(world)
        assert world.now <= max(deadline, world.outage[0]) + timedelta(seconds=30 + END_S)
        if budget is not None:
            spent = sum((c.cost_usd for c in true_charges(world)), Decimal(0))
            dearest = max(c.price_usd_h for c in true_charges(world))
            assert spent <= budget + 2 * dearest * Decimal(END_S) / 3600
    finally:
        world.close()


def true_charges(world: World) -> Any:
    """What was paid, by when each instance really went."""
    from spotfirst import events as e

    state = world.state
    by_token = {i.tags["spotfirst:token"]: i for i in world.cloud.instances.values()}
    for attempt in state.attempts:
        instance = by_token.get(attempt.token)
        if attempt.launched and attempt.ended is None and instance is not None:
            gone_at = instance.ends_at or world.now
            state = state.apply(
                e.Ended(at=gone_at, attempt=attempt.number, cause="lost", ended_at=gone_at)
            )
    return bill(state, now=world.now).charges


@pytest.mark.parametrize("limit", ["deadline", "budget"])
def test_it_ends_with_a_checkpoint_of_its_last_step(limit: str) -> None:
    limits = {"deadline_s": 900.0} if limit == "deadline" else {"budget_usd": Decimal("0.20")}
    world = make(f"last-step/{limit}", **limits)
    try:
        until_trains(world)
        world.outage = (world.now, world.now + timedelta(days=30))
        until_alone(world)
        report = Run(world.storage, "run").exit_report(1)
        assert report is not None
        assert report.cause == "handed_over"
        assert limit in report.message
        assert report.progress.checkpoint_step == report.progress.step
        spent = bill(world.state, now=report.at).total_usd
        if limit == "budget":
            assert Decimal("0.19") < spent <= Decimal("0.20")
        # A controller that comes back concludes it, and launches nothing.
        world.outage = None
        for _ in range(3600):
            if world.is_over():
                break
            world.tick()
        assert world.state.phase == "stopped"
        assert len(world.state.attempts) == 1
    finally:
        world.close()


def test_the_reaper_ends_what_hangs_past_its_deadline() -> None:
    world = make("hangs", deadline_s=900.0)
    try:
        until_trains(world)
        [agent] = [a for a in world.agents.values() if a.phase == "training"]
        agent.tick = lambda: None  # type: ignore[method-assign] # the machine is stuck, its guard too
        for process in world.processes:
            process.turn = lambda: None  # type: ignore[method-assign]
        for _ in range(900 + 600):
            world.tick()
        assert not any(running(world))
        assert world.reaped == 1
    finally:
        world.close()
