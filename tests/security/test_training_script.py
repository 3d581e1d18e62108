"""A training script with all rights of its instance: what it reports is a claim.

It may ruin its own attempt. It decides nothing about money, and nothing about another run.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from spotfirst import sequence
from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst.errors import CorruptObject
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


def test_a_success_that_says_nothing_of_steps_does_not_end_a_run_that_has_some() -> None:
    """A report that somebody else wrote, or a script that failed before its loop and exits with 0."""
    world = _training()
    [machine] = world.machines.values()
    machine.mute = True
    _report(world, cause="completed")
    machine.die("itself")
    world.reconcile()
    state = world.run.journal().refresh()
    assert state.phase is Phase.ACTIVE
    ended = state.attempt(1).ended
    assert ended is not None
    assert ended.cause == "lost"
    assert "without a step, and the run is at step 10 of 5000" in ended.message


@pytest.mark.parametrize("total", ["its own", 5000])
def test_steps_of_earlier_attempts_count_where_the_newest_tells_none(total: Any) -> None:
    """It is believed only where the checkpoints are those of a run that is done."""
    world = _training()
    [first] = world.machines.values()
    while first.progress.checkpoint_step != first.progress.step:
        world.tick()
    first._tell(total_steps=first.progress.step if total == "its own" else total)
    first._beat()
    first.die("fleet")
    for _ in range(20):
        world.tick()
        world.reconcile()
    second = next(m for m in world.machines.values() if m.request.attempt == 2)
    second.mute = True
    second.exited = True
    beat = Heartbeat(attempt=2, beat=10**6, at=world.now, phase="starting")
    world.run.beat(beat)
    report = ExitReport(attempt=2, at=world.now, cause="completed")
    world.run.storage.write("attempts/2/exit.json", encode(report))
    second.die("itself")
    for _ in range(3):
        world.reconcile()
    ended = world.run.journal().refresh().attempt(2).ended
    assert ended is not None
    assert ended.cause == ("completed" if total == "its own" else "lost")


@pytest.mark.parametrize("claimed", [None, 10**9])
def test_a_script_that_never_tells_steps_may_succeed(claimed: int | None) -> None:
    world = World(total_steps=5000)
    world.reconcile()
    [machine] = world.machines.values()
    machine.mute = True
    machine.exited = True
    _report(world, cause="completed", progress=Progress(checkpoint_step=claimed))
    machine.die("itself")
    for _ in range(3):
        world.reconcile()
    assert world.run.journal().refresh().phase is Phase.SUCCEEDED


def test_a_chain_without_end_is_refused_before_it_fills_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = _training()
    chain = world.run.chain().refresh()
    chain.claim(1)
    monkeypatch.setattr(sequence, "MOST_BYTES", 10_000)
    for step in range(100):
        chain.commit(1, step=step, manifest="m", digest="d" * 500, content="state")
    with pytest.raises(CorruptObject, match="more than 10000 bytes"):
        world.run.chain().refresh()
    with pytest.raises(CorruptObject, match="more than 10000 bytes"):
        world.run.chain().refresh()


def test_entries_are_read_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be as large as a reader takes: never all of them at once."""
    world = _training()
    storage = world.run.storage
    for number in range(1, 301):
        storage.write(f"entries/{number:08d}.json", b"x%d" % number)
    sizes: list[int] = []
    read_many = storage.read_many

    def counted(paths: Iterable[str], **limits: Any) -> dict[str, bytes]:
        wanted = list(paths)
        sizes.append(len(wanted))
        return read_many(wanted, **limits)

    monkeypatch.setattr(storage, "read_many", counted)
    found = sequence.Sequence(storage, "entries").read_new()
    assert [data for _, data in found] == [b"x%d" % n for n in range(1, 301)]
    assert max(sizes) <= 64
    assert sum(sizes) == 300


@pytest.mark.parametrize("other", [0, 2, 999, 10**6])
def test_a_report_in_the_name_of_another_attempt_counts_as_none(other: int) -> None:
    """Who looks that attempt up would find nothing, or the wrong one."""
    world = _training()
    [machine] = world.machines.values()
    machine.mute = True
    beat = Heartbeat(attempt=other, beat=10**6, at=world.now, phase="training")
    world.run.storage.write("attempts/1/heartbeat.json", encode(beat))
    report = ExitReport(attempt=other, at=world.now, cause="completed")
    world.run.storage.write("attempts/1/exit.json", encode(report))
    step = world.reconcile()
    assert step is not None
    assert step.heartbeat is None
    assert world.run.exit_report(1) is None
    warnings = world.run.journal().refresh().warnings
    assert any(f"calls itself that of attempt {other}" in text for text in warnings)


def test_a_claim_by_an_attempt_that_is_not_there_ends_the_run_after_three_launches() -> None:
    """Every attempt gives way to it. Without an end, each would cost its start-up."""
    world = _training()
    chain = CheckpointChain(world.run.storage)
    chain.claim(10**6)
    chain.release(10**6)
    state = world.until_done(limit_s=3000).state
    assert state.phase is Phase.FAILED
    assert len(world.machines) <= 4
    assert state.failure is not None
    assert "attempt 1000000 has claimed" in state.failure.message
