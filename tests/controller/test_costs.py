"""The bill of a run, from its journal alone."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.market import Market, Pool
from spotfirst.state import RunState, fold
from spotfirst_airflow.costs import Bill, bill, usd
from tests.controller.world import START

LATER = START + timedelta(hours=1)
POOL = Pool(instance_type="gpu", zone="zone-a")


def journal(*attempts: dict[str, Any]) -> RunState:
    """A run whose attempts follow one another; times in seconds from the start of each."""
    events: list[e.Event] = [e.Created(at=START)]
    at = START
    for number, facts in enumerate(attempts, start=1):
        market = facts.get("market", Market.SPOT)
        events.append(
            e.Launching(at=at, attempt=number, token="t", market=market, pool=POOL, reason="")
        )
        if facts.get("refused"):
            events.append(e.NotLaunched(at=at, attempt=number, cause="no_capacity", message=""))
            continue
        events.append(
            e.Launched(
                at=at, attempt=number, instance_id="i", started_at=at, price_at=at,
                price_usd_h=Decimal("0.36") if market is Market.SPOT else Decimal("1.44"),
                price_source="test", on_demand_usd_h=Decimal("1.44"),
                clock_rate=facts.get("clock_rate", 1.0),
            )
        )  # fmt: skip
        if "used_s" not in facts:
            continue
        at += timedelta(seconds=facts["used_s"])
        events.append(
            e.Ended(
                at=at, attempt=number, ended_at=at, cause=facts.get("cause", "interrupted"),
                by_fleet=facts.get("by_fleet", False), start_step=facts.get("start"),
                step=facts.get("step"), checkpoint_step=facts.get("step"),
                training_s=facts.get("training_s", 0.0), startup_s=facts.get("startup_s", 0.0),
            )
        )  # fmt: skip
    return fold(events)


def account(*attempts: dict[str, Any], after_s: float = 1e5) -> Bill:
    return bill(journal(*attempts), now=START + timedelta(seconds=after_s))


def test_seconds_are_paid_at_the_price_of_the_launch() -> None:
    found = account({"used_s": 5000})
    assert found.total_usd == Decimal("0.5000")
    assert found.charges[0].list_usd == Decimal("2.0000")
    assert found.charges[0].price_source == "test"


def test_the_fleet_takes_nothing_when_it_takes_back_spot_within_the_first_hour() -> None:
    assert account({"used_s": 3599, "by_fleet": True}).total_usd == 0
    assert account({"used_s": 3600, "by_fleet": True}).total_usd == Decimal("0.36")
    assert account({"used_s": 3599}).total_usd > 0, "we ended it ourselves"
    ours = {"used_s": 3599, "by_fleet": True, "market": Market.ON_DEMAND}
    assert account(ours).total_usd > 0


def test_the_first_hour_is_counted_on_the_markets_clock() -> None:
    fast = {"by_fleet": True, "clock_rate": 60.0}
    assert account({"used_s": 59, **fast}).total_usd == 0
    assert account({"used_s": 61, **fast}).total_usd == Decimal("0.366")


def test_an_attempt_that_never_got_an_instance_is_not_charged() -> None:
    assert account({"refused": True}).charges == ()


def test_an_attempt_that_runs_is_estimated_up_to_now() -> None:
    charge = account({}, after_s=1000).charges[0]
    assert charge.is_estimate
    assert charge.cost_usd == Decimal("0.1000")


def test_the_same_work_on_demand_counts_kept_steps_and_one_startup() -> None:
    found = account(
        {"used_s": 1200, "start": 0, "step": 100, "training_s": 1000.0, "startup_s": 100.0},
        {"used_s": 1200, "start": 60, "step": 160, "training_s": 1000.0, "startup_s": 100.0},
    )
    assert found.lost_steps == 40
    # 60 of the first 100 steps and all of the second 100: 600 s + 1000 s, and 100 s to start.
    assert found.on_demand_usd == Decimal("0.6800")
    assert found.total_usd == Decimal("0.2400")
    assert found.saving_usd == Decimal("0.4400")


@pytest.mark.parametrize(
    ("attempts", "lost"),
    [
        ([], 0),
        ([{}], 0),
        ([{"used_s": 60}], None),
        (
            [
                {"used_s": 60, "start": 5, "step": 5},
                {"used_s": 60, "start": 5, "step": 9, "startup_s": 9.0},
            ],
            0,
        ),
        # In files mode the numbers are captures: how much was trained between them is not known.
        ([{"used_s": 60, "start": 0, "step": 3}, {"used_s": 60, "start": 3, "step": 5}], None),
        ([{"used_s": 60, "start": 0, "step": 0}, {"used_s": 60, "start": 0, "step": 0}], None),
    ],
)
def test_lost_steps_are_counted_where_steps_are_told(
    attempts: list[dict[str, Any]], lost: int | None
) -> None:
    assert account(*attempts).lost_steps == lost


def test_a_run_without_steps_compares_all_its_seconds() -> None:
    assert account({"used_s": 5000}).on_demand_usd == Decimal("2.0000")


@given(st.lists(st.tuples(st.floats(0, 1e5), st.booleans(), st.sampled_from(list(Market)))))
def test_the_total_is_the_sum_of_its_charges_to_the_hundredth_of_a_cent(
    facts: list[tuple[float, bool, Market]],
) -> None:
    found = account(*({"used_s": s, "by_fleet": f, "market": m} for s, f, m in facts), after_s=1e9)
    assert found.total_usd == sum((c.cost_usd for c in found.charges), Decimal(0))
    assert all(c.cost_usd == round(c.cost_usd, 4) and c.cost_usd >= 0 for c in found.charges)
    assert all(c.cost_usd <= c.list_usd for c in found.charges)


def test_a_bill_does_not_change_later() -> None:
    state = journal({"used_s": 5000}, {"used_s": 100, "by_fleet": True})
    early, late = (bill(state, now=START + timedelta(days=d)) for d in (1, 400))
    assert early == late


def test_small_amounts_keep_their_digits_for_people() -> None:
    assert usd(Decimal("12.3456")) == "$12.35"
    assert usd(Decimal("0.0123")) == "$0.0123"


def test_a_run_has_saved_something_only_when_it_succeeded() -> None:
    ended = (
        *bought(Decimal("0.25")),
        e.Ended(at=START, attempt=1, cause="completed", ended_at=LATER),
    )
    going = bill(fold(ended), now=LATER)
    assert (going.known_on_demand_usd, going.saved_usd, going.saved_share) == (None, None, None)
    failed = bill(fold((*ended, e.Failed(at=START, message="m"))), now=LATER)
    assert failed.known_on_demand_usd == Decimal("1.0000")
    assert (failed.saved_usd, failed.saving_in_words) == (None, "")
    done = bill(fold((*ended, e.Succeeded(at=START, attempt=1, step=1))), now=LATER)
    assert done.saved_usd == Decimal("0.7500")
    assert done.saving_in_words == "75% saved"


def test_dollars_of_the_local_fleet_are_simulated() -> None:
    assert bill(fold(bought(Decimal(1))), now=LATER).is_simulated
    assert not bill(fold(bought(Decimal(1), source="AWS spot")), now=LATER).is_simulated
    assert usd(Decimal("0.5"), simulated=True) == "$0.5000 simulated"
    assert usd(None) == "-"


def bought(price: Decimal, *, source: str = "local fleet: calm market") -> tuple[e.Event, ...]:
    pool = Pool(instance_type="g", zone="a")
    return (
        e.Created(at=START),
        e.Launching(at=START, attempt=1, token="t", market=Market.SPOT, pool=pool, reason=""),
        e.Launched(
            at=START, attempt=1, instance_id="i", started_at=START, price_usd_h=price,
            price_source=source, price_at=START, on_demand_usd_h=Decimal(1),
        ),
    )  # fmt: skip
