"""The default policy keeps the deadline on any market, and moves only when that pays."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst.market import Market, Pool
from spotfirst_airflow.markets import Steps, ZoneState
from spotfirst_airflow.policies import PoolHistory, Spotfirst
from spotfirst_airflow.policies.slack import PoolRates, shadow_prices, spread_of
from spotfirst_airflow.simulation import Place, Played, Task, World, simulate

HOUR = 3600.0


def place(
    zone: str, *steps: tuple[float, int], usd_h: float = 1.0, on_demand_usd_h: int = 3
) -> Place:
    """A zone that has as many spot instances from each hour on."""
    states = [(at * HOUR, ZoneState(capacity=n, price_usd_h=usd_h)) for at, n in steps]
    return Place(
        Pool(instance_type="gpu", zone=zone), Steps(states),
        on_demand_usd_h=Decimal(on_demand_usd_h), region=zone,
    )  # fmt: skip


def play(*places: Place, **task: float) -> Played:
    plan = {"work_s": 10 * HOUR, "deadline_s": 20 * HOUR, "changeover_s": 0.1 * HOUR, **task}
    world = World(places, first_hour_free=False, egress_usd_gb=lambda _from, _to: Decimal("0.02"))
    return simulate(Task(overlaps=False, **plan), world, Spotfirst())  # type: ignore[arg-type]


def course(played: Played) -> list[tuple[str, str]]:
    return [(str(a.market), a.pool.zone) for a in played.state.attempts if a.launched]


def test_spot_that_stays_is_all_that_it_takes() -> None:
    assert course(play(place("a", (0, 1)), place("b", (0, 1), usd_h=1.1))) == [("spot", "a")]


def test_with_plenty_of_time_it_waits_for_its_cheap_pool() -> None:
    played = play(
        place("a", (0, 1), (5, 0), (6, 1)), place("b", (0, 1), usd_h=2.8), deadline_s=80 * HOUR
    )
    assert course(played) == [("spot", "a"), ("spot", "a")]


def test_with_little_time_it_takes_another_pool_at_once() -> None:
    played = play(
        place("a", (0, 1), (5, 0), (6, 1)), place("b", (0, 1), usd_h=1.2), deadline_s=10.6 * HOUR
    )
    assert course(played)[:2] == [("spot", "a"), ("spot", "b")]
    second = [a for a in played.state.attempts if a.launched][1]
    assert second.launched is not None
    assert second.launched.started_at - played.started_at == timedelta(hours=5)


def test_it_waits_no_longer_than_the_deadline_allows() -> None:
    played = play(place("a", (0, 0)))
    assert ("on-demand", "a") in course(played)
    assert not played.is_late


def test_a_move_has_to_pay_for_itself() -> None:
    for dear_usd_h, moves in ((1.05, False), (2.5, True)):
        # The cheap pool refuses at first, so that the run begins in the other one.
        played = play(place("cheap", (0, 0), (0.2, 1)), place("dear", (0, 1), usd_h=dear_usd_h),
                      deadline_s=11 * HOUR)  # fmt: skip
        assert course(played)[0] == ("spot", "dear")
        assert (("spot", "cheap") in course(played)) is moves


def test_a_checkpoint_that_is_dear_to_move_stays_where_it_is() -> None:
    places = (place("cheap", (0, 0), (1, 1)), place("dear", (0, 1), usd_h=1.6))
    for size_bytes, moves in ((0, True), (10**12, False)):
        played = play(*places, deadline_s=11 * HOUR, checkpoint_bytes=size_bytes)
        assert (("spot", "cheap") in course(played)) is moves


def test_where_spot_is_hardly_cheaper_and_rough_on_demand_is_taken() -> None:
    rough = place("a", *((n / 10, n % 2) for n in range(300)), usd_h=2.9)
    played = play(rough, deadline_s=11 * HOUR)
    spot = sum(market == "spot" for market, _ in course(played))
    assert spot <= 4
    assert float(played.cost_usd) <= 1.1 * 30


def test_without_a_deadline_it_waits_for_spot_but_not_for_ever() -> None:
    patient = play(place("a", (0, 0), (3, 1)), deadline_s=None)  # type: ignore[arg-type]
    assert course(patient) == [("spot", "a")]
    never = play(place("a", (0, 0)), deadline_s=None)  # type: ignore[arg-type]
    assert course(never) == [("on-demand", "a")]


def test_decisions_say_what_an_hour_is_worth() -> None:
    played = play(place("a", (0, 1)))
    assert "an hour of slack is worth $" in played.state.attempts[0].reason


zones = st.lists(
    st.lists(st.tuples(st.floats(0.001, 5.0), st.booleans()), min_size=1, max_size=12),
    min_size=1,
    max_size=3,
)


def places(drawn: list[list[tuple[float, bool]]]) -> list[Place]:
    """Zones from how long each of their states lasts, in hours."""
    found = []
    for number, spells in enumerate(drawn):
        at, steps = 0.0, []
        for hours, there in spells:
            steps.append((at, int(there)))
            at += hours
        found.append(place(f"zone-{number}", *steps, usd_h=1.0 + number / 10))
    return found


@given(
    drawn=zones,
    changeover_s=st.floats(1.0, 1800.0),
    slack=st.floats(0.0, 1.5),
    shows=st.booleans(),
    overlaps=st.booleans(),
    period_s=st.sampled_from([0.0, 900.0]),
    notice_s=st.sampled_from([0.0, 120.0]),
)
@settings(max_examples=100, deadline=None)
def test_the_deadline_holds_on_every_market_and_moves_are_bounded(
    *, drawn: list[list[tuple[float, bool]]], changeover_s: float, slack: float, shows: bool,
    overlaps: bool, notice_s: float, period_s: float,
) -> None:  # fmt: skip
    work_s = 6 * HOUR
    task = Task(
        work_s=work_s, deadline_s=work_s * (1 + slack) + 2.1 * changeover_s + period_s + 2,
        changeover_s=changeover_s, overlaps=overlaps, checkpoint_period_s=period_s, notice_s=notice_s,
    )  # fmt: skip
    world = World(places(drawn), shows=shows, first_hour_free=False)
    played = simulate(task, world, Spotfirst())
    assert not played.is_late
    assert played == simulate(task, world, Spotfirst())
    starts = [
        (a.launched.started_at - played.started_at).total_seconds()
        for a in played.state.attempts
        if a.launched
    ]
    lost = [
        (a.ended.ended_at - played.started_at).total_seconds()
        for a in played.state.attempts
        if a.ended and a.ended.cause == "interrupted"
    ]
    for begin in starts:  # no oscillation: what the market does not force happens seldom
        forced = sum(begin - HOUR < at <= begin for at in lost)
        within = sum(begin - HOUR < at <= begin for at in starts)
        assert within <= 2 * forced + max(4.0, 1.5 * HOUR / changeover_s)


POOLS = (PoolRates(1.0, 5.0, 2.0, 0.0), PoolRates(1.2, 8.0, 1.0, 0.0))


@given(slack=st.lists(st.floats(0, 5), min_size=2, max_size=8), spread=st.floats(0, 1.5))
def test_slack_is_worth_less_the_more_there_is_and_work_never_more_than_on_demand(
    slack: list[float], spread: float
) -> None:
    prices = [
        shadow_prices(
            POOLS, on_demand_usd_h=3.0, changeover_h=0.2, slack_per_work=each, spread=spread
        )
        for each in sorted(slack)
    ]
    assert all(a.slack >= b.slack for a, b in pairwise(prices))
    assert all(price.slack >= 0 for price in prices)
    assert all(1.0 <= price.work <= 3.0 + 1e-9 for price in prices)


@given(slack_h=st.lists(st.floats(0, 1e9), min_size=2, max_size=8))
def test_the_more_outages_the_slack_is_enough_for_the_more_they_even_out(
    slack_h: list[float],
) -> None:
    spreads = [spread_of(POOLS, each) for each in sorted(slack_h)]
    assert all(0 <= b <= a <= spread_of(POOLS, 0) for a, b in pairwise(spreads))
    assert spread_of(POOLS, 1.5) < spread_of(POOLS, 0)  # their mean outage


@pytest.mark.parametrize(("losses", "first"), [(0, "a"), (200, "b")])
def test_what_earlier_runs_saw_counts(losses: int, first: str) -> None:
    from spotfirst_airflow.policies import View, Work
    from spotfirst_airflow.simulation.engine import EPOCH

    market = (place("a", (0, 1), usd_h=1.0), place("b", (0, 1), usd_h=1.05))
    offers = tuple(o for p in market for o in p.offers(0.0, EPOCH, shows=False))
    rough = PoolHistory(pool=market[0].pool, up_s=100 * HOUR, losses=losses)
    calm = PoolHistory(pool=market[1].pool, up_s=100 * HOUR, losses=1)
    view = View(
        now=EPOCH, idle_since=EPOCH, offers=offers, deadline=EPOCH + timedelta(hours=14),
        work=Work(likely_s=10 * HOUR, most_s=10 * HOUR), changeover_s=720, history=(rough, calm),
    )  # fmt: skip
    decision = Spotfirst().decide(view)
    assert decision.offer is not None
    assert (decision.offer.market, decision.offer.pool.zone) == (Market.SPOT, first)
