"""Policies are pure: a view in, a decision out."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.errors import InvalidSpec
from spotfirst.market import Market, Notice, Pool
from spotfirst.state import Attempt
from spotfirst_airflow.fleets import Offer
from spotfirst_airflow.policies import Fallback, OnDemand, SpotOnly, View, Work, load_policy
from tests.controller.world import START

A, B = (Pool(instance_type="gpu", zone=f"zone-{letter}") for letter in "ab")


def offer(pool: Pool, market: Market, price: str, *, available: bool = True) -> Offer:
    return Offer(
        pool=pool, market=market, price_usd_h=Decimal(price), price_source="test", price_at=START,
        available=available,
    )  # fmt: skip


SPOT_A, SPOT_B = offer(A, Market.SPOT, "0.30"), offer(B, Market.SPOT, "0.40")
DEAR = offer(A, Market.ON_DEMAND, "1.00")
NO_SPOT = tuple(msgspec.structs.replace(o, available=False) for o in (SPOT_A, SPOT_B))


def view(**changes: Any) -> View:
    now = START + timedelta(hours=1)
    return View(**{"now": now, "idle_since": now, "offers": (SPOT_A, SPOT_B, DEAR), **changes})


def exactly(seconds: float) -> Work:
    return Work(likely_s=seconds, most_s=seconds)


def attempt(number: int, market: Market = Market.SPOT, pool: Pool = A, **more: Any) -> Attempt:
    return Attempt(
        number=number, token=str(number), market=market, pool=pool, reason="", intended_at=START,
        **more,
    )  # fmt: skip


def lost(number: int, minutes_ago: float, pool: Pool = A) -> Attempt:
    at = START + timedelta(hours=1) - timedelta(minutes=minutes_ago)
    ended = e.Ended(at=at, attempt=number, cause="interrupted", ended_at=at, by_fleet=True)
    return attempt(number, pool=pool, ended=ended)


def running(market: Market, minutes: float) -> Attempt:
    at = START + timedelta(hours=1) - timedelta(minutes=minutes)
    launched = e.Launched(
        at=at, attempt=1, instance_id="i", started_at=at, price_usd_h=Decimal(1), price_source="t",
        price_at=at, on_demand_usd_h=Decimal(1),
    )  # fmt: skip
    return attempt(1, market, launched=launched)


def test_spot_only_takes_the_cheapest_pool_and_else_waits() -> None:
    assert SpotOnly().decide(view()).offer == SPOT_A
    assert SpotOnly().decide(view(offers=(*NO_SPOT, DEAR))).offer is None


def test_on_demand_never_takes_spot() -> None:
    assert OnDemand().decide(view()).offer == DEAR


def test_fallback_begins_on_spot() -> None:
    assert Fallback().decide(view()).offer == SPOT_A


def test_fallback_leaves_the_pool_that_has_just_taken_an_instance_back() -> None:
    assert Fallback().decide(view(attempts=(lost(1, 5),))).offer == SPOT_B


def test_fallback_goes_on_demand_after_n_losses_within_the_window() -> None:
    rough = (lost(1, 50), lost(2, 30), lost(3, 10))
    assert Fallback(losses=3).decide(view(attempts=rough)).offer == DEAR
    assert Fallback(losses=4).decide(view(attempts=rough)).offer != DEAR
    past = (lost(1, 70), lost(2, 30), lost(3, 10))
    assert Fallback(losses=3).decide(view(attempts=past)).offer != DEAR


def test_a_notice_counts_as_a_loss_before_the_instance_is_gone() -> None:
    notice = Notice(kind="interruption", seen_at=START + timedelta(minutes=59))
    leaving = attempt(1, notice=notice)
    assert Fallback(losses=1).decide(view(attempts=(leaving,))).offer == DEAR


def test_fallback_goes_on_demand_after_minutes_without_capacity() -> None:
    empty = (*NO_SPOT, DEAR)
    now = view().now
    early = view(offers=empty, idle_since=now - timedelta(seconds=299))
    late = view(offers=empty, idle_since=now - timedelta(seconds=300))
    assert Fallback(no_capacity_s=300).decide(early).offer is None
    assert Fallback(no_capacity_s=300).decide(late).offer == DEAR


def test_fallback_takes_spot_that_is_there_however_late_its_controller_comes() -> None:
    late = view(idle_since=view().now - timedelta(minutes=30))
    assert Fallback(no_capacity_s=300).decide(late).offer == SPOT_A


def test_fallback_returns_to_spot_when_it_is_back_and_not_before() -> None:
    policy = Fallback(return_after_s=600)
    young, old = running(Market.ON_DEMAND, 9), running(Market.ON_DEMAND, 11)
    assert policy.decide(view(current=young)).offer is None
    assert policy.decide(view(current=old)).offer == SPOT_A
    assert policy.decide(view(current=old, offers=(*NO_SPOT, DEAR))).offer is None
    assert policy.decide(view(current=running(Market.SPOT, 11))).offer is None


def test_it_does_not_return_to_spot_for_the_last_minutes_of_work() -> None:
    old = running(Market.ON_DEMAND, 30)
    for work_left_s, moves in ((239.0, False), (240.0, True)):
        asked = view(current=old, work=exactly(work_left_s), changeover_s=120.0)
        assert (Fallback().decide(asked).offer is not None) is moves


def test_near_the_deadline_it_moves_to_on_demand_and_stays() -> None:
    now = view().now
    late = {
        "deadline": now + timedelta(seconds=1200),
        "work": exactly(1000.0),
        "changeover_s": 120.0,
    }
    assert Fallback().decide(view(**late)).offer == DEAR
    assert Fallback().decide(view(current=running(Market.SPOT, 30), **late)).offer == DEAR
    assert Fallback().decide(view(current=running(Market.ON_DEMAND, 30), **late)).offer is None


def test_without_an_estimate_a_run_with_a_deadline_does_not_wait_for_spot() -> None:
    empty = (*NO_SPOT, DEAR)
    deadline = view().now + timedelta(days=9)
    assert Fallback().decide(view(offers=empty, deadline=deadline)).offer == DEAR
    known = view(offers=empty, deadline=deadline, work=exactly(60.0))
    assert Fallback().decide(known).offer is None


def test_a_pool_without_capacity_rests_before_it_is_asked_again() -> None:
    at = view().now - timedelta(seconds=10)
    refused = e.NotLaunched(at=at, attempt=1, cause="no_capacity", message="none")
    attempts = (attempt(1, not_launched=refused),)
    assert SpotOnly(retry_s=15).decide(view(attempts=attempts)).offer == SPOT_B
    assert SpotOnly(retry_s=5).decide(view(attempts=attempts)).offer == SPOT_A


@given(
    offers=st.lists(
        st.builds(
            offer, st.sampled_from([A, B]), st.sampled_from(list(Market)),
            st.sampled_from(["0.1", "1"]), available=st.booleans(),
        )
    ),
    left_s=st.none() | st.floats(0, 1e6), work_s=st.none() | st.floats(0, 1e6),
    losses=st.lists(st.floats(0, 120), max_size=6),
    current=st.none() | st.builds(running, st.sampled_from(list(Market)), st.floats(0, 100)),
)  # fmt: skip
def test_any_decision_is_repeatable_available_and_never_replaces_like_with_like(
    offers: list[Offer], left_s: float | None, work_s: float | None, losses: list[float],
    current: Attempt | None,
) -> None:  # fmt: skip
    asked = view(
        offers=tuple(offers),
        attempts=tuple(lost(n + 1, minutes) for n, minutes in enumerate(losses)),
        current=current,
        deadline=None if left_s is None else view().now + timedelta(seconds=left_s),
        work=None if work_s is None else exactly(work_s),
    )
    for policy in (Fallback(), SpotOnly(), OnDemand()):
        decision = policy.decide(asked)
        assert decision == policy.decide(asked)
        assert decision.reason
        if decision.offer is not None:
            assert decision.offer.available
            assert current is None or decision.offer.market is not current.market
        elif current is None and isinstance(policy, OnDemand):
            assert not any(o.available for o in offers if o.market is Market.ON_DEMAND)


def test_unknown_options_are_named() -> None:
    with pytest.raises(InvalidSpec, match="losess"):
        load_policy("fallback", {"losess": 2})
