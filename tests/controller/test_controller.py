"""What the controller promises, on a stepped clock."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable, LaunchRejected
from spotfirst.events import EndCause
from spotfirst.market import Market
from spotfirst.state import Phase
from spotfirst_airflow.costs import bill
from spotfirst_airflow.fleets import Instance, LaunchRequest
from spotfirst_airflow.submission import request_stop
from tests.controller.world import START, Died, FakeFleet, Faults, World


def test_a_calm_run_takes_one_spot_attempt_and_leaves_nothing_behind() -> None:
    world = World()
    state = world.until_done().state
    assert state.phase is Phase.SUCCEEDED
    assert [a.market for a in state.attempts] == [Market.SPOT]
    assert state.result is not None
    assert state.result.step == 60
    assert world.alive() == []


def test_a_notice_starts_the_replacement_at_once_and_loses_no_step() -> None:
    world = World()
    while not (world.alive() and world.trainer_step() >= 25):
        world.reconcile()
        world.tick()
    first = world.trainer()
    world.interrupt(first)
    world.reconcile()
    world.reconcile()
    assert len(world.alive()) == 2, "the replacement starts before the old instance dies"
    state = world.until_done().state
    assert state.phase is Phase.SUCCEEDED
    first_end, second_end = state.attempts[0].ended, state.attempts[1].ended
    assert first_end is not None
    assert second_end is not None
    assert first_end.cause == "interrupted"
    assert first_end.step == first_end.checkpoint_step == second_end.start_step
    assert bill(state, now=world.now).lost_steps == 0


def test_a_kill_without_notice_loses_at_most_one_checkpoint_period() -> None:
    world = World()
    while not (world.alive() and world.trainer_step() >= 27):
        world.reconcile()
        world.tick()
    world.interrupt(world.trainer(), notice=False)
    state = world.until_done().state
    assert state.phase is Phase.SUCCEEDED
    assert state.attempts[0].ended is not None
    assert state.attempts[0].ended.cause == "interrupted"
    assert 0 < bill(state, now=world.now).lost_steps <= world.checkpoint_every


def test_an_interrupted_instance_in_its_first_hour_is_left_to_the_fleet_and_is_free() -> None:
    world = World(total_steps=400)
    while not (world.alive() and world.trainer_step() >= 25):
        world.reconcile()
        world.tick()
    world.interrupt(world.trainer())
    state = world.until_done().state
    charges = bill(state, now=world.now).charges
    assert charges[0].cost_usd == 0
    assert charges[0].rule.startswith("free")
    assert bill(state, now=world.now).total_usd == world.truth_usd() > 0


def test_it_falls_back_to_on_demand_after_losses_and_returns_to_spot() -> None:
    world = World(
        total_steps=600,
        policy_options={"losses": 2, "loss_window_s": 200, "return_after_s": 60},
    )
    for _ in range(2):
        while not any(m.phase == "training" for m in world.alive()):
            world.reconcile()
            world.tick()
        world.interrupt(world.trainer(), notice=False)
        world.tick()
    state = world.until_done().state
    markets = [a.market for a in state.attempts]
    assert markets == [Market.SPOT, Market.SPOT, Market.ON_DEMAND, Market.SPOT]
    assert state.attempts[2].ended is not None
    assert state.attempts[2].ended.cause == "handed_over"
    assert bill(state, now=world.now).lost_steps <= 2 * world.checkpoint_every


def test_without_any_capacity_it_waits_and_says_why() -> None:
    world = World(policy="spot_only")
    world.capacity = dict.fromkeys(world.capacity, False)
    for _ in range(30):
        world.reconcile()
        world.tick()
    assert world.machines == {}
    assert len([line for line in world.news if line.startswith("waiting")]) == 1
    world.capacity["zone-b"] = True
    assert world.until_done().state.phase is Phase.SUCCEEDED


def test_the_deadline_takes_the_run_to_on_demand_in_time() -> None:
    world = World(total_steps=300, deadline=START + timedelta(seconds=600))
    world.capacity = dict.fromkeys(world.capacity, False)
    state = world.until_done().state
    assert state.phase is Phase.SUCCEEDED
    assert world.now <= START + timedelta(seconds=600)
    assert state.attempts[0].market is Market.ON_DEMAND


def test_a_budget_that_cannot_start_and_end_an_instance_begins_nothing() -> None:
    world = World(total_steps=3000, policy="on_demand", budget_usd=Decimal("0.005"))
    state = world.until_done().state
    assert state.attempts == ()
    assert state.stop is not None
    assert state.stop.cause == "budget"
    assert "too little to start an instance" in state.stop.reason


@pytest.mark.parametrize("budget", ["0.02", "0.025", "0.03"])
def test_the_budget_stops_the_run_checkpointed_before_its_cap(budget: str) -> None:
    world = World(total_steps=3000, policy="on_demand", budget_usd=Decimal(budget))
    state = world.until_done().state
    assert state.phase is Phase.STOPPED
    assert state.stop is not None
    assert state.stop.cause == "budget"
    spent = bill(state, now=world.now).total_usd
    assert Decimal(budget) / 2 < spent < Decimal(budget)
    assert state.attempts[0].ended is not None
    assert state.attempts[0].ended.step == state.attempts[0].ended.checkpoint_step


def test_a_failing_script_fails_the_run_with_its_last_words() -> None:
    world = World()
    while not world.alive():
        world.reconcile()
    world.alive()[0].crash = 3
    state = world.until_done().state
    assert state.phase is Phase.FAILED
    assert state.failure is not None
    assert state.failure.log_tail == ("last words",)
    assert len(state.attempts) == 1


def test_a_launch_that_is_not_wanted_any_more_does_not_hide_why_the_run_failed() -> None:
    world = World()
    while not any(m.phase == "training" for m in world.alive()):
        world.reconcile()
        world.tick()
    [first] = world.alive()

    def unanswered(_: FakeFleet, request: LaunchRequest) -> Instance:
        if request.token in world.buried:  # as the fleet on EC2 says it
            msg = "it was ended before it was launched"
            raise LaunchRejected(msg)
        msg = "no answer"
        raise FleetUnavailable(msg)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeFleet, "launch", unanswered)
        world.interrupt(first)
        while len(world.run.journal().refresh().attempts) < 2:
            world.reconcile()
            world.tick()
        first.exit("script_failed", code=1)
        state = world.until_done().state
    assert state.failure is not None
    assert state.failure.log_tail == ("last words",)
    assert state.attempts[1].not_launched is not None
    assert state.attempts[1].not_launched.cause == "withdrawn"


def test_instances_that_cannot_run_the_agent_are_paid_for_once() -> None:
    world = World(script_retries=100)
    while not world.alive():
        world.reconcile()
    world.alive()[0].exit("unfit", message="the agent cannot work with this image: no blake3")
    state = world.until_done().state
    assert state.failure is not None
    assert state.failure.message == "the agent cannot work with this image: no blake3"
    assert not state.failure.retryable
    assert len(state.attempts) == 1


@pytest.mark.parametrize("cause", ["script_failed", "killed", "completed"])
def test_an_end_just_before_the_fleet_took_the_instance_was_an_interruption(
    cause: EndCause,
) -> None:
    world = World()
    world.powers_off = False
    while not (world.alive() and world.trainer_step() >= 25):
        world.reconcile()
        world.tick()
    first = world.trainer()
    first.exit(cause, code=1)
    first.die("fleet")
    state = world.until_done().state
    assert state.phase is Phase.SUCCEEDED
    assert state.attempts[0].ended is not None
    assert state.attempts[0].ended.cause == "interrupted"
    assert state.result is not None
    assert state.result.step == 60


def test_script_retries_are_taken_when_asked_for() -> None:
    world = World(script_retries=1)
    while not world.alive():
        world.reconcile()
    world.alive()[0].crash = 3
    assert world.until_done().state.phase is Phase.SUCCEEDED


def _interrupted_at(world: World, step: int) -> None:
    """The first attempt trains up to this step, and its instance is gone without notice."""
    while not (world.alive() and world.trainer_step() >= step):
        world.reconcile()
        world.tick()
    world.interrupt(world.trainer(), notice=False)


@pytest.mark.parametrize("logs_first", [False, True])
def test_a_checkpoint_with_which_an_attempt_crashes_at_once_is_passed_over_for_the_one_before(
    logs_first: bool,
) -> None:
    world = World()
    world.poisoned = {20}
    world.logs_first = logs_first
    _interrupted_at(world, 25)
    state = world.until_done().state
    assert state.phase is Phase.SUCCEEDED
    starts = [a.ended.start_step for a in state.attempts if a.ended]
    assert starts == [0, 20, 10]
    assert any("the one BEFORE it" in warning for warning in state.warnings)


def test_what_attempts_kept_before_they_crashed_is_no_checkpoint_to_go_back_to() -> None:
    world = World()
    world.poisoned = {10, 20, 30, 40}
    world.logs_first = True
    _interrupted_at(world, 45)
    state = world.until_done().state
    assert state.phase is Phase.FAILED
    assert [a.ended.start_step for a in state.attempts if a.ended] == [0, 40, 30, 20]


def test_going_back_ends_after_two_checkpoints_and_begins_with_the_newest_once_reopened() -> None:
    world = World()
    world.poisoned = {10, 20, 30, 40, 50}
    _interrupted_at(world, 55)
    state = world.until_done().state
    assert state.phase is Phase.FAILED
    assert [a.ended.start_step for a in state.attempts if a.ended] == [0, 50, 40, 30]
    journal = world.run.journal()
    journal.refresh()
    journal.append(e.Reopened(at=world.now, owner="someone"))
    world.poisoned = set()
    world.controllers = [world.new_controller()]
    state = world.until_done().state
    assert state.phase is Phase.SUCCEEDED
    assert state.attempts[-1].ended is not None
    assert state.attempts[-1].ended.start_step == 50


def test_with_one_checkpoint_alone_there_is_none_to_go_back_to() -> None:
    world = World()
    world.poisoned = {10}
    _interrupted_at(world, 15)
    state = world.until_done().state
    assert state.phase is Phase.FAILED
    assert len(state.attempts) == 2


def test_a_crash_loop_without_progress_stops_after_a_few_tries() -> None:
    world = World(script_retries=100)
    for _ in range(200):
        for machine in world.alive():
            machine.crash = 3
        step = world.reconcile()
        world.tick()
        if step and step.done:
            break
    state = world.until_done().state
    assert state.phase is Phase.FAILED
    assert state.failure is not None
    assert not state.failure.retryable
    assert len(state.attempts) == 3


@pytest.mark.parametrize(("mode", "attempts"), [("files", 10), ("trainer", None)])
def test_a_crash_loop_that_keeps_new_files_each_time_ends(mode: str, attempts: int | None) -> None:
    """Nothing says whether the files are progress; steps of a trainer are."""
    world = World(checkpoint_mode=mode, total_steps=1000)
    for _ in range(400):
        for machine in world.alive():
            if (machine.progress.step or 0) >= (machine.progress.start_step or 0) + 11:
                machine.exit("killed", -9, "")
        step = world.reconcile()
        world.tick()
        if step and step.done:
            break
    state = world.run.journal().refresh()
    if attempts is None:
        assert state.phase is Phase.ACTIVE
        assert len(state.attempts) > 11
        return
    assert state.failure is not None
    assert "10 attempts in a row crashed" in state.failure.message
    assert len(state.attempts) == attempts


def test_a_silent_instance_is_replaced_but_an_outage_of_the_controller_is_not_silence() -> None:
    world = World(total_steps=2000, silence_s=120)
    while not any(m.phase == "training" for m in world.alive()):
        world.reconcile()
        world.tick()
    machine = world.trainer()
    world.tick(500)
    world.reconcile()
    world.reconcile()
    assert machine.ended_at is None, "nobody looked for 500 s: that proves nothing"
    machine.mute = True
    for _ in range(200):
        world.reconcile()
        world.tick()
    assert machine.ended_at is not None
    assert world.until_done().state.phase is Phase.SUCCEEDED


def test_an_instance_that_can_write_nothing_is_warned_about_before_it_is_given_up() -> None:
    world = World(silence_s=120)
    while not world.alive():
        world.reconcile()
    [machine] = world.alive()
    machine.tick = lambda: None  # type: ignore[method-assign]
    for _ in range(90):
        world.reconcile()
        world.tick()
    assert machine.ended_at is None
    told = [w for w in world.run.journal().refresh().warnings if "has written nothing yet" in w]
    assert len(told) == 1
    assert world.storage.url in told[0]
    assert world.until_done().state.phase is Phase.SUCCEEDED


def test_a_stop_checkpoints_and_only_the_owner_may_ask_for_it() -> None:
    world = World(total_steps=2000)
    while not (world.alive() and world.trainer_step() >= 25):
        world.reconcile()
        world.tick()
    assert not request_stop(world.run, reason="late kill", owner="someone else", clock=world.clock)
    assert request_stop(world.run, reason="marked failed", owner="", clock=world.clock)
    state = world.until_done().state
    assert state.phase is Phase.STOPPED
    assert world.alive() == []
    assert state.attempts[0].ended is not None
    assert state.attempts[0].ended.step == state.attempts[0].ended.checkpoint_step


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    controllers=st.integers(1, 3),
    rates=st.tuples(*[st.floats(0.0, 0.15)] * 3),
    kills=st.lists(st.tuples(st.integers(1, 150), st.booleans()), max_size=5),
)
def test_whatever_fails_and_dies_one_attempt_commits_nothing_leaks_and_the_bill_is_true(
    seed: int, controllers: int, rates: tuple[float, float, float], kills: list[tuple[int, bool]]
) -> None:
    lost, refused, died = rates
    world = World(
        total_steps=80, policy_options={"losses": 3, "retry_s": 2.0},
        faults=Faults(seed, lost=lost, refused=refused, died=died),
    )  # fmt: skip
    while len(world.controllers) < controllers:
        world.controllers.append(world.new_controller())
    due = dict(kills)
    for second in range(4000):
        steps = [world.reconcile(index) for index in range(controllers)]
        if any(step and step.done for step in steps):
            break
        if second in due and world.alive():
            world.interrupt(world.alive()[-1], notice=due[second])
        world.tick()
        assert sum(machine.notice is None for machine in world.alive()) <= 2
    world.faults.armed = False
    state = world.run.journal().refresh()
    assert state.phase is Phase.SUCCEEDED
    assert world.alive() == []
    commits = world.truth_commits()
    assert commits == sorted(commits), "an older attempt committed after a newer one had claimed"
    assert commits[-1] == 80
    assert bill(state, now=world.now).total_usd == world.truth_usd()
    assert {a.token for a in state.attempts if a.launched} == set(world.machines)


def test_a_controller_that_dies_between_any_two_calls_launches_once() -> None:
    for call in range(60):
        world = World()
        countdown = iter(range(call, -1, -1))

        def around(action, unavailable, *, countdown=countdown):  # noqa: ANN001, ANN202
            result = action()
            if next(countdown, None) == 0:
                raise Died
            return result

        world.faults.around = around  # type: ignore[method-assign]
        state = world.until_done().state
        assert state.phase is Phase.SUCCEEDED
        assert len(world.machines) == 1
