"""The budget: people are told once, nothing is begun in vain, and the cap holds."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.errors import InvalidSpec
from spotfirst.market import Market
from spotfirst.state import Phase
from spotfirst_airflow.asking import same_kind
from spotfirst_airflow.budget import SHUTDOWN_S, Budget
from spotfirst_airflow.costs import bill
from spotfirst_airflow.fleets import Instance, LaunchRequest
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
from tests.controller.world import START, FakeFleet, Faults
from tests.controller.world import World as Run
from tests.policies.test_spotfirst import places, zones

HOUR = 3600.0


def told_percent(run: Run) -> list[str]:
    told = [line for line in run.news if "of the budget" in line and "WARNING" in line]
    return [line.split()[1] for line in told]


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        # It stops while what a stop takes still fits: the smaller the budget, the sooner.
        ("0.02", ["70"]),
        ("0.30", ["70", "90"]),
    ],
)
def test_people_are_told_once_and_only_of_what_is_spent(budget: str, told: list[str]) -> None:
    run = Run(total_steps=3000, policy="on_demand", budget_usd=Decimal(budget))
    state = run.until_done().state
    assert told_percent(run) == told
    assert state.stop is not None
    assert state.stop.cause == "budget"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    budget=st.decimals("0.004", "0.05", places=3),
    on_budget=st.sampled_from(["stop", "continue_cheaper", "alert"]),
    policy=st.sampled_from(["fallback", "spotfirst", "on_demand"]),
    deadline_s=st.none() | st.integers(60, 400),
    interrupted_at=st.lists(st.integers(1, 200), max_size=3),
    seed=st.integers(0, 2**32),
    rate=st.sampled_from([0.0, 0.1]),
)
def test_a_warning_is_true_and_a_pass_that_stops_a_run_launches_nothing(
    *, budget: Decimal, on_budget: str, policy: str, deadline_s: int | None,
    interrupted_at: list[int], seed: int, rate: float,
) -> None:  # fmt: skip
    run = Run(
        total_steps=250, policy=policy, budget_usd=budget, on_budget=on_budget,
        deadline=START + timedelta(seconds=deadline_s) if deadline_s else None,
        faults=Faults(seed, lost=rate, refused=rate, died=rate),
    )  # fmt: skip
    journal = run.run.journal()
    journal.refresh()
    asked: list[str] = []
    launch = FakeFleet.launch

    def counted(fleet: FakeFleet, request: LaunchRequest) -> Instance:
        asked.append(request.token)
        return launch(fleet, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeFleet, "launch", counted)
        for second in range(3000):
            before = len(journal.events)
            asked.clear()
            step = run.reconcile()
            journal.refresh()
            fresh = journal.events[before:]
            spent = bill(journal.state, now=run.now).total_usd
            for event in fresh:
                if isinstance(event, e.Warned) and "of the budget" in event.message:
                    assert spent * 100 >= budget * int(event.message.split()[0])
            stops = [event for event in fresh if isinstance(event, (e.StopRequested, e.Failed))]
            if stops or journal.state.phase is not Phase.ACTIVE:
                assert asked == []
                assert not any(isinstance(event, e.Launching) for event in fresh)
            if step is not None and step.done:
                break
            if second in interrupted_at and run.alive():
                run.interrupt(run.alive()[-1], notice=second % 2 == 0)
            run.tick()
    run.faults.armed = False
    state = run.until_done().state
    if state.stop is not None and state.stop.cause == "budget":
        assert bill(state, now=run.now).total_usd <= budget + Decimal("0.003")


def test_the_budget_holds_when_launches_are_lost_and_instances_are_taken_at_once() -> None:
    # 0.0372 is spent of 0.030; what may be added is one checkpoint and shutdown, 0.003.
    check = test_a_warning_is_true_and_a_pass_that_stops_a_run_launches_nothing
    check.hypothesis.inner_test(  # type: ignore[attr-defined]
        budget=Decimal("0.030"), on_budget="stop", policy="on_demand", deadline_s=None,
        interrupted_at=[1, 1], seed=0, rate=0.1,
    )  # fmt: skip


def test_a_budget_that_buys_only_what_the_policy_does_not_use_stops_the_run() -> None:
    run = Run(total_steps=250, policy="on_demand", budget_usd=Decimal("0.006"), on_budget="stop")
    state = run.until_done().state
    assert state.phase is Phase.STOPPED
    assert state.attempts == ()
    assert state.stop is not None
    assert state.stop.cause == "budget"


@pytest.mark.parametrize("on_budget", ["stop", "continue_cheaper"])
@pytest.mark.parametrize("late_s", [0, 60, 400])
def test_a_controller_that_comes_late_stops_what_went_on(on_budget: str, late_s: int) -> None:
    run = Run(total_steps=3000, policy="on_demand", budget_usd=Decimal("0.05"), on_budget=on_budget)
    while not any(machine.phase == "training" for machine in run.alive()):
        run.reconcile()
        run.tick()
    run.tick(120 + late_s)
    run.controllers = [run.new_controller()]
    state = run.until_done().state
    assert state.phase is Phase.STOPPED
    assert len(state.attempts) == 1, "nothing is launched any more"
    assert state.attempts[0].ended is not None
    assert state.attempts[0].ended.step == state.attempts[0].ended.checkpoint_step


def test_with_alert_the_run_goes_on_past_its_budget() -> None:
    run = Run(total_steps=300, policy="on_demand", budget_usd=Decimal("0.03"), on_budget="alert")
    state = run.until_done().state
    assert state.phase is Phase.SUCCEEDED
    assert bill(state, now=run.now).total_usd > Decimal("0.03")
    assert sum("of the budget" in warning for warning in state.warnings) == 3


def test_from_90_percent_on_it_goes_on_cheaper_on_spot_alone() -> None:
    run = Run(
        total_steps=3000, policy=Fallback(no_capacity_s=0.0, return_after_s=1e6),
        budget_usd=Decimal("0.40"), on_budget="continue_cheaper",
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
    assert bill(state, now=run.now).total_usd < Decimal("0.40")


def test_a_move_is_begun_only_when_the_budget_pays_both_instances_meanwhile() -> None:
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
    # A minute of on demand until the new one is there is more than the tenth that is left.
    assert [attempt.market for attempt in state.attempts if attempt.launched] == [Market.ON_DEMAND]
    assert state.stop is not None
    assert state.stop.cause == "budget"


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
