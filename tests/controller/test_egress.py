"""What crosses regions: in the bill, in the budget, and in what policies are shown."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from spotfirst import events as e
from spotfirst.market import Market, Pool
from spotfirst.spec import ResumeFrom
from spotfirst.state import Phase, RunState, fold
from spotfirst_airflow.asking import carry_usd, with_writing
from spotfirst_airflow.costs import bill
from spotfirst_airflow.fleets import Offer
from spotfirst_airflow.policies import Decision, View
from spotfirst_airflow.traffic import Traffic
from tests.controller.world import START, Faults, World

GB = 10**9
FAR = (Decimal("0.02"), Decimal("0.09"))
"""To read a GB far from the storage, and to write one there."""


def world(**more: Any) -> World:
    """The storage is in the region of zone-a; zone-b is in another one."""
    found = World(**more)
    found.way_usd_gb["zone-b"] = FAR
    found.checkpoint_bytes, found.new_bytes = 50 * GB, 5 * GB
    return found


def until_step(found: World, step: int) -> None:
    for _ in range(600):
        if found.trainer_step() >= step:
            return
        found.reconcile()
        found.tick()
    raise AssertionError("\n".join(found.news))


def moved(found: World) -> RunState:
    """A run that began near its storage, and was taken back there after three checkpoints."""
    found.capacity["zone-b"] = False
    until_step(found, 35)
    found.capacity.update({"zone-a": False, "zone-b": True})
    found.interrupt(found.trainer())
    return found.until_done().state


class Shown:
    """Spot in zone-b, and what it was shown."""

    def __init__(self) -> None:
        self.views: list[View] = []

    def decide(self, view: View) -> Decision:
        self.views.append(view)
        there = [o for o in view.offers if o.pool.zone == "zone-b" and o.market is Market.SPOT]
        return Decision(reason="far", offer=there[0] if there and not view.current else None)


# -- the bill -----------------------------------------------------------------------------------


def test_a_run_that_goes_on_in_another_region_pays_for_what_it_reads_and_writes_there() -> None:
    found = world()
    state = moved(found)
    assert [a.pool.zone for a in state.attempts if a.launched] == ["zone-a", "zone-b"]
    _, there = bill(state, now=found.now).charges
    commits = [c for _, c in found.run.chain().refresh().commits if c.attempt == there.attempt]
    assert len(commits) >= 2
    assert there.egress_usd == 50 * FAR[0] + 5 * len(commits) * FAR[1]
    assert bill(state, now=found.now).total_usd == found.truth_usd() + there.egress_usd


def test_within_one_region_nothing_is_paid_and_nothing_asked_of_the_chain() -> None:
    found = world()
    found.way_usd_gb.clear()
    state = moved(found)
    assert bill(state, now=found.now).egress_usd == 0
    assert all(a.ended.written_bytes == 0 for a in state.attempts if a.ended)


def test_an_instance_that_is_free_has_paid_for_its_bytes() -> None:
    found = world(policy=Shown())
    until_step(found, 15)
    found.interrupt(found.trainer(), notice=False)
    found.reconcile()
    charge = bill(found.run.journal().refresh(), now=found.now).charges[0]
    assert (charge.cost_usd, charge.egress_usd) == (0, 5 * FAR[1])


def test_an_attempt_that_restored_nothing_has_read_nothing() -> None:
    found = world()
    until_step(found, 15)
    launched = e.Launched(
        at=START, attempt=2, instance_id="i", started_at=START, price_usd_h=Decimal(1),
        price_source="", price_at=START, on_demand_usd_h=Decimal(1), read_usd_gb=FAR[0],
    )  # fmt: skip
    ended = e.Ended(at=START, attempt=2, cause="lost", ended_at=START)
    assert Traffic(found.run, None).ended(ended, launched).restored_bytes == 0


def test_a_replay_reads_the_checkpoint_that_it_starts_from() -> None:
    found = world()
    until_step(found, 15)
    newest = found.run.chain().refresh().newest()
    assert newest is not None
    origin = ResumeFrom(run_id="run", seq=newest[0], step=10)
    replay = World()
    traffic = Traffic(replay.run, origin)
    assert traffic.newest_bytes() == 0, "its parent is in another storage"
    assert Traffic(type(found.run)(found.storage, "replay"), origin).newest_bytes() == 50 * GB


def test_a_chain_that_cannot_be_read_is_counted_as_far_as_it_can_be() -> None:
    found = world()
    until_step(found, 25)
    traffic = Traffic(found.run, None)
    written_bytes_h = traffic.written_bytes_h()
    chain = found.run.chain().refresh()
    path = f"checkpoints/{chain.commits[-1][0] + 1:08d}.json"
    assert found.run.storage.create(path, b"neither a claim nor a commit")
    assert traffic.newest_bytes() == 50 * GB
    assert traffic.written_bytes_h() == written_bytes_h > 0


def test_code_and_data_that_were_fetched_cross_as_well() -> None:
    pool = Pool(instance_type="gpu", zone="zone-b")
    state = fold(
        [
            e.Created(at=START),
            e.Launching(
                at=START, attempt=1, token="t", market=Market.SPOT, pool=pool, reason=""
            ),
            e.Launched(
                at=START, attempt=1, instance_id="i", started_at=START, price_usd_h=Decimal(1),
                price_source="", price_at=START, on_demand_usd_h=Decimal(1), read_usd_gb=FAR[0],
            ),
            e.Ended(at=START, attempt=1, cause="lost", ended_at=START, moved_bytes=3 * GB),
        ]
    )  # fmt: skip
    assert bill(state, now=START).total_usd == Decimal("0.06")


def test_a_journal_of_before_is_read_as_one_without_any() -> None:
    launched = {
        "kind": "launched", "at": "2026-01-01T00:00:00Z", "attempt": 1, "instance_id": "i",
        "started_at": "2026-01-01T00:00:00Z", "price_usd_h": "0.3", "price_source": "",
        "price_at": "2026-01-01T00:00:00Z", "on_demand_usd_h": "1",
    }  # fmt: skip
    found = e.decode_event(json.dumps(launched).encode(), path="1")
    assert isinstance(found, e.Launched)
    assert (found.read_usd_gb, found.write_usd_gb) == (0, 0)


# -- what is decided on it ----------------------------------------------------------------------


def test_a_policy_is_shown_what_it_costs_to_bring_the_checkpoint_to_a_zone() -> None:
    policy = Shown()
    found = world(policy=policy)
    until_step(found, 15)
    assert policy.views[0].carry_usd == {}, "there is no checkpoint yet"
    assert policy.views[-1].checkpoint_bytes == 50 * GB
    assert policy.views[-1].carry_usd == {"zone-b": 50 * FAR[0]}


def test_a_pool_that_writes_to_another_region_is_dearer_by_the_hour() -> None:
    found = world(checkpoint_every=10)
    until_step(found, 45)
    traffic = Traffic(found.run, None)
    written_bytes_h = traffic.written_bytes_h()
    assert written_bytes_h == pytest.approx(5 * GB * 360)  # a checkpoint each 10 s
    near, far = (
        Offer(
            pool=Pool(instance_type="gpu", zone=zone), market=Market.SPOT, price_usd_h=Decimal(1),
            price_source="", price_at=START, **found.way(zone),
        )
        for zone in ("zone-a", "zone-b")
    )  # fmt: skip
    offers = with_writing([near, far], written_bytes_h)
    assert [offer.price_usd_h for offer in offers] == [1, 1 + 5 * 360 * FAR[1]]
    slower = with_writing([far], written_bytes_h, clock_rate=60)
    assert slower[0].price_usd_h == 1 + 5 * 6 * FAR[1], "a market's hour is a minute here"
    assert carry_usd(offers, 50 * GB) == {"zone-b": 1}


def test_the_budget_counts_what_a_running_instance_has_moved() -> None:
    found = world(policy=Shown(), budget_usd=Decimal(2), total_steps=1000)
    state = found.until_done().state
    assert state.phase is Phase.STOPPED
    assert state.stop is not None
    assert state.stop.cause == "budget"
    account = bill(state, now=found.now)
    # Each checkpoint is 45 cents: a fourth, and one more at the end, would be too much.
    assert account.egress_usd == 4 * 5 * FAR[1]
    assert account.total_usd < 2


def test_no_instance_is_launched_where_the_way_there_is_dearer_than_what_is_left() -> None:
    found = world(budget_usd=Decimal("0.90"))
    found.on_demand = False
    until_step(found, 35)
    near = found.trainer()
    assert near.request.pool.zone == "zone-a"
    found.capacity["zone-a"] = False
    found.interrupt(near)
    for _ in range(300):
        found.reconcile()
        found.tick()
    assert list(found.machines.values()) == [near], "the checkpoint's way costs a dollar"


@pytest.mark.parametrize("seed", range(8))
def test_lost_answers_change_nothing_in_the_bill(seed: int) -> None:
    found = world(faults=Faults(seed, lost=0.05, refused=0.05, died=0.03))
    state = moved(found)
    commits = [commit for _, commit in found.run.chain().refresh().commits]
    for attempt in state.attempts:
        if attempt.launched and attempt.pool.zone == "zone-b" and attempt.ended:
            mine = [commit for commit in commits if commit.attempt == attempt.number]
            assert attempt.ended.written_bytes == 5 * GB * len(mine)
    assert bill(state, now=found.now).egress_usd > 0
