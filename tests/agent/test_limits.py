"""Deadline and budget without a controller: what the agent knows, and what it does."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.agent.limits import Purse, forecast
from spotfirst.agent.stopping import Watch
from spotfirst.checkpoints.mirroring import mirror
from spotfirst.heartbeat import ExitReport, Heartbeat, Progress
from spotfirst.market import Market, Notice, Pool
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.state import fold
from spotfirst.storage import open_storage
from tests.waiting import wait_until

from .conftest import Lab

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
POOL = Pool(instance_type="gpu", zone="zone-a")
_names = itertools.count()


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def launching(number: int, when: datetime, usd_h: str | None = "3.60", **changes: Any) -> e.Event:
    event = e.Launching(
        at=when, attempt=number, token=f"t-{number}", market=Market.ON_DEMAND, pool=POOL,
        reason="", price_usd_h=None if usd_h is None else Decimal(usd_h),
    )  # fmt: skip
    return msgspec.structs.replace(event, **changes)


def launched(number: int, when: datetime, usd_h: str = "3.60", **changes: Any) -> e.Event:
    event = e.Launched(
        at=when, attempt=number, instance_id=f"i-{number}", started_at=when,
        price_usd_h=Decimal(usd_h), price_source="test", price_at=when,
        on_demand_usd_h=Decimal("7.20"),
    )  # fmt: skip
    return msgspec.structs.replace(event, **changes)


def begun(number: int, seconds: float) -> list[e.Event]:
    return [launching(number, at(seconds)), launched(number, at(seconds))]


# -- what it knows ------------------------------------------------------------------------------


def test_the_money_is_spent_when_all_attempts_together_have_cost_it() -> None:
    ended = e.Ended(at=at(100), attempt=1, cause="handed_over", ended_at=at(100))
    state = fold([*begun(1, 0), ended, *begun(2, 100)])
    found = forecast(state, 2, now=at(150))
    assert found.spent_usd == Decimal("0.15")
    assert found.reaches_at(Decimal("0.20")) == at(200)
    assert found.reaches_at(Decimal("0.15")) == at(150)


def test_during_a_change_of_instance_two_are_paid() -> None:
    state = fold([*begun(1, 0), *begun(2, 100)])
    for number in (1, 2):
        found = forecast(state, number, now=at(150))
        assert found.spent_usd == Decimal("0.20")
        assert found.reaches_at(Decimal("0.30")) == at(200)


def test_one_that_left_its_report_is_paid_until_then_whatever_the_journal_says() -> None:
    state = fold([*begun(1, 0), *begun(2, 100)])
    found = forecast(state, 2, now=at(200), gone_at={1: at(120), 2: at(0)}.get)
    assert found.spent_usd == Decimal("0.22")
    assert found.reaches_at(Decimal("0.32")) == at(300)


def test_before_its_launch_is_told_it_counts_by_the_price_that_was_asked_for() -> None:
    state = fold([launching(1, at(0))])
    assert forecast(state, 1, now=at(100)).reaches_at(Decimal("0.2")) == at(200)
    assert (
        forecast(fold([launching(1, at(0), None)]), 1, now=at(100)).reaches_at(Decimal(1)) is None
    )


def test_an_instance_that_may_have_been_launched_is_counted_for_a_while() -> None:
    state = fold([*begun(1, 0), launching(2, at(100))])
    found = forecast(state, 1, now=at(150))
    assert found.spent_usd == Decimal("0.20")
    assert found.reaches_at(Decimal("0.30")) == at(200)
    assert forecast(state, 1, now=at(800)).spent_usd == Decimal("0.80")
    given_up = e.NotLaunched(at=at(120), attempt=2, cause="withdrawn", message="")
    assert forecast(state.apply(given_up), 1, now=at(150)).spent_usd == Decimal("0.15")


@given(
    usd_h=st.decimals("0.0001", "100", places=4),
    budget=st.decimals("0.01", "1000", places=2),
    rate=st.sampled_from([1.0, 60.0]),
    look_s=st.floats(0, 1e6),
)
def test_the_forecast_is_what_the_bill_will_say(
    usd_h: Decimal, budget: Decimal, rate: float, look_s: float
) -> None:
    state = fold([launching(1, at(0)), launched(1, at(0), str(usd_h), clock_rate=rate)])
    ends = forecast(state, 1, now=at(look_s)).reaches_at(budget)
    assert ends is not None
    if ends > at(look_s):
        later = forecast(state, 1, now=ends)
        assert abs(later.spent_usd - budget) <= Decimal("0.001") * max(1, budget)


class Told:
    """A run in memory, its journal as given, and the purse of one of its attempts."""

    def __init__(self, *events: e.Event, attempt: int = 2, **spec: Any) -> None:
        self.now = at(150)
        storage = open_storage(f"memory://limits-{next(_names)}")
        self.spec = RunSpec(run_id="r", created_at=START, command=("x",), **spec)
        self.run: Run = create_run(storage, self.spec)
        journal = self.run.journal()
        for event in (e.Created(at=START), *events):
            journal.append(event)
        self.purse = Purse(self.run, attempt, self.spec, clock=lambda: self.now)


def test_what_is_spent_stays_spent_however_often_it_looks() -> None:
    told = Told(*begun(1, 0), attempt=1, budget_usd=Decimal("0.20"))
    told.purse.look()
    assert told.purse.empty_at == at(200)
    told.now = at(210)
    told.purse.look()
    told.now = at(300)
    told.purse.look()
    assert told.purse.empty_at == at(200)


def test_it_knows_what_a_checkpoint_took_in_the_attempt_before() -> None:
    ended = e.Ended(at=at(100), attempt=1, cause="interrupted", ended_at=at(100), checkpoint_s=40.0)
    told = Told(*begun(1, 0), ended, *begun(2, 100), budget_usd=Decimal("1.00"))
    told.purse.look()
    watch = Watch(
        booted=at(100), life_ends=at(9999), budget_ends=at(1000),
        checkpoint_s=told.purse.checkpoint_s,
    )  # fmt: skip
    assert watch.stop(at(913), Progress(), 1.0) is None
    stop = watch.stop(at(914), Progress(), 1.0)
    assert stop is not None
    assert stop.reason == "budget"


def test_alert_watches_nothing() -> None:
    told = Told(*begun(1, 0), attempt=1, budget_usd=Decimal("0.20"), on_budget="alert")
    assert not told.purse.is_watched


def test_the_end_of_the_one_before_is_read_from_what_it_left() -> None:
    told = Told(*begun(1, 0), *begun(2, 100), budget_usd=Decimal("0.40"))
    told.purse.look()
    assert told.purse.empty_at == at(250)
    told.run.report_exit(ExitReport(attempt=1, at=at(120), cause="handed_over"))
    told.now = at(200)
    told.purse.look()
    assert told.purse.empty_at == at(320), "a minute after its report it is gone"


def test_an_interrupted_one_is_paid_until_its_time() -> None:
    told = Told(*begun(1, 0), *begun(2, 100), budget_usd=Decimal("1.00"))
    notice = Notice(kind="interruption", seen_at=at(90), time=at(210))
    told.run.beat(
        Heartbeat(attempt=1, beat=1, at=at(90), phase="exited", progress=Progress(), notice=notice)
    )
    told.run.report_exit(ExitReport(attempt=1, at=at(120), cause="interrupted"))
    told.now = at(300)
    told.purse.look()
    assert told.purse.empty_at == at(300 + (1.00 - 0.27 - 0.20) * 1000)


# -- what it does -------------------------------------------------------------------------------

DENYING = """
import os
import spotfirst._storage_local as local

def refusing(method):
    def refuse(self, full, *rest):
        if os.path.exists(os.environ["DENIED"]):
            raise PermissionError(13, "Permission denied", full)
        return method(self, full, *rest)
    return refuse

for name in ("_create", "_write", "_write_from"):
    setattr(local.LocalStorage, name, refusing(getattr(local.LocalStorage, name)))
"""


@pytest.fixture
def denied(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    """While this file is there, every process of an instance is refused each write."""
    (lab.folder / "site").mkdir()
    (lab.folder / "site" / "sitecustomize.py").write_text(DENYING)
    monkeypatch.setenv("PYTHONPATH", str(lab.folder / "site"))
    monkeypatch.setenv("DENIED", str(lab.folder / "denied"))
    return lab.folder / "denied"


def now() -> datetime:
    return datetime.now(timezone.utc)


def with_price(run: Run, *, usd_h: str, clock_rate: float = 1.0) -> Run:
    journal = run.journal()
    for event in (
        e.Created(at=now()),
        launching(1, now(), usd_h),
        launched(1, now(), usd_h, clock_rate=clock_rate),
    ):
        journal.append(event)
    return run


def test_at_the_deadline_an_attempt_stops_with_a_checkpoint(lab: Lab) -> None:
    instance = lab.start(lab.create(deadline=now() + timedelta(seconds=15)))
    report = instance.exit()
    assert (report.cause, report.progress.released) == ("handed_over", True)
    assert "deadline has passed" in report.message
    assert report.progress.checkpoint_step == report.progress.step
    assert (report.progress.step or 0) > 0


def test_before_the_budget_is_spent_an_attempt_stops_with_a_checkpoint(lab: Lab) -> None:
    # A cent a second: half a minute of it, less what the end takes.
    run = with_price(lab.create(budget_usd=Decimal("0.30"), env={"STEPS": "1000000"}), usd_h="36")
    report = lab.start(run).exit()
    assert report.cause == "handed_over"
    assert "budget is used up" in report.message
    assert report.progress.checkpoint_step == report.progress.step


def test_money_that_runs_faster_than_the_clock_is_counted_so(lab: Lab) -> None:
    run = with_price(
        lab.create(budget_usd=Decimal("0.30"), env={"STEPS": "1000000"}),
        usd_h="0.6",
        clock_rate=60.0,
    )
    assert "budget is used up" in lab.start(run).exit().message


def test_with_alert_it_goes_on(lab: Lab) -> None:
    run = with_price(
        lab.create(budget_usd=Decimal("0.01"), on_budget="alert", env={"STEPS": "100"}), usd_h="36"
    )
    assert lab.start(run).exit().cause == "completed"


@pytest.mark.parametrize("mode", ["trainer", "files"])
def test_a_deadline_that_has_passed_at_boot_starts_nothing(lab: Lab, mode: str) -> None:
    run = lab.shell(
        "echo begun", created_at=now() - timedelta(hours=2), deadline=now() - timedelta(hours=1),
        checkpoint_mode=mode,
    )  # fmt: skip
    report = lab.start(run).exit()
    assert (report.cause, report.exit_code) == ("handed_over", None)
    assert "begun" not in report.log_tail


def test_a_script_that_hears_nothing_is_ended_at_the_deadline(lab: Lab) -> None:
    run = lab.shell("exec sleep 300", deadline=now() + timedelta(seconds=8))
    report = lab.start(run).exit()
    assert report.cause == "handed_over"
    assert "deadline" in report.message


@pytest.mark.usefixtures("denied")
@pytest.mark.parametrize("limit", ["deadline", "budget"])
def test_nothing_outlives_the_limit_when_the_storage_takes_nothing(
    lab: Lab, denied: Path, limit: str
) -> None:
    if limit == "deadline":
        run = lab.create(deadline=now() + timedelta(seconds=20))
    else:
        run = with_price(
            lab.create(budget_usd=Decimal("0.30"), env={"STEPS": "1000000"}), usd_h="36"
        )
    instance = lab.start(run)
    instance.until_step(12)
    denied.touch()
    wait_until(lambda: instance.process.poll() is not None, "the end of the agent")
    assert run.exit_report(1) is None, "it could not report"
    commits = run.chain().refresh().commits
    assert commits, "what was checkpointed before stands"


# -- a storage that takes nothing for a while -----------------------------------------------------


def test_the_last_files_wait_for_a_storage_that_refuses(lab: Lab, denied: Path) -> None:
    go = lab.folder / "go"
    script = (
        "echo 1 > $SPOTFIRST_CHECKPOINT_DIR/model; "
        f"until [ -e {go} ]; do sleep 0.05; done; echo 2 > $SPOTFIRST_CHECKPOINT_DIR/model"
    )
    run = lab.shell(script, checkpoint_mode="files", checkpoint_period_s=0.3)
    instance = lab.start(run)
    wait_until(lambda: run.chain().refresh().commits, "the first capture")
    denied.touch()
    go.touch()
    wait_until(lambda: instance.log_line("[spotfirst] waiting for the storage to keep"), "the wait")
    denied.unlink()
    report = instance.exit()
    assert report.cause == "completed"
    mirror(run.packs(), run.chain().refresh().commits[-1][1], lab.folder / "kept")
    assert (lab.folder / "kept" / "model").read_text() == "2\n"


def test_files_that_cannot_be_kept_for_a_while_are_warned_about(lab: Lab, denied: Path) -> None:
    script = (
        "n=0; while :; do n=$((n+1)); echo $n > $SPOTFIRST_CHECKPOINT_DIR/.n; "
        "mv $SPOTFIRST_CHECKPOINT_DIR/.n $SPOTFIRST_CHECKPOINT_DIR/n; sleep 0.1; done"
    )
    run = lab.shell(script, checkpoint_mode="files", checkpoint_period_s=0.3)
    instance = lab.start(run)
    wait_until(lambda: run.chain().refresh().commits, "the first capture")
    denied.touch()
    wait_until(
        lambda: instance.log_line("[spotfirst] could not keep the script's files"), "the refusal"
    )
    denied.unlink()
    told = instance.until(lambda beat: bool(beat.progress.warnings)).progress.warnings
    assert "trying again" in told[0]
    before = len(run.chain().refresh().commits)
    wait_until(lambda: len(run.chain().refresh().commits) > before, "another capture")
    instance.hand_over()
    assert told[0] in instance.exit().progress.warnings
