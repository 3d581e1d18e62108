"""What is said of an attempt in a word or two."""

from __future__ import annotations

import io
from datetime import datetime, timedelta, timezone
from decimal import Decimal

import msgspec
from rich.console import Console

from spotfirst import events as e
from spotfirst.market import Market, Pool
from spotfirst.state import fold
from spotfirst_airflow.cli.summary import attempts_table, between_regions, ending
from spotfirst_airflow.costs import bill

AT = datetime(2026, 1, 1, tzinfo=timezone.utc)
LAUNCHING = e.Launching(
    at=AT, attempt=1, token="t", market=Market.SPOT, pool=Pool(instance_type="g", zone="a"),
    reason="",
)  # fmt: skip
GIVEN_UP = e.NotLaunched(at=AT, attempt=1, cause="no_capacity", message="none there")
LAUNCHED = e.Launched(
    at=AT, attempt=1, instance_id="i", started_at=AT, price_usd_h=Decimal(1), price_source="",
    price_at=AT, on_demand_usd_h=Decimal(1),
)  # fmt: skip
LOST = e.Ended(at=AT, attempt=1, cause="lost", ended_at=AT)


def said(*events: e.Event) -> str:
    [attempt] = fold([e.Created(at=AT), LAUNCHING, *events]).attempts
    return ending(attempt)


def test_an_attempt_without_an_instance_was_not_launched() -> None:
    assert said(GIVEN_UP) == "not launched: no capacity"


def test_one_that_was_launched_after_it_had_been_given_up_was_launched() -> None:
    assert said(GIVEN_UP, LAUNCHED) == "running, launched after it was given up"
    assert said(GIVEN_UP, LAUNCHED, LOST) == "lost, launched after it was given up"


def test_what_crossed_regions_is_in_an_attempts_cost_and_said_of_the_run() -> None:
    launched = msgspec.structs.replace(LAUNCHED, read_usd_gb=Decimal("0.02"))
    hour = AT + timedelta(hours=1)
    ended = e.Ended(at=hour, attempt=1, cause="completed", ended_at=hour, restored_bytes=50 * 10**9)
    state = fold([e.Created(at=AT), LAUNCHING, launched, ended])
    account = bill(state, now=hour)
    assert between_regions(account) == "$1.00 of it between regions"
    told = io.StringIO()
    Console(file=told, width=200).print(attempts_table(state, account))
    assert "$2.00" in told.getvalue()
