"""What is said of an attempt in a word or two."""

from __future__ import annotations

from datetime import datetime, timezone
from decimal import Decimal

from spotfirst import events as e
from spotfirst.market import Market, Pool
from spotfirst.state import fold
from spotfirst_airflow.cli.summary import ending

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
