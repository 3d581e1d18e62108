"""A simulated run: the same decisions and the same bill as a real one, on a market that is played."""

from __future__ import annotations

from decimal import Decimal

import pytest

from spotfirst.market import Market, Pool
from spotfirst_airflow.markets import Steps, ZoneState
from spotfirst_airflow.policies import Decision, Fallback, OnDemand, SpotOnly, View
from spotfirst_airflow.simulation import Place, Played, Task, World, simulate

HOUR = 3600.0


def place(zone: str, *steps: tuple[float, int], usd_h: float = 1.0, region: str = "") -> Place:
    """A place that has as many instances from each hour on."""
    states = [(at * HOUR, ZoneState(capacity=n, price_usd_h=usd_h)) for at, n in steps]
    pool = Pool(instance_type="gpu", zone=zone)
    return Place(pool, Steps(states), on_demand_usd_h=Decimal(3), region=region)


def where(played: Played) -> list[tuple[str, str]]:
    return [(str(a.market), a.pool.zone) for a in played.state.attempts if a.launched]


TASK = Task(work_s=10 * HOUR, deadline_s=20 * HOUR, changeover_s=HOUR)


def test_on_demand_costs_the_work_and_one_start() -> None:
    played = simulate(TASK, World([place("a", (0, 1))]), OnDemand())
    assert played.finished_s == 11 * HOUR
    assert played.cost_usd == 33
    assert not played.is_late


def test_spot_that_stays_is_one_attempt() -> None:
    played = simulate(TASK, World([place("a", (0, 1))]), SpotOnly())
    assert (played.finished_s, played.cost_usd) == (11 * HOUR, 11)


def test_an_interruption_costs_a_changeover_and_no_work() -> None:
    played = simulate(TASK, World([place("a", (0, 1), (5, 0), (6, 1))], shows=True), SpotOnly())
    assert played.finished_s == 13 * HOUR  # 4 h of work, an hour without, a start, 6 h of work
    assert played.cost_usd == 12
    assert played.state.attempts[0].ended is not None
    assert played.state.attempts[0].ended.cause == "interrupted"


def test_an_interruption_without_notice_loses_what_was_not_checkpointed() -> None:
    task = Task(work_s=10 * HOUR, deadline_s=None, changeover_s=HOUR, checkpoint_period_s=3 * HOUR)
    played = simulate(task, World([place("a", (0, 1), (5, 0), (6, 1))], shows=True), SpotOnly())
    assert played.finished_s == 14 * HOUR  # of 4 h of work one is done again


def test_a_notice_starts_the_replacement_while_the_old_instance_trains() -> None:
    task = Task(work_s=10 * HOUR, deadline_s=20 * HOUR, changeover_s=HOUR, notice_s=2 * HOUR)
    world = World([place("a", (0, 1), (5, 0)), place("b", (0, 1), usd_h=1.5)], shows=True)
    played = simulate(task, world, Fallback())
    assert where(played) == [("spot", "a"), ("spot", "b")]
    assert played.finished_s == 11 * HOUR
    assert played.cost_usd == Decimal(6) + Decimal(9)  # both for the hour of the start


def test_a_move_without_overlap_ends_the_old_instance_at_once() -> None:
    class Moves:
        def decide(self, view: View) -> Decision:
            dear = next(o for o in view.offers if o.pool.zone == "b" and o.market is Market.SPOT)
            cheap = next(o for o in view.offers if o.pool.zone == "a" and o.market is Market.SPOT)
            if view.current is None:
                return Decision(reason="first", offer=cheap)
            moved = view.current.pool.zone == "b"
            return Decision(reason="stay") if moved else Decision(reason="move", offer=dear)

    world = World([place("a", (0, 1)), place("b", (0, 1), usd_h=2.0)])
    for overlaps, ends in ((True, 11), (False, 12)):
        task = Task(work_s=10 * HOUR, deadline_s=20 * HOUR, changeover_s=HOUR, overlaps=overlaps)
        assert simulate(task, world, Moves()).finished_s == ends * HOUR


def test_who_does_not_see_the_market_learns_by_trying() -> None:
    market = (place("a", (0, 0), (2, 1)), place("b", (0, 0), (1, 1), usd_h=2.0))
    seen = simulate(TASK, World(market, shows=True), SpotOnly())
    tried = simulate(TASK, World(market, shows=False), SpotOnly())
    assert all(a.launched for a in seen.state.attempts)
    assert any(a.not_launched for a in tried.state.attempts)
    assert where(seen) == where(tried) == [("spot", "b")]
    assert tried.bill.total_usd == seen.bill.total_usd


def test_bringing_the_checkpoint_to_another_region_is_paid() -> None:
    task = Task(
        work_s=10 * HOUR, deadline_s=40 * HOUR, changeover_s=HOUR, checkpoint_bytes=50 * 10**9
    )
    world = World(
        [place("a", (0, 1), (5, 0), region="x"), place("b", (0, 1), usd_h=2.0, region="y")],
        shows=True,
        egress_usd_gb=lambda here, there: Decimal("0.02"),
    )
    played = simulate(task, world, SpotOnly())
    assert where(played) == [("spot", "a"), ("spot", "b")]
    assert [charge.egress_usd for charge in played.bill.charges] == [0, 1]
    assert played.cost_usd == played.bill.total_usd == 5 + 2 * 7 + 1


@pytest.mark.parametrize(("free", "usd"), [(True, Decimal(11)), (False, Decimal("11.5"))])
def test_an_interruption_within_the_first_hour_is_free_where_it_is(
    free: bool, usd: Decimal
) -> None:
    world = World([place("a", (0, 1), (0.5, 0), (1, 1))], shows=True, first_hour_free=free)
    assert simulate(TASK, world, SpotOnly()).cost_usd == usd


def test_prices_are_those_of_the_launch_or_of_each_moment() -> None:
    states = [
        (0.0, ZoneState(capacity=1, price_usd_h=1.0)),
        (HOUR, ZoneState(capacity=1, price_usd_h=2.0)),
    ]
    there = Place(Pool(instance_type="gpu", zone="a"), Steps(states), on_demand_usd_h=Decimal(3))
    for frozen, usd in ((True, 11), (False, 21)):
        assert simulate(TASK, World([there], frozen_prices=frozen), SpotOnly()).cost_usd == usd


def test_a_run_that_cannot_be_done_in_time_is_stopped_at_its_deadline() -> None:
    played = simulate(TASK, World([place("a", (0, 0))]), SpotOnly())
    assert played.finished_s is None
    assert played.is_late
    assert played.cost_usd == 0
