"""Greedy and Uniform Progress decide as published, and never miss a deadline."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.market import Pool
from spotfirst_airflow.markets import Steps, ZoneState
from spotfirst_airflow.policies import Greedy, Policy, UniformProgress
from spotfirst_airflow.simulation import Place, Played, Task, World, simulate

HOUR = 3600.0
TASK = Task(work_s=10 * HOUR, deadline_s=20 * HOUR, changeover_s=HOUR, overlaps=False)


def place(zone: str, *steps: tuple[float, int], usd_h: float = 1.0) -> Place:
    """A zone that has as many spot instances from each hour on."""
    states = [(at * HOUR, ZoneState(capacity=n, price_usd_h=usd_h)) for at, n in steps]
    return Place(
        Pool(instance_type="gpu", zone=zone), Steps(states), on_demand_usd_h=Decimal(3), region=zone
    )


def play(policy: Policy, *places: Place, task: Task = TASK, shows: bool = True) -> Played:
    return simulate(task, World(places, shows=shows, first_hour_free=False), policy)


def course(played: Played) -> list[tuple[str, str, float]]:
    """Where instances were, and from which hour on."""
    return [
        (str(a.market), a.pool.zone, (a.launched.started_at - played.started_at).total_seconds() / HOUR)
        for a in played.state.attempts
        if a.launched
    ]  # fmt: skip


def test_greedy_waits_for_spot_until_the_work_and_two_changeovers_just_fit() -> None:
    played = play(Greedy(), place("a", (0, 0)))
    assert course(played) == [("on-demand", "a", 8.0)]
    assert played.finished_s == 19 * HOUR


def test_greedy_stays_on_demand_once_the_deadline_is_near() -> None:
    played = play(Greedy(), place("a", (0, 0), (9, 1)))
    assert course(played) == [("on-demand", "a", 8.0)]


def test_uniform_progress_goes_on_demand_as_soon_as_it_is_behind() -> None:
    # Spot until 4 h: 3 h are done, which are expected at 6 h.
    played = play(UniformProgress(), place("a", (0, 1), (4, 0)))
    assert course(played)[:2] == [("spot", "a", 0.0), ("on-demand", "a", 6.0)]


def test_uniform_progress_returns_to_spot_two_changeovers_ahead() -> None:
    # On demand from 0 h on: t - 1 h are done, and (t + 2 h) / 2 expected two hours later.
    played = play(UniformProgress(), place("a", (0, 0), (2, 1)))
    assert course(played) == [("on-demand", "a", 0.0), ("spot", "a", 4.0)]


def test_uniform_progress_takes_the_cheapest_pool_and_last_the_one_that_it_lost() -> None:
    a, b = place("a", (0, 1), (4, 0)), place("b", (0, 1), usd_h=1.5)
    assert course(play(UniformProgress(), a, b)) == [("spot", "a", 0.0), ("spot", "b", 4.0)]


@pytest.mark.parametrize("policy", [Greedy(), UniformProgress()])
def test_they_stay_on_spot_while_it_lasts(policy: Policy) -> None:
    cheaper_later = place("b", (0, 0), (2, 1), usd_h=0.1)
    assert course(play(policy, place("a", (0, 1)), cheaper_later)) == [("spot", "a", 0.0)]


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


@pytest.mark.parametrize("policy", [Greedy(), UniformProgress()])
@given(
    drawn=zones,
    changeover_s=st.floats(0.0, 1800.0),
    slack=st.floats(0.0, 1.5),
    shows=st.booleans(),
    overlaps=st.booleans(),
    period_s=st.sampled_from([0.0, 900.0]),
)
def test_the_deadline_holds_on_every_market(
    policy: Policy,
    *,
    drawn: list[list[tuple[float, bool]]],
    changeover_s: float,
    slack: float,
    shows: bool,
    overlaps: bool,
    period_s: float,
) -> None:
    """Also where two changeovers are shorter than a tick: decisions do not wait for the market's."""
    work_s = 6 * HOUR
    task = Task(
        work_s=work_s, deadline_s=work_s * (1 + slack) + 2 * changeover_s + period_s + 2,
        changeover_s=changeover_s, overlaps=overlaps, checkpoint_period_s=period_s,
    )  # fmt: skip
    played = play(policy, *places(drawn), task=task, shows=shows)
    assert not played.is_late
    assert played.finished_s is not None
