"""An instance that boots when its attempt is over leaves before it fetches anything."""

from __future__ import annotations

from datetime import datetime, timezone

import msgspec
import pytest

from spotfirst import events as e
from spotfirst.agent.fitness import UNFIT
from spotfirst.market import Market, Pool
from spotfirst.run import Run
from spotfirst.wire import encode
from tests.waiting import PATIENCE_S

from .conftest import Lab

POOL = Pool(instance_type="g6.xlarge", zone="us-east-1a")


def now() -> datetime:
    return datetime.now(timezone.utc)


def launching(attempt: int) -> e.Launching:
    return e.Launching(
        at=now(),
        attempt=attempt,
        token=f"token-{attempt}",
        market=Market.SPOT,
        pool=POOL,
        reason="",
    )


def journal(run: Run, *events: e.Event) -> Run:
    writer = run.journal()
    for event in (e.Created(at=now()), *events):
        writer.append(event)
    return run


@pytest.mark.parametrize(
    "event",
    [
        e.NotLaunched(at=now(), attempt=1, cause="withdrawn", message=""),
        e.Ended(at=now(), attempt=1, cause="lost", ended_at=now()),
        e.Stopped(at=now(), reason="by hand"),
        e.Failed(at=now(), message="over the budget"),
    ],
    ids=lambda event: type(event).__name__,
)
def test_an_agent_whose_attempt_is_over_leaves_no_trace(lab: Lab, event: e.Event) -> None:
    run = journal(lab.shell("echo trained"), launching(1), event)
    assert lab.start(run).process.wait(PATIENCE_S) == 0
    assert "not wanted any more" in lab.output()
    assert run.storage.list("attempts/1") == []


def test_another_attempt_that_ended_changes_nothing(lab: Lab) -> None:
    ended = e.Ended(at=now(), attempt=1, cause="lost", ended_at=now())
    run = journal(lab.shell("echo trained"), launching(1), ended, launching(2))
    assert lab.start(run, attempt=2).exit().cause == "completed"


def test_a_journal_of_a_newer_release_does_not_end_what_it_launched(lab: Lab) -> None:
    run = lab.shell("echo trained")
    run.control.create("journal/00000001.json", b'{"v": 99, "kind": "created"}')
    assert lab.start(run).exit().cause == "completed"


def test_an_instance_runs_the_spec_that_it_was_launched_for(lab: Lab) -> None:
    run = lab.shell('echo "digest $SPOTFIRST_SPEC_SHA256"')
    digest = run.spec_and_digest()[1]
    instance = lab.start(run, SPOTFIRST_SPEC_SHA256=digest)
    assert instance.exit().cause == "completed"
    assert f"digest {digest}" in instance.log()


@pytest.mark.parametrize("how", ["amended", "forged"])
def test_an_instance_runs_no_other_spec(lab: Lab, how: str) -> None:
    """It has no key to see who wrote it: what it was launched for is all that it goes by."""
    run = lab.shell("echo trained")
    digest = run.spec_and_digest()[1]
    other = msgspec.structs.replace(run.spec(), command=("sh", "-c", "echo something else"))
    if how == "amended":
        run.amend(other)
    else:
        run.control.write("amendments/00000001.json", encode(other))
    instance = lab.start(run, SPOTFIRST_SPEC_SHA256=digest)
    assert instance.process.wait(60) == UNFIT
    assert f"launched for {digest}" in lab.output()
    assert run.storage.list("attempts/1") == []
