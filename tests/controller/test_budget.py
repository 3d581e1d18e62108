"""The budget: people are told once, nothing is begun in vain, and the cap holds."""

from __future__ import annotations

from decimal import Decimal

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spotfirst.errors import InvalidSpec
from spotfirst.market import Market
from spotfirst.state import Phase
from spotfirst_airflow.asking import same_kind
from spotfirst_airflow.budget import SHUTDOWN_S, Budget
from spotfirst_airflow.costs import bill
from spotfirst_airflow.policies import (
    Decision,
    Fallback,
    Policy,
    SpotOnly,
    View,
    in_words,
    load_policy,
)
from spotfirst_airflow.policies.spotfirst import Spotfirst
from spotfirst_airflow.simulation import Played, Task, World, simulate
from tests.controller.world import World as Run
from tests.policies.test_spotfirst import places, zones

HOUR = 3600.0


def test_people_are_told_once_at_70_90_and_100_percent() -> None:
    run = Run(total_steps=3000, policy="on_demand", budget_usd=Decimal("0.03"))
    run.until_done()
    told = [line for line in run.news if "of the budget" in line and "WARNING" in line]
    assert [line.split()[1] for line in told] == ["70", "90", "100"]


def test_with_alert_the_run_goes_on_past_its_budget() -> None:
    run = Run(total_steps=300, policy="on_demand", budget_usd=Decimal("0.03"), on_budget="alert")
    state = run.until_done().state
    assert state.phase is Phase.SUCCEEDED
    assert bill(state, now=run.now).total_usd > Decimal("0.03")
    assert sum("of the budget" in warning for warning in state.warnings) == 3


def test_from_90_percent_on_it_goes_on_cheaper_on_spot_alone() -> None:
    run = Run(
        total_steps=3000, policy=Fallback(no_capacity_s=0.0, return_after_s=1e6),
        budget_usd=Decimal("0.06"), on_budget="continue_cheaper",
    )  # fmt: skip
    run.capacity = dict.fromkeys(run.capacity, False)
    while bill(run.run.journal().refresh(), now=run.now).total_usd < Decimal("0.03"):
        run.reconcile()
        run.tick()
    run.capacity = dict.fromkeys(run.capacity, True)
    state = run.until_done().state
    markets = [attempt.market for attempt in state.attempts if attempt.launched]
    assert markets[0] is Market.ON_DEMAND
    assert markets[-1] is Market.SPOT
    assert "the budget asks to go on cheaper" in state.attempts[-1].reason
    assert bill(state, now=run.now).total_usd < Decimal("0.06")


def test_what_to_do_about_a_budget_needs_one() -> None:
    with pytest.raises(InvalidSpec, match="needs budget_usd"):
        Run(on_budget="alert")


def test_a_policy_may_stop_the_run() -> None:
    class Stops:
        def decide(self, view: View) -> Decision:
            return Decision(reason="enough is enough", stop=True)

    run = Run(policy=Stops())
    state = run.until_done().state
    assert state.phase is Phase.STOPPED
    assert state.stop is not None
    assert (state.stop.cause, state.stop.reason) == ("policy", "enough is enough")


def test_a_reason_in_which_only_a_number_changes_is_told_once() -> None:
    assert same_kind("waiting: an hour is worth $0.12", "waiting: an hour is worth $1.3")
    assert not same_kind("no spot capacity", "no on-demand capacity")


# -- the cap, on any market ---------------------------------------------------------------------


@given(
    drawn=zones,
    budget=st.decimals("0.05", "30", places=2),
    on_budget=st.sampled_from(["stop", "continue_cheaper"]),
    changeover_s=st.floats(5.0, 1800.0),
    notice_s=st.sampled_from([0.0, 120.0]),
    policy=st.sampled_from([Spotfirst(), Fallback(), SpotOnly()]),
)
@example(  # the budget runs out while a replacement starts
    drawn=[[(0.5, True), (1.5, False), (1.0, True)]],
    budget=Decimal("4.26"),
    on_budget="stop",
    changeover_s=600.0,
    notice_s=0.0,
    policy=Fallback(),
)
@settings(max_examples=150, deadline=None)
def test_spending_never_passes_the_cap_by_more_than_one_checkpoint_and_shutdown(
    *, drawn: list[list[tuple[float, bool]]], budget: Decimal, on_budget: str, changeover_s: float,
    notice_s: float, policy: Policy,
) -> None:  # fmt: skip
    task = Task(
        work_s=6 * HOUR, deadline_s=30 * HOUR, changeover_s=changeover_s, notice_s=notice_s,
        budget=Budget(usd=budget, on_budget=on_budget),  # type: ignore[arg-type]
    )  # fmt: skip
    played: Played = simulate(task, World(places(drawn)), policy)
    end_usd = 2 * Decimal(3) * Decimal(SHUTDOWN_S) / 3600  # two instances during a changeover
    assert played.bill.total_usd <= budget + end_usd
    if played.finished_s is None and not played.is_late:
        assert played.state.stop is not None
        assert played.state.stop.cause == "budget"


# -- policies in words --------------------------------------------------------------------------


class Mine(msgspec.Struct, frozen=True):
    """A policy of a user's own."""

    patience_s: float = 60.0

    def decide(self, view: View) -> Decision:
        return Decision(reason="mine")


def test_a_policy_crosses_as_the_name_of_its_class_and_its_options() -> None:
    assert in_words("greedy", {"retry_s": 5}) == ("greedy", {"retry_s": 5})
    name, options = in_words(Fallback(losses=7), {})
    assert name == "spotfirst_airflow.policies.fallback:Fallback"
    assert load_policy(name, options) == Fallback(losses=7)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:Policy", "cannot be imported"),
        ("decimal:Decimal", "no msgspec.Struct"),
        ("__main__:Policy", "nobody else can import"),
        ("surely_not", "MODULE:CLASS"),
    ],
)
def test_a_policy_that_cannot_be_made_says_why(name: str, words: str) -> None:
    with pytest.raises(InvalidSpec, match=words):
        load_policy(name, {})


def test_a_policy_of_a_dag_file_is_refused_with_what_to_do() -> None:
    class Local(Mine, frozen=True):
        pass

    with pytest.raises(InvalidSpec, match="plugins folder"):
        in_words(Local(), {})
    with pytest.raises(InvalidSpec, match="brings its own"):
        in_words(Fallback(), {"losses": 2})
