"""The page of a run, rendered from a run's files."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from pathlib import Path

from spotfirst import events as e
from spotfirst.market import Market, Pool
from spotfirst.run import Run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_ui.page import render_message, render_run
from spotfirst_ui.view import look_at

HOSTILE = "<script>alert('&\"')</script>"


def run_of(folder: Path) -> Run:
    run = Run(open_storage(str(folder)), "r")
    spec = RunSpec(run_id="r", created_at=utc_now(), command=("true",))
    run.create_spec(spec)
    run.journal().decide(lambda state: e.Created(at=utc_now()) if state.seq == 0 else None)
    return run


def append(run: Run, event: e.Event) -> None:
    journal = run.journal()
    journal.refresh()
    journal.append(event)


def test_nothing_that_a_run_says_becomes_markup(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    pool = Pool(instance_type=HOSTILE, zone=HOSTILE)
    at = utc_now()
    append(
        run,
        e.Launching(at=at, attempt=1, token="t", market=Market.SPOT, pool=pool, reason=HOSTILE),
    )
    append(run, e.NotLaunched(at=at, attempt=1, cause="rejected", message=HOSTILE))
    append(run, e.Warned(at=at, message=HOSTILE))
    append(run, e.Failed(at=at, message=HOSTILE))
    page = render_run(HOSTILE, look_at(run, at))
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 6
    assert "<script" not in render_message(HOSTILE, HOSTILE)


def test_what_crossed_regions_is_shown_where_there_is_any(tmp_path: Path) -> None:
    run, at = run_of(tmp_path), utc_now()
    pool = Pool(instance_type="g6.xlarge", zone="us-west-2a")
    launching = e.Launching(at=at, attempt=1, token="t", market=Market.SPOT, pool=pool, reason="")
    append(run, launching)
    launched = e.Launched(
        at=at, attempt=1, instance_id="i", started_at=at, price_usd_h=Decimal(1), price_source="",
        price_at=at, on_demand_usd_h=Decimal(1), read_usd_gb=Decimal("0.02"),
    )  # fmt: skip
    append(run, launched)
    assert "between regions" not in render_run("t", look_at(run, at))
    append(run, e.Ended(at=at, attempt=1, cause="lost", ended_at=at, restored_bytes=50 * 10**9))
    assert "$1.00 between regions" in render_run("t", look_at(run, at))


def test_page_loads_itself_again_until_the_run_is_final(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert 'http-equiv="refresh"' in render_run("t", look_at(run, utc_now()))
    append(run, e.Stopped(at=utc_now(), reason="enough"))
    assert 'http-equiv="refresh"' not in render_run("t", look_at(run, utc_now()))


def test_output_shown_is_the_end_of_the_newest_attempt_that_wrote(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    pool = Pool(instance_type="g6.xlarge", zone="a")
    at = utc_now()
    for number in (1, 2):
        append(
            run,
            e.Launching(
                at=at, attempt=number, token=f"t{number}", market=Market.SPOT, pool=pool, reason=""
            ),
        )
        append(
            run,
            e.Launched(
                at=at, attempt=number, instance_id="i", started_at=at, price_usd_h=Decimal(1),
                price_source="", price_at=at, on_demand_usd_h=Decimal(1),
            ),
        )  # fmt: skip
    for segment in range(1, 9):
        text = "".join(f"line {segment * 100 + line}\n" for line in range(100))
        run.storage.create(run.log_path(1, segment), text.encode())
    output = look_at(run, at).output
    assert output[-1] == "line 899"
    assert len(output) == 60


def test_an_attempt_that_was_launched_after_it_had_been_given_up_is_not_called_unlaunched(
    tmp_path: Path,
) -> None:
    run = run_of(tmp_path)
    pool = Pool(instance_type="g6.xlarge", zone="a")
    at = utc_now()
    append(run, e.Launching(at=at, attempt=1, token="t", market=Market.SPOT, pool=pool, reason=""))
    append(run, e.NotLaunched(at=at, attempt=1, cause="withdrawn", message="no longer wanted"))
    launched = e.Launched(
        at=at, attempt=1, instance_id="i", started_at=at, price_usd_h=Decimal(1),
        price_source="", price_at=at, on_demand_usd_h=Decimal(1),
    )  # fmt: skip
    append(run, launched)
    append(run, e.Ended(at=at, attempt=1, cause="lost", ended_at=at))
    page = render_run("t", look_at(run, at))
    assert "<td>lost (launched after it was given up)" in page
    assert "<td>not launched" not in page


def test_a_run_past_its_deadline_is_said_to_be(tmp_path: Path) -> None:
    run = Run(open_storage(str(tmp_path)), "r")
    began = utc_now() - timedelta(hours=2)
    deadline = began + timedelta(hours=1)
    run.create_spec(RunSpec(run_id="r", created_at=began, command=("true",), deadline=deadline))
    append(run, e.Created(at=began))
    assert "has passed" in render_run("r", look_at(run, utc_now()))
    assert "has passed" not in render_run("r", look_at(run, began))


def test_amounts_that_are_not_known_are_a_dash_and_a_failure_has_saved_nothing(
    tmp_path: Path,
) -> None:
    run, at = run_of(tmp_path), utc_now()
    assert "$0.0000" not in render_run("t", look_at(run, at))
    pool = Pool(instance_type="g6.xlarge", zone="a")
    append(run, e.Launching(at=at, attempt=1, token="t", market=Market.SPOT, pool=pool, reason=""))
    launched = e.Launched(
        at=at, attempt=1, instance_id="i", started_at=at, price_usd_h=Decimal("0.25"),
        price_source="local fleet: calm market", price_at=at, on_demand_usd_h=Decimal(1),
    )  # fmt: skip
    append(run, launched)
    later = at + timedelta(hours=1)
    page = render_run("t", look_at(run, later))
    assert "simulated" in page
    assert "saved" not in page
    append(run, e.Ended(at=at, attempt=1, cause="script_failed", exit_code=1, ended_at=later))
    append(run, e.Failed(at=at, message="no"))
    page = render_run("t", look_at(run, later))
    assert "$1.00" in page
    assert "saved" not in page
