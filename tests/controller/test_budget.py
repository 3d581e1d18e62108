"""The budget: people are told once, nothing is begun in vain, and the cap holds."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.errors import InvalidSpec, LaunchRejected
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
from spotfirst_airflow.submission import request_stop
from tests.controller.world import GUARD_S, START, FakeFleet, Faults
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


@settings(max_examples=25, deadline=None)
@given(
    budget=st.decimals("0.004", "0.05", places=3),
    on_budget=st.sampled_from(["stop", "continue_cheaper", "alert"]),
    policy=st.sampled_from(["fallback", "spotfirst", "on_demand"]),
    deadline_s=st.none() | st.integers(60, 400),
    interrupted_at=st.lists(st.integers(1, 200), max_size=3),
    seed=st.integers(0, 2**32),
    rate=st.sampled_from([0.0, 0.1]),
)
@example(  # instances are taken at their launch, and most looks of the controller fail
    budget=Decimal("0.030"), on_budget="stop", policy="on_demand", deadline_s=None,
    interrupted_at=[1, 1], seed=0, rate=0.1,
)  # fmt: skip
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


POLICIES = ["fallback", "spotfirst", "on_demand", "spot_only", "greedy", "uniform_progress"]
seconds = st.integers(0, 400)
prices = st.sampled_from(["0.05", "0.30", "1.50", "4.00"]).map(Decimal)
happenings = st.one_of(
    st.tuples(st.just("taken"), st.booleans()),
    st.tuples(st.just("spot"), st.booleans()),
    st.tuples(st.just("on demand"), st.booleans()),
    st.tuples(st.just("price"), prices),
    st.tuples(st.just("refused"), st.sampled_from(Market)),
)


def happen(run: Run, what: str, value: Any) -> None:
    if what == "taken" and run.alive():
        run.interrupt(run.alive()[-1], notice=value)
    elif what == "spot":
        run.capacity = dict.fromkeys(run.capacity, value)
    elif what == "on demand":
        run.on_demand = value
    elif what == "price":
        run.spot_usd_h = value
    elif what == "refused":
        run.refuses = {value: LaunchRejected("you may not")}


@settings(max_examples=25, deadline=None)
@given(
    budget=st.decimals("0.001", "0.12", places=3),
    on_budget=st.sampled_from(["stop", "continue_cheaper"]),
    policy=st.sampled_from(POLICIES),
    deadline_s=st.none() | st.integers(60, 600),
    checkpoint_s=st.sampled_from([0, 1, 30]),
    notice_s=st.sampled_from([0.0, 120.0, 900.0]),
    away=st.none() | st.tuples(seconds, st.sampled_from([40, 200, 1000])),
    later=st.lists(st.tuples(seconds, happenings), max_size=6),
    seed=st.integers(0, 2**32),
    rate=st.sampled_from([0.0, 0.03, 0.1]),
)
@example(  # a drained instance that would be free once it is taken, and nobody there to look
    budget=Decimal("0.020"), on_budget="stop", policy="spot_only", deadline_s=None, checkpoint_s=0,
    notice_s=600.0, away=(160, 200), later=[(105, ("taken", True))], seed=0, rate=0.0,
)  # fmt: skip
@example(  # at the deadline another one, dear, waits to be taken
    budget=Decimal("0.120"), on_budget="stop", policy="spot_only", deadline_s=209, checkpoint_s=0,
    notice_s=900.0, away=None, seed=0, rate=0.0,
    later=[(0, ("price", Decimal("4.00"))), (45, ("taken", True))],
)  # fmt: skip
def test_every_run_ends_with_a_reason_and_within_its_budget(
    *, budget: Decimal, on_budget: str, policy: str, deadline_s: int | None, checkpoint_s: int,
    notice_s: float, away: tuple[int, int] | None, later: list[tuple[int, tuple[str, Any]]],
    seed: int, rate: float,
) -> None:  # fmt: skip
    run = Run(
        total_steps=250, policy=policy, budget_usd=budget, on_budget=on_budget,
        deadline=START + timedelta(seconds=deadline_s) if deadline_s else None,
        faults=Faults(seed, lost=rate, refused=rate, died=rate),
    )  # fmt: skip
    run.checkpoint_s, run.notice_s = checkpoint_s, notice_s
    gone_s, back_s = (away[0], sum(away)) if away else (0, 0)
    usd_h = Decimal(0)  # of what runs when the budget is spent
    for second in range(4000):
        for at_s, (what, value) in later:
            if at_s == second:
                happen(run, what, value)
        if second == 500:  # what passes has passed
            run.capacity, run.on_demand = dict.fromkeys(run.capacity, True), True
            run.faults.armed = False
        if not gone_s <= second < back_s:
            step = run.reconcile()
            if step is not None and step.done:
                break
        run.tick()
        if bill(run.run.journal().refresh(), now=run.now).total_usd <= budget:
            usd_h = sum((machine.price_usd_h for machine in run.alive()), Decimal(0))
    state = run.run.journal().refresh()
    assert state.is_final, state.waiting
    if state.phase is Phase.STOPPED:
        assert state.stop is not None
        assert state.stop.reason
    # The first checkpoint takes as long as nobody knew; then the guard ends what does not end.
    end_s = 5 if not checkpoint_s else checkpoint_s + GUARD_S + 2 * SHUTDOWN_S
    assert bill(state, now=run.now).total_usd <= budget + usd_h * Decimal(repr(end_s)) / 3600


def test_going_on_cheaper_ends_where_the_policy_stays_on_demand() -> None:
    run = Run(
        total_steps=3000, policy="on_demand", budget_usd=Decimal("0.40"),
        on_budget="continue_cheaper",
    )  # fmt: skip
    while bill(run.run.journal().refresh(), now=run.now).total_usd < Decimal("0.36"):
        run.reconcile()
        run.tick()
    run.interrupt(run.trainer(), notice=False)
    state = run.until_done().state
    assert state.stop is not None
    assert state.stop.cause == "budget"
    assert "for spot alone" in state.stop.reason


def on_demand_until(spent_usd: Decimal) -> Run:
    """A run without spot capacity that may go on cheaper, once it has spent so much."""
    run = Run(
        total_steps=3000, policy=Fallback(no_capacity_s=0.0, return_after_s=1e6),
        budget_usd=Decimal("0.40"), on_budget="continue_cheaper",
    )  # fmt: skip
    run.capacity = dict.fromkeys(run.capacity, False)
    while bill(run.run.journal().refresh(), now=run.now).total_usd < spent_usd:
        run.reconcile()
        run.tick()
    return run


def test_going_on_cheaper_ends_when_spot_has_become_too_dear() -> None:
    run = on_demand_until(Decimal("0.36"))
    run.spot_usd_h = Decimal("40.00")
    run.interrupt(run.trainer(), notice=False)
    state = run.until_done().state
    assert state.stop is not None
    assert "too little to start an instance (spot, $40.00/h" in state.stop.reason


def test_what_is_refused_for_good_and_what_is_too_dear_end_the_run_together() -> None:
    run = Run(policy="fallback", budget_usd=Decimal("0.02"))
    run.spot_usd_h = Decimal("4.00")
    run.refuses = {Market.ON_DEMAND: LaunchRejected("you may not")}
    state = run.until_done().state
    assert state.failure is not None
    assert "you may not; and what is left of the budget" in state.failure.message


def test_a_launch_decided_long_ago_is_repeated_only_while_the_budget_pays_for_it() -> None:
    run = Run(total_steps=3000, policy="fallback", budget_usd=Decimal("0.30"))
    while not any(machine.phase == "training" for machine in run.alive()):
        run.reconcile()
        run.tick()
    journal = run.run.journal()
    journal.refresh()
    journal.append(  # whoever decided it has died, and all is spent but what ends this one
        e.Launching(
            at=run.now, attempt=2, token="t-2", market=Market.ON_DEMAND,
            pool=journal.state.attempts[0].pool, reason="a move", price_usd_h=Decimal("1.00"),
        )
    )  # fmt: skip
    while bill(journal.state, now=run.now).total_usd < Decimal("0.285"):
        run.tick()
    run.reconcile()
    second = run.run.journal().refresh().attempt(2)
    assert second.launched is None
    assert second.not_launched is not None
    assert second.not_launched.cause == "withdrawn"
    assert len(run.machines) == 1


@pytest.mark.parametrize(("budget", "is_free"), [("0.05", True), ("0.017", False)])
def test_an_instance_is_left_to_the_fleet_only_while_the_budget_would_pay_for_it(
    budget: str, is_free: bool
) -> None:
    run = Run(total_steps=3000, policy="spot_only", budget_usd=Decimal(budget))
    while run.trainer_step() < 50:
        run.reconcile()
        run.tick()
    run.interrupt(run.trainer())
    run.capacity = dict.fromkeys(run.capacity, False)
    request_stop(run.run, reason="enough", clock=run.clock)
    state = run.until_done().state
    (attempt,) = state.attempts
    assert attempt.ended is not None
    assert attempt.ended.by_fleet is is_free
    spent_usd = bill(state, now=run.now).total_usd
    assert spent_usd == 0 if is_free else 0 < spent_usd < Decimal(budget)


def test_what_a_checkpoint_took_is_known_to_the_next_attempt() -> None:
    run = Run(total_steps=3000, policy="on_demand", budget_usd=Decimal("0.30"), checkpoint_every=60)
    run.checkpoint_s = 60
    while run.trainer_step() < 70:
        run.reconcile()
        run.tick()
    run.interrupt(run.trainer(), notice=False)
    state = run.until_done().state
    assert state.checkpoint_s == 60
    assert state.attempts[-1].ended is not None
    assert state.attempts[-1].ended.checkpoint_step == state.attempts[-1].ended.step
    assert bill(state, now=run.now).total_usd <= Decimal("0.30")


@pytest.mark.parametrize(("amended", "attempts"), [("0.04", 1), ("0.20", 2)])
def test_another_budget_counts_from_the_first_look_on(amended: str, attempts: int) -> None:
    run = Run(total_steps=3000, policy="on_demand", budget_usd=Decimal("0.05"))
    before = run.until_done().state
    assert before.phase is Phase.STOPPED
    changed = msgspec.structs.replace(run.spec, budget_usd=Decimal(amended))
    number = run.run.amend(changed)
    run.run.journal().decide(lambda _: e.Reopened(at=run.now, owner="x", amendment=number))
    state = run.until_done().state
    assert state.stop is not None
    assert state.stop.cause == "budget"
    assert len(state.attempts) == attempts
    assert bill(state, now=run.now).total_usd <= max(Decimal("0.05"), Decimal(amended))


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
    run = on_demand_until(Decimal("0.03"))
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
