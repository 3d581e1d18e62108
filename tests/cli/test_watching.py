"""Watching a run from its files."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal

import msgspec
import pytest

from spotfirst import events as e
from spotfirst.heartbeat import Heartbeat, Progress
from spotfirst.market import Market, Pool
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from spotfirst_airflow.cli.watching import Watcher

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


def launched(number: int) -> list[e.Event]:
    pool = Pool(instance_type="g6.xlarge", zone="local-a")
    return [
        e.Launching(
            at=NOW, attempt=number, token=f"t{number}", market=Market.SPOT, pool=pool, reason=""
        ),
        e.Launched(
            at=NOW, attempt=number, instance_id="i", started_at=NOW, price_usd_h=Decimal(36),
            price_source="", price_at=NOW, on_demand_usd_h=Decimal(72),
        ),
    ]  # fmt: skip


def beat(number: int, phase: str, step: int | None = None) -> Heartbeat:
    told = {"attempt": number, "beat": 1, "at": NOW, "phase": phase}
    return msgspec.structs.replace(msgspec.convert(told, Heartbeat), progress=Progress(step=step))


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Run:
    storage = open_storage(f"memory://{request.node.name}")
    run = create_run(storage, RunSpec(run_id="r", created_at=NOW, command=("true",)))
    tell(run, e.Created(at=NOW), *launched(1))
    return run


def tell(run: Run, *events: e.Event) -> None:
    journal = run.journal()
    journal.refresh()
    for event in events:
        journal.append(event)


def test_each_piece_of_news_and_output_is_given_once(run: Run) -> None:
    run.storage.write(run.log_path(1, 1), b"step 1\nste")
    watcher = Watcher(run, clock=lambda: NOW)
    first = watcher.look()
    assert [news.event.__class__ for news in first.news] == [e.Launching, e.Launched]
    assert first.lines == ((1, "step 1"),)
    run.storage.write(run.log_path(1, 2), b"p 2\n")
    second = watcher.look()
    assert second.news == ()
    assert second.lines == ((1, "step 2"),)


def test_a_watcher_that_comes_back_leaves_out_what_was_there(run: Run) -> None:
    run.storage.write(run.log_path(1, 1), b"step 1\n")
    watcher = Watcher(run, from_now=True, clock=lambda: NOW)
    tell(run, e.Warned(at=NOW, message="look"))
    glance = watcher.look()
    assert [news.text for news in glance.news] == ["WARNING: look"]
    assert glance.lines == ()


def test_while_a_replacement_starts_the_beat_is_of_the_attempt_that_trains(run: Run) -> None:
    tell(run, *launched(2))
    run.beat(beat(1, "training", 7))
    run.beat(beat(2, "starting"))
    glance = Watcher(run, clock=lambda: NOW).look()
    assert glance.beat is not None
    assert glance.beat.attempt == 1
    assert glance.coming is not None
    assert glance.coming.attempt == 2
    assert glance.current is not None
    assert glance.current.number == 1


def test_the_cost_so_far_grows_with_the_clock(run: Run) -> None:
    glance = Watcher(run, clock=lambda: NOW + timedelta(seconds=100)).look()
    assert glance.cost_usd == Decimal("1.0000")


def test_a_reopened_run_is_shown_with_its_new_limits(run: Run) -> None:
    watcher = Watcher(run, clock=lambda: NOW)
    assert watcher.look().spec.budget_usd is None
    number = run.amend(msgspec.structs.replace(run.spec(), budget_usd=Decimal(5)))
    tell(run, e.Failed(at=NOW, message="x"), e.Reopened(at=NOW, owner="me", amendment=number))
    assert watcher.look().spec.budget_usd == 5
