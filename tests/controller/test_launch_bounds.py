"""No retry storm: launches per hour are bounded, and pools that refuse are asked ever less."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.errors import InvalidSpec
from spotfirst.market import Market, Pool
from spotfirst.state import Attempt, Phase
from spotfirst_airflow.launches import next_launch_at
from spotfirst_airflow.policies import LONGEST_REST_S, SpotOnly, View, rest_s
from tests.controller.test_policies import SPOT_A, SPOT_B, A, B
from tests.controller.world import START, World


def launched(number: int, after_s: float, *, clock_rate: float = 1.0) -> Attempt:
    at = START + timedelta(seconds=after_s)
    event = e.Launched(
        at=at, attempt=number, instance_id="i", started_at=at, price_usd_h=Decimal(1),
        price_source="t", price_at=at, on_demand_usd_h=Decimal(1), clock_rate=clock_rate,
    )  # fmt: skip
    return attempt(number, after_s, launched=event)


def refused(number: int, after_s: float, *pools: Pool) -> Attempt:
    at = START + timedelta(seconds=after_s)
    event = e.NotLaunched(
        at=at, attempt=number, cause="no_capacity", message="none", pools=pools or (A,)
    )
    return attempt(number, after_s, not_launched=event)


def attempt(number: int, after_s: float, **outcome: object) -> Attempt:
    plain = Attempt(
        number=number, token=f"token-{number}", market=Market.SPOT, pool=A, reason="",
        intended_at=START + timedelta(seconds=after_s),
    )  # fmt: skip
    return msgspec.structs.replace(plain, **outcome)


def resting(attempts: tuple[Attempt, ...], after_s: float, *, retry_s: float = 15.0) -> set[Pool]:
    """The pools that a policy leaves alone then."""
    now = START + timedelta(seconds=after_s)
    view = View(now=now, idle_since=now, offers=(SPOT_A, SPOT_B), attempts=attempts)
    decision = SpotOnly(retry_s=retry_s).decide(view)
    offered = {decision.offer.pool, *decision.others} if decision.offer else set()
    return {A, B} - offered


# -- launches per hour --------------------------------------------------------------------------


def test_a_run_launches_so_many_instances_in_any_hour_and_not_one_more() -> None:
    world = World(launches_per_hour=5, policy_options={"losses": 10**6})
    for _ in range(2 * 3600):
        world.reconcile()
        world.tick()
        for machine in world.alive():
            world.interrupt(machine, notice=False)
    starts = sorted(machine.started_at for machine in world.machines.values())
    assert len(starts) > 5, "it goes on when the hour is over"
    for first, sixth in zip(starts, starts[5:], strict=False):
        assert sixth - first >= timedelta(hours=1)


def test_it_says_why_it_waits_and_warns_once() -> None:
    world = World(launches_per_hour=2, policy_options={"losses": 10**6})
    for _ in range(300):
        world.reconcile()
        world.tick()
        for machine in world.alive():
            world.interrupt(machine, notice=False)
    state = world.run.journal().refresh()
    assert state.waiting is not None
    first = state.attempts[0].launched
    assert first is not None
    free_at = first.at + timedelta(hours=1)
    assert state.waiting.reason == (
        f"launches_per_hour=2 were launched: the next at {free_at:%H:%M:%S} UTC"
    )
    assert len([line for line in world.news if line.startswith("waiting")]) == 1
    [warned] = [line for line in world.news if "launches_per_hour" in line and "WARNING" in line]
    assert "spotfirst show" in warned


def test_a_run_at_its_bound_goes_on_training_with_what_it_has() -> None:
    options = {"no_capacity_s": 0, "return_after_s": 5}
    world = World(launches_per_hour=1, policy_options=options)
    world.capacity = dict.fromkeys(world.capacity, False)
    while not any(m.phase == "training" for m in world.alive()):
        world.reconcile()
        world.tick()
    world.capacity = dict.fromkeys(world.capacity, True)
    state = world.until_done().state
    assert state.phase is Phase.SUCCEEDED
    assert [a.market for a in state.attempts] == [Market.ON_DEMAND]
    assert state.warnings == ()


def test_the_hour_is_one_of_the_market_in_which_the_instance_is_billed() -> None:
    fast = [launched(n, n, clock_rate=240.0) for n in range(1, 4)]
    slow = [launched(n, n) for n in range(1, 4)]
    now = START + timedelta(seconds=17)  # 16 s are more than an hour there
    assert next_launch_at(fast, per_hour=3, now=now) is None
    assert next_launch_at(slow, per_hour=3, now=now) == START + timedelta(seconds=3601)


def test_what_was_never_launched_does_not_count() -> None:
    attempts = [refused(n, n) for n in range(1, 100)]
    assert next_launch_at(attempts, per_hour=1, now=START + timedelta(seconds=100)) is None


@given(
    after_s=st.lists(st.integers(0, 7200), max_size=40), now_s=st.integers(0, 9000),
    per_hour=st.integers(1, 10),
)  # fmt: skip
def test_at_the_time_that_is_told_and_not_a_second_before_there_is_room(
    after_s: list[int], now_s: int, per_hour: int
) -> None:
    attempts = [launched(number, at) for number, at in enumerate(sorted(after_s), start=1)]
    now = START + timedelta(seconds=now_s)
    at = next_launch_at(attempts, per_hour=per_hour, now=now)

    def used(then: object) -> int:
        return sum(a.launched.at + timedelta(hours=1) > then for a in attempts if a.launched)

    assert (at is None) is (used(now) < per_hour)
    if at is not None:
        assert used(at) < per_hour <= used(at - timedelta(seconds=1))


def test_a_run_that_may_launch_nothing_is_refused() -> None:
    with pytest.raises(InvalidSpec, match="launches_per_hour is 0"):
        msgspec.structs.replace(World().spec, launches_per_hour=0).check()


# -- pools that refuse --------------------------------------------------------------------------


def test_the_first_rest_is_exactly_retry_s() -> None:
    assert resting((refused(1, 0),), 14.9) == {A}
    assert resting((refused(1, 0),), 15.0) == set()


def test_each_further_refusal_doubles_the_rest_up_to_five_minutes() -> None:
    rests = [rest_s(n, retry_s=15.0, salt="token") for n in range(1, 40)]
    assert all(earlier <= later for earlier, later in pairwise(rests))
    for number, seconds in enumerate(rests, start=1):
        full = min(LONGEST_REST_S, 15.0 * 2 ** (number - 1))
        assert full / 2 <= seconds <= full
    assert rest_s(9, retry_s=1000.0, salt="token") == 1000.0, "never below what was asked for"


def test_runs_that_failed_together_do_not_come_back_together_but_controllers_of_one_agree() -> None:
    rests = {rest_s(5, retry_s=15.0, salt=f"run-{n}") for n in range(100)}
    assert len(rests) == 100
    assert max(rests) - min(rests) > 90
    assert rest_s(5, retry_s=15.0, salt="run-1") == rest_s(5, retry_s=15.0, salt="run-1")


def test_a_refusal_counts_against_the_pools_that_it_names() -> None:
    both = (refused(1, 0, A, B), refused(2, 20, A))
    assert resting(both, 34.9) == {A}
    assert resting((refused(1, 0, A, B),), 10) == {A, B}


def test_a_launch_begins_the_count_anew() -> None:
    stubborn = tuple(refused(n, n * 400) for n in range(1, 7))
    after = 6 * 400
    assert resting(stubborn, after + 100) == {A}
    again = (*stubborn, launched(7, after + 200), refused(8, after + 300))
    assert resting(again, after + 300 + 14) == {A}
    assert resting(again, after + 300 + 15) == set()


def test_an_hour_without_capacity_takes_few_tries() -> None:
    world = World(policy="spot_only")
    world.capacity = dict.fromkeys(world.capacity, False)
    offers = type(world.new_fleet()).offers

    def hopeful(fleet: object, types: object) -> list[object]:
        """As on a cloud, where nobody knows before asking."""
        found = offers(fleet, types)
        return [msgspec.structs.replace(offer, available=True) for offer in found]

    fleet = type("Hopeful", (type(world.new_fleet()),), {"offers": hopeful})
    world.new_fleet = lambda: fleet(world)
    world.controllers = [world.new_controller()]
    for _ in range(3600):
        world.reconcile()
        world.tick()
    tries = world.run.journal().refresh().attempts
    assert len(tries) < 50, "two pools, each asked about every five minutes in the end"
    assert (tries[2].intended_at - tries[0].intended_at).total_seconds() <= 16
    world.capacity["zone-a"] = True
    assert world.until_done().state.phase is Phase.SUCCEEDED
