"""A training script with all rights of its instance: what it reports is a claim.

It may ruin its own attempt. It decides nothing about money, and nothing about another run.
"""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import msgspec
import pytest

from spotfirst.heartbeat import ExitReport, Heartbeat, Progress, Timings
from spotfirst.market import Notice
from spotfirst.state import Phase
from spotfirst.wire import encode
from spotfirst_airflow.costs import bill
from tests.controller.world import START, World

LONG_AGO = START - timedelta(hours=5)
FAR = START + timedelta(days=300)


def _training(**spec: object) -> World:
    world = World(total_steps=5000, **spec)  # type: ignore[arg-type]
    for _ in range(20):
        world.reconcile()
        world.tick()
    return world


def _report(world: World, **fields: object) -> None:
    report = ExitReport(attempt=1, at=world.now, cause="lost")
    data = encode(msgspec.structs.replace(report, **fields))
    world.run.storage.write("attempts/1/exit.json", data)


_CLAIMS = {
    "its end before its beginning": {"at": LONG_AGO, "cause": "script_failed"},
    "its end in the future": {"at": FAR, "cause": "script_failed"},
    "an interruption": {"cause": "interrupted", "at": LONG_AGO},
    "no bytes": {"cause": "script_failed", "moved_bytes": 0},
    "times from another century": {
        "cause": "script_failed",
        "progress": Progress(timings=Timings(booted=LONG_AGO, first_step=LONG_AGO, last_step=FAR)),
    },
}


@pytest.mark.parametrize("claim", _CLAIMS.values(), ids=_CLAIMS.keys())
@pytest.mark.parametrize("forgotten", [False, True], ids=["seen by the fleet", "forgotten by it"])
def test_no_claim_makes_an_attempt_cheaper(claim: dict[str, object], forgotten: bool) -> None:
    """What is billed is what the fleet says; where it has forgotten, never less than nothing."""
    world = _training()
    [machine] = world.machines.values()
    _report(world, **claim)
    machine.die("itself")
    if forgotten:
        world.tick(120)
        del world.machines[machine.request.token]
    for _ in range(3):
        world.reconcile()
    state = world.run.journal().refresh()
    ended = state.attempt(1).ended
    assert ended is not None
    launched = state.attempt(1).launched
    assert launched is not None
    assert launched.started_at <= ended.ended_at <= world.now
    charge = next(c for c in bill(state, now=world.now).charges if c.attempt == 1)
    assert charge.cost_usd >= 0
    if not forgotten:
        assert ended.ended_at == machine.ended_at
        assert not ended.by_fleet


def test_a_notice_that_only_the_script_knows_of_ends_within_minutes() -> None:
    """An attempt with a notice is left to the fleet while that is free: not for as long as it says."""
    world = _training()
    [machine] = world.machines.values()
    machine.mute = True
    notice = Notice(kind="interruption", seen_at=world.now, time=FAR)
    beat = Heartbeat(attempt=1, beat=10**6, at=world.now, phase="training", notice=notice)
    world.run.beat(beat)
    world.reconcile()
    known = world.run.journal().refresh().attempt(1).notice
    assert known is not None
    assert known.time is not None
    assert known.time <= world.now + timedelta(minutes=15)


def test_a_script_that_never_ends_is_ended_by_the_budget() -> None:
    world = _training(budget_usd=Decimal("0.02"))
    for machine in world.machines.values():
        machine.mute = True
    for attempt in range(1, 40):
        beat = Heartbeat(attempt=attempt, beat=10**9, at=world.now, phase="training",
                         progress=Progress(step=1, total_steps=10**9))  # fmt: skip
        world.run.beat(beat)
    step = world.until_done(limit_s=6000)
    assert step.state.phase is Phase.STOPPED
    assert bill(step.state, now=world.now).total_usd <= Decimal("0.02")


def test_what_it_says_of_other_attempts_launches_and_ends_nothing() -> None:
    """Files of attempts that were never launched, and of ones that are to come."""
    world = _training()
    for attempt in (0, 2, 3, 999):
        world.run.storage.write(
            f"attempts/{attempt}/exit.json",
            encode(ExitReport(attempt=attempt, at=world.now, cause="completed")),
        )
    for _ in range(5):
        world.reconcile()
        world.tick()
    assert [m.request.attempt for m in world.alive()] == [1]
    assert world.run.journal().refresh().phase is Phase.ACTIVE


@pytest.mark.parametrize("step", [1, 19, 5000, 10**9])
def test_a_success_without_its_last_checkpoint_is_none(step: int) -> None:
    """Whoever reports one is tried again elsewhere, like any attempt that was lost."""
    world = _training()
    world.run.storage.delete("checkpoints/00000002.json")
    [machine] = world.machines.values()
    machine.mute = True
    _report(world, cause="completed", progress=Progress(step=step, checkpoint_step=step))
    machine.die("itself")
    world.reconcile()
    state = world.run.journal().refresh()
    assert state.phase is Phase.ACTIVE
    ended = state.attempt(1).ended
    assert ended is not None
    assert ended.cause == "lost"
    assert f"reported success after step {step}, and" in ended.message
