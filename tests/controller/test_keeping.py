"""``on_failure="keep"``: people get the instance of a script that failed, with its price on it."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from msgspec.structs import replace

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable, LaunchRejected
from spotfirst.heartbeat import ExitReport
from spotfirst.state import Phase, RunState
from spotfirst_airflow.costs import bill, promised_usd
from spotfirst_airflow.fleets import Instance
from spotfirst_airflow.fleets.base import KEEP_TAG, RUN_TAG, STORAGE_TAG
from spotfirst_airflow.keeping import Keeps, still_kept
from spotfirst_airflow.reaping import judge
from spotfirst_airflow.submission import request_stop
from tests.controller.world import SPOT_USD_H, START, FakeFleet, Faults, World

HOURS = 4


class KeepingFleet(FakeFleet):
    """A fleet whose instances stay up until they are terminated."""

    keep_s = HOURS * 3600.0
    error: Exception | None = None

    def __init__(self, world: KeepingWorld) -> None:
        super().__init__(world)
        self._kept = world.kept

    def keep(self, token: str, *, until: datetime) -> str:
        if self.error is not None:
            raise self.error

        def apply() -> str:
            self._kept[token] = until
            return f"aws ssm start-session --target {self._instance(token).instance_id}"

        return str(self._world.faults.around(apply, FleetUnavailable))

    def owned(self) -> list[Instance]:
        return [replace(instance, tags=self._tags(instance.token)) for instance in super().owned()]

    def _tags(self, token: str) -> dict[str, str]:
        tags = {RUN_TAG: "run", STORAGE_TAG: self._world.storage.url}
        if token in self._kept:
            tags[KEEP_TAG] = self._kept[token].isoformat()
        return tags


class KeepingWorld(World):
    def __init__(self, fleet: type[KeepingFleet] = KeepingFleet, **spec: Any) -> None:
        self.kept: dict[str, datetime] = {}
        self._fleet = fleet
        super().__init__(**spec)
        self.powers_off = False

    def new_fleet(self) -> FakeFleet:
        return self._fleet(self)


def fails(world: World, *, attempts: int = 1) -> RunState:
    """Run until it has failed with a script that crashes each time."""
    for _ in range(600):
        for machine in world.alive()[-attempts:]:
            machine.crash = 3
        step = world.reconcile()
        if step and step.done:
            return step.state
        world.tick()
    raise AssertionError("\n".join(world.news))


def test_the_run_fails_at_once_and_its_instance_stays() -> None:
    world = KeepingWorld()
    state = fails(world)
    assert world.now < START + timedelta(minutes=1)
    assert state.phase is Phase.FAILED
    [machine] = world.alive()
    [ended] = [a.ended for a in state.attempts]
    assert ended is not None
    assert ended.cause == "script_failed"
    assert ended.kept_until == world.kept[machine.request.token]
    assert ended.kept_until == ended.ended_at + timedelta(hours=HOURS)


def test_people_are_told_how_to_get_in_and_what_it_costs_at_most() -> None:
    state = fails(KeepingWorld())
    [warned] = state.warnings
    assert "instance i-1 is kept until 2026-01-01 04:00 UTC at $0.3000/h: $1.20 at most" in warned
    assert "`aws ssm start-session --target i-1`" in warned
    assert "sudo poweroff" in warned


def test_the_bill_counts_the_hours_as_they_pass_and_no_longer() -> None:
    world = KeepingWorld()
    state = fails(world)
    at_end = bill(state, now=world.now).total_usd
    later = bill(state, now=world.now + timedelta(hours=1))
    assert later.total_usd - at_end == SPOT_USD_H
    assert "kept for debugging until" in later.charges[0].rule
    assert later.charges[0].is_estimate
    never = bill(state, now=world.now + timedelta(days=9)).total_usd
    assert never == bill(state, now=world.kept[state.attempts[0].token]).total_usd
    assert promised_usd(state, now=world.now) == never - at_end


def test_the_failure_names_it_for_as_long_as_it_is_kept() -> None:
    world = KeepingWorld()
    state = fails(world)
    assert still_kept(state, now=world.now).startswith(
        "Its instance i-1 is kept until 2026-01-01 0"
    )
    assert still_kept(state, now=world.now + timedelta(hours=HOURS)) == ""


def test_a_reaper_spares_it_until_then_and_not_longer() -> None:
    world = KeepingWorld()
    fails(world)
    owned = KeepingFleet(world).owned()
    until = next(iter(world.kept.values()))
    standing = [
        judge(owned, world.storage, now=now, grace_s=60)[0].standing
        for now in (until - timedelta(seconds=1), until)
    ]
    assert standing == ["kept", "orphan"]


def test_only_the_instance_is_kept_with_which_the_run_fails() -> None:
    world = KeepingWorld(script_retries=1)
    state = fails(world)
    assert len(state.attempts) == 2
    assert [m.request.attempt for m in world.alive()] == [2]
    assert set(world.kept) == {state.attempts[1].token}


def test_a_reopened_run_trains_on_a_new_instance() -> None:
    world = KeepingWorld()
    fails(world)
    world.run.journal().decide(lambda state: e.Reopened(at=world.now, owner="me"))
    state = world.until_done().state
    assert state.phase is Phase.SUCCEEDED
    assert [m.request.attempt for m in world.alive()] == [1], "the kept one is still theirs"


@pytest.mark.parametrize("end", ["completes", "is stopped", "does not keep"])
def test_nothing_is_kept_of_a_run_that(end: str) -> None:
    class Plain(KeepingFleet):
        keep_s = 0.0

    world = KeepingWorld(Plain if end == "does not keep" else KeepingFleet)
    if end == "does not keep":
        fails(world)
    elif end == "is stopped":
        while not any(m.phase == "training" for m in world.alive()):
            world.reconcile()
            world.tick()
        request_stop(world.run, reason="enough", clock=world.clock)
        world.trainer().exit("script_failed", 1)
        world.until_done()
    else:
        world.until_done()
    assert world.alive() == []
    assert world.kept == {}


def test_what_the_budget_does_not_cover_to_the_end_is_not_kept_at_all() -> None:
    world = KeepingWorld(budget_usd=Decimal("1.25"))
    state = fails(world)
    assert len(world.alive()) == 1
    assert bill(state, now=world.now + timedelta(days=1)).total_usd <= Decimal("1.25")
    world = KeepingWorld(budget_usd=Decimal("1.20"))
    [warned] = fails(world).warnings
    assert "was not kept: that would cost $1.20, and the budget leaves $1.20" in warned
    assert world.alive() == []


def test_an_instance_that_is_taken_back_anyway_is_left_to_the_fleet() -> None:
    world = KeepingWorld()
    while not any(m.phase == "training" for m in world.alive()):
        world.reconcile()
        world.tick()
    machine = world.trainer()
    world.interrupt(machine)
    machine.exit("script_failed", 1)
    state = fails(world)
    assert state.phase is Phase.FAILED
    assert state.attempts[0].token not in world.kept
    assert machine.ended_at is not None


def test_while_it_is_kept_its_price_counts_against_the_budget_of_what_goes_on() -> None:
    world = KeepingWorld(budget_usd=Decimal("1.30"))
    fails(world)
    world.run.journal().decide(lambda state: e.Reopened(at=world.now, owner="me"))
    world.total_steps = 3000
    state = world.until_done().state
    assert state.stop is not None
    assert state.stop.cause == "budget"
    assert (
        Decimal("1.25") < bill(state, now=world.now + timedelta(days=1)).total_usd < Decimal("1.30")
    )


def test_what_must_not_be_marked_is_ended_and_people_are_told() -> None:
    class Forbidden(KeepingFleet):
        error = LaunchRejected("ec2:CreateTags is not allowed")

    world = KeepingWorld(Forbidden)
    [warned] = fails(world).warnings
    assert "could not keep its instance: ec2:CreateTags is not allowed" in warned
    assert world.alive() == []


def test_a_fleet_without_such_instances_is_none_that_keeps() -> None:
    world = World()
    assert not isinstance(world.new_fleet(), Keeps)
    assert fails(world).phase is Phase.FAILED
    assert world.alive() == []


@pytest.mark.parametrize("seed", range(40))
def test_whatever_fails_and_dies_it_is_marked_told_once_and_ended_in_the_journal(seed: int) -> None:
    world = KeepingWorld(faults=Faults(seed, lost=0.15, refused=0.15, died=0.15))
    world.controllers.append(world.new_controller())
    for _ in range(600):
        steps = [world.reconcile(index) for index in range(2)]
        if any(step and step.done for step in steps):
            break
        for machine in world.alive():
            machine.crash = 3
        world.tick()
    state = world.run.journal().refresh()
    assert state.phase is Phase.FAILED
    ended = state.attempts[-1].ended
    assert ended is not None
    assert {m.request.token: ended.kept_until for m in world.alive()} == world.kept
    assert len([w for w in state.warnings if "kept until" in w]) == 1


@pytest.mark.parametrize(
    "claimed", [START - timedelta(days=1), START + timedelta(days=9000)], ids=["before", "in years"]
)
def test_no_clock_of_an_instance_decides_how_long_it_is_kept(claimed: datetime) -> None:
    world = KeepingWorld()
    world.reconcile()
    [machine] = world.machines.values()
    for _ in range(20):
        world.tick()
        world.reconcile()
    report = ExitReport(attempt=1, at=claimed, cause="script_failed", exit_code=1)
    world.run.report_exit(report)
    machine.exited, machine.phase = True, "exited"
    machine._beat()
    for _ in range(3):
        world.reconcile()
    ended = world.run.journal().refresh().attempt(1).ended
    assert ended is not None
    assert machine.started_at <= ended.ended_at <= world.now
    for until in world.kept.values():
        assert until <= world.now + timedelta(hours=HOURS)
