"""The period follows from the cost of a checkpoint and from how often the pool is interrupted."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spotfirst.checkpoints.period import choose_period, optimal_period_s, overhead_share

COSTS = st.floats(0, 1e4)
MEANS = st.floats(1, 1e7)
LIMITS = st.floats(0, 1e5)
WAYS = st.floats(0, 1e5)


def exact_overhead(period_s: float, cost_s: float, mean_s: float) -> float:
    """Daly's complete model of exponential failures, without a restart time."""
    trained_s = period_s - cost_s
    return mean_s * math.expm1(period_s / mean_s) / trained_s - 1


@pytest.mark.parametrize("share", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3])
def test_the_optimum_is_that_of_the_complete_model(share: float) -> None:
    mean_s = 3600.0
    cost_s = share * mean_s
    chosen_s = optimal_period_s(cost_s, mean_s)
    best = min(
        exact_overhead(chosen_s * (0.5 + step / 100), cost_s, mean_s)
        for step in range(101)
        if chosen_s * (0.5 + step / 100) > cost_s
    )
    assert exact_overhead(chosen_s, cost_s, mean_s) <= 1.01 * best


def test_half_a_second_and_an_hour_give_a_minute() -> None:
    assert optimal_period_s(0.5, 3600) == pytest.approx(60.2, abs=0.1)  # sqrt(3600) + 1/6


@pytest.mark.parametrize(("cost_s", "mean_s", "period_s"), [(0.5, 3600, 60), (2, 3600, 300)])
def test_a_simulated_training_loses_what_the_formula_says(
    cost_s: float, mean_s: float, period_s: float
) -> None:
    draw = random.Random(3)
    wall_s = trained_s = 0.0
    for _ in range(20_000):
        life_s = draw.expovariate(1 / mean_s)
        wall_s += life_s
        trained_s += life_s // period_s * (period_s - cost_s)
    lost = 1 - trained_s / wall_s
    assert lost == pytest.approx(overhead_share(period_s, cost_s, mean_s), rel=0.05)


def test_at_an_hour_between_interruptions_a_fast_checkpoint_costs_half_a_percent_at_most() -> None:
    """The share is sqrt(2C/M) there: 0.045 s are allowed."""
    period = choose_period(300, cost_s=0.044, durable_s=0.6, interruption_mean_s=3600)
    assert overhead_share(period.period_s, 0.044, 3600) <= 0.005
    assert period.reason == "Young/Daly"


# -- bounds ---------------------------------------------------------------------------------


@given(limit_s=LIMITS, cost_s=st.none() | COSTS, way_s=st.none() | WAYS, mean_s=st.none() | MEANS)
def test_a_kill_never_loses_more_than_the_limit_if_the_storage_can_keep_it(
    limit_s: float, cost_s: float | None, way_s: float | None, mean_s: float | None
) -> None:
    period = choose_period(limit_s, cost_s=cost_s, durable_s=way_s, interruption_mean_s=mean_s)
    assert period.period_s >= (way_s or 0.0)  # one save at a time
    at_stake_s = period.period_s + (way_s or 0.0)
    assert at_stake_s <= max(limit_s, 2 * (way_s or 0.0)) * (1 + 1e-9)


@given(limit_s=LIMITS, way_s=WAYS, mean_s=MEANS, costs=st.tuples(COSTS, COSTS))
def test_the_dearer_a_checkpoint_the_longer_the_period(
    limit_s: float, way_s: float, mean_s: float, costs: tuple[float, float]
) -> None:
    cheap, dear = (
        choose_period(limit_s, cost_s=cost_s, durable_s=way_s, interruption_mean_s=mean_s)
        for cost_s in sorted(costs)
    )
    assert cheap.period_s <= dear.period_s


@given(limit_s=LIMITS, way_s=WAYS, cost_s=COSTS, means=st.tuples(MEANS, MEANS))
def test_the_calmer_a_pool_the_longer_the_period(
    limit_s: float, way_s: float, cost_s: float, means: tuple[float, float]
) -> None:
    wild, calm = (
        choose_period(limit_s, cost_s=cost_s, durable_s=way_s, interruption_mean_s=mean_s)
        for mean_s in sorted(means)
    )
    assert wild.period_s <= calm.period_s
    unknown = choose_period(limit_s, cost_s=cost_s, durable_s=way_s)
    assert calm.period_s <= unknown.period_s


@given(limit_s=LIMITS, way_s=WAYS, cost_s=COSTS, mean_s=MEANS)
def test_every_period_has_a_reason_and_its_numbers(
    limit_s: float, way_s: float, cost_s: float, mean_s: float
) -> None:
    period = choose_period(limit_s, cost_s=cost_s, durable_s=way_s, interruption_mean_s=mean_s)
    assert period.reason
    assert f"cost {cost_s:.3g} s" in str(period)
    assert f"mean time between interruptions {mean_s:.3g} s" in str(period)


def test_a_checkpoint_that_costs_nothing_is_not_taken_all_the_time() -> None:
    period = choose_period(300, cost_s=0.0, durable_s=0.0, interruption_mean_s=3600)
    assert period.period_s == 7.2  # of which half is lost each hour: 0.1 %
    assert choose_period(300, cost_s=0.0, interruption_mean_s=20).period_s == 1.0


def test_the_first_checkpoint_comes_early_where_interruptions_do() -> None:
    first = choose_period(300, interruption_mean_s=3600)
    assert 80 < first.period_s < 90
    assert "until it is measured" in first.reason


def test_without_a_rate_the_limit_decides() -> None:
    assert choose_period(300).period_s == 300
    assert choose_period(300, cost_s=0.1, durable_s=10).period_s == 290


def test_a_slow_storage_gets_one_checkpoint_after_the_other_and_the_reason_says_what_is_lost() -> (
    None
):
    period = choose_period(300, cost_s=1, durable_s=400, interruption_mean_s=3600)
    assert period.period_s == 400
    assert "can lose 800 s, more than the limit of 300 s" in period.reason


@given(a=st.floats(0.1, 1e5), b=st.floats(0.1, 1e5))
def test_only_a_quarter_more_or_less_is_news(a: float, b: float) -> None:
    assume(abs(abs(b / a - 1) - 0.25) > 1e-6)
    told, new = choose_period(a), choose_period(b)
    assert new.differs(told) == (abs(b / a - 1) > 0.25)
    assert new.differs(None)
