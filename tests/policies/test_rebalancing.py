"""A rebalance recommendation starts a replacement in another pool, where that is worth it."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from spotfirst import events as e
from spotfirst.market import Market, Notice, Pool
from spotfirst.state import Attempt, Phase
from spotfirst_airflow.fleets import Offer
from spotfirst_airflow.policies import Fallback, Policy, Spotfirst, View, Work
from spotfirst_airflow.policies.rebalancing import MOST_LAUNCHES_AN_HOUR
from tests.controller.world import START, World

A, B = (Pool(instance_type="gpu", zone=f"zone-{letter}") for letter in "ab")
NOW = START + timedelta(hours=1)


def offer(pool: Pool, market: Market, usd_h: str, *, available: bool = True) -> Offer:
    return Offer(
        pool=pool, market=market, price_usd_h=Decimal(usd_h), price_source="test", price_at=START,
        available=available,
    )  # fmt: skip


OFFERS = (
    offer(A, Market.SPOT, "0.30"), offer(B, Market.SPOT, "0.40"), offer(A, Market.ON_DEMAND, "1"),
)  # fmt: skip


def attempt(number: int, minutes_ago: float, notice: Notice | None) -> Attempt:
    at = NOW - timedelta(minutes=minutes_ago)
    launched = e.Launched(
        at=at, attempt=number, instance_id="i", started_at=at, price_usd_h=Decimal("0.3"),
        price_source="t", price_at=at, on_demand_usd_h=Decimal(1),
    )  # fmt: skip
    return Attempt(
        number=number, token=str(number), market=Market.SPOT, pool=A, reason="", intended_at=at,
        launched=launched, notice=notice,
    )  # fmt: skip


RECOMMENDED = Notice(kind="rebalance", seen_at=NOW)


def view(notice: Notice | None = RECOMMENDED, **more: Any) -> View:
    current = attempt(1, 45, notice)
    known: dict[str, Any] = {
        "now": NOW, "idle_since": NOW, "offers": OFFERS, "attempts": (current,),
        "current": current, "changeover_s": 60.0, "deadline": NOW + timedelta(hours=40),
        "work": Work(likely_s=36000, most_s=36000),
    }  # fmt: skip
    return View(**{**known, **more})


@pytest.mark.parametrize("policy", [Fallback(), Spotfirst()])
class TestBoth:
    def test_the_replacement_is_on_spot_in_another_pool(self, policy: Policy) -> None:
        decision = policy.decide(view())
        assert decision.offer == OFFERS[1]
        assert "recommends to leave gpu in zone-a" in decision.reason

    def test_without_a_recommendation_it_stays(self, policy: Policy) -> None:
        assert policy.decide(view(None)).offer is None

    def test_it_stays_for_the_little_work_that_is_left(self, policy: Policy) -> None:
        little = Work(likely_s=100, most_s=100)
        assert policy.decide(view(work=little)).offer is None

    def test_it_stays_where_no_other_pool_is_cheaper_than_on_demand(self, policy: Policy) -> None:
        dear = (OFFERS[0], offer(B, Market.SPOT, "1.20"), OFFERS[2])
        assert policy.decide(view(offers=dear)).offer is None
        gone = (OFFERS[0], msgspec.structs.replace(OFFERS[1], available=False), OFFERS[2])
        assert policy.decide(view(offers=gone)).offer is None

    def test_moves_are_bounded(self, policy: Policy) -> None:
        many = tuple(attempt(n, 50 - n, RECOMMENDED) for n in range(1, MOST_LAUNCHES_AN_HOUR + 2))
        assert policy.decide(view(attempts=many, current=many[-1])).offer is None


def test_the_old_attempt_trains_until_its_replacement_takes_over() -> None:
    world = World(total_steps=200)
    for _ in range(60):
        world.reconcile()
        world.tick()
    first = world.trainer()
    first.notice = Notice(kind="rebalance", seen_at=world.now)
    state = world.until_done().state
    assert state.phase is Phase.SUCCEEDED
    launched = [a for a in state.attempts if a.launched]
    assert [a.pool.zone for a in launched[:2]] == ["zone-a", "zone-b"]
    assert launched[0].ended is not None
    assert not launched[0].ended.by_fleet
    assert launched[0].ended.step == launched[0].ended.checkpoint_step
