"""What a task's log says: levels, the script's own error, and a line of progress now and then."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from spotfirst import events as e
from spotfirst.heartbeat import Heartbeat, Progress
from spotfirst.market import Market, Pool
from spotfirst.spec import RunSpec
from spotfirst.state import RunState, fold
from spotfirst.storage import open_storage
from spotfirst_airflow.following import Follower
from spotfirst_airflow.news import describe, is_bad, progress_line, script_error
from spotfirst_airflow.submission import Request, attach

NOW = datetime(2030, 1, 1, 12, tzinfo=timezone.utc)
POOL = Pool(instance_type="g6.xlarge", zone="a")


class Log:
    """Notes what is logged, with its level."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def info(self, text: str, *values: Any) -> None:
        self.lines.append(("info", text % values))

    def warning(self, text: str, *values: Any) -> None:
        self.lines.append(("warning", text % values))

    def error(self, text: str, *values: Any) -> None:
        self.lines.append(("error", text % values))


@pytest.mark.parametrize(
    ("tail", "own"),
    [
        (
            ["Traceback (most recent call last):", '  File "a.py"', "KeyError: 'x'"],
            "KeyError: 'x'",
        ),
        (
            ["Traceback (most recent call last):", "  f()", "RuntimeError: out of memory",
             "  with details", "[W] destroying process group"],
            "RuntimeError: out of memory",
        ),
        (
            ["Traceback (most recent call last):", "  f()", "KeyError: 1", "", "During handling:",
             "Traceback (most recent call last):", "  g()", "my.module.OwnError: really this"],
            "my.module.OwnError: really this",
        ),
        (["step 1", "train.sh: line 3: pyhton: command not found", "cannot go on", "bye"],
         "cannot go on"),
        (["step 1", "the end"], "the end"),
        (["", "  "], ""),
        ([], ""),
        (["Traceback (most recent call last):", "  cut off"], "cut off"),
    ],
)  # fmt: skip
def test_the_scripts_own_error_is_found_among_its_last_lines(tail: list[str], own: str) -> None:
    assert script_error(tail) == own


def test_an_error_of_any_length_is_one_short_line() -> None:
    assert len(script_error(["ValueError: " + "x" * 10**6])) < 400


@pytest.mark.parametrize(
    ("code", "tail", "own"),
    [(-11, ["saved", "done"], ""), (1, ["saved", "done"], "done"), (-6, ["Fatal error: x"], "Fatal error: x")],
)  # fmt: skip
def test_the_last_line_before_a_signal_is_no_error(code: int, tail: list[str], own: str) -> None:
    state = fold([
        e.Created(at=NOW),
        e.Launching(at=NOW, attempt=1, token="t", market=Market.SPOT, pool=POOL, reason=""),
        e.Ended(at=NOW, attempt=1, cause="killed", ended_at=NOW, exit_code=code),
    ])  # fmt: skip
    assert script_error(tail, state) == own


def test_news_has_the_level_that_it_deserves() -> None:
    assert is_bad(e.Failed(at=NOW, message="m")) == "error"
    assert is_bad(e.Warned(at=NOW, message="m")) == "warning"
    assert is_bad(e.Ended(at=NOW, attempt=1, cause="script_failed", ended_at=NOW)) == "warning"
    assert is_bad(e.Ended(at=NOW, attempt=1, cause="interrupted", ended_at=NOW)) == ""
    assert is_bad(e.Succeeded(at=NOW, attempt=1, step=3)) == ""


def test_a_command_that_could_not_be_started_is_told_with_its_reason() -> None:
    why = "no program 'pyhton' was found on the instance's PATH (/bin)"
    ended = e.Ended(at=NOW, attempt=1, cause="script_failed", ended_at=NOW, message=why)
    text = describe(ended, RunState())
    assert why in text
    assert "None" not in text


def state_with(*events: e.Event) -> RunState:
    return fold(events)


def trains() -> RunState:
    return state_with(
        e.Created(at=NOW),
        e.Launching(at=NOW, attempt=1, token="t", market=Market.SPOT, pool=POOL, reason=""),
        e.Launched(
            at=NOW, attempt=1, instance_id="i", started_at=NOW, price_usd_h=Decimal(1),
            price_source="", price_at=NOW, on_demand_usd_h=Decimal(2),
        ),
    )  # fmt: skip


def test_a_line_of_progress_has_step_loss_cost_and_the_time_to_the_deadline() -> None:
    spec = RunSpec(
        run_id="r", created_at=NOW, command=("a",), deadline=NOW + timedelta(minutes=150),
        budget_usd=Decimal(5),
    )  # fmt: skip
    progress = Progress(step=120, total_steps=1000, metrics={"loss": 2.3456})
    beat = Heartbeat(attempt=1, beat=1, at=NOW, phase="training", progress=progress)
    line = progress_line(spec, trains(), beat, cost="$0.1200", now=NOW)
    assert line == (
        "step 120/1000 · loss 2.346 · attempt 1 on spot, g6.xlarge in a · cost $0.1200 of $5.00 · "
        "2 h 30 min to the deadline"
    )
    late = progress_line(spec, trains(), None, cost="-", now=NOW + timedelta(hours=3))
    assert late.endswith("past the deadline")


def test_progress_is_logged_often_at_first_and_seldom_in_a_long_run(tmp_path: Path) -> None:
    now = [NOW]
    request = Request(
        command=("true",), policy="spot_only",
        fleet_options={
            "root": str(tmp_path / "fleet"),
            "market": {"kind": "scripted", "zones": {"a": [{"from_s": 0, "capacity": 0}]}},
        },
    )  # fmt: skip
    storage = open_storage(str(tmp_path / "s"))
    run = attach(storage, "r", request, owner="us", environment={}, clock=lambda: now[0])
    log = Log()
    follower = Follower(lambda: (run, {}), log=log, owner="us", clock=lambda: now[0])
    times = []
    for _ in range(24 * 60 * 6):  # a day, a look every ten seconds
        before = len(log.lines)
        if follower.look() is None:
            break
        if any("cost" in text for _, text in log.lines[before:]):
            times.append((now[0] - NOW).total_seconds())
        now[0] += timedelta(seconds=10)
        if (now[0] - NOW) > timedelta(hours=3):
            break
    assert times[0] <= 20
    assert len([each for each in times if each <= 600]) >= 10
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert max(gaps) <= 310
    assert len(times) < 100


def test_a_success_without_steps_names_none() -> None:
    event = e.Succeeded(at=NOW, attempt=1, step=None)
    assert describe(event, RunState()) == "succeeded with attempt 1"


def test_a_lost_attempt_says_why_once() -> None:
    why = "it reported success after step 5, and there is no checkpoint"
    event = e.Ended(at=NOW, attempt=1, cause="lost", ended_at=NOW, message=why)
    assert describe(event, RunState()) == f"attempt 1: was lost: {why}"
