"""What an instance's pool cost while it ran: in the journal, and never in the bill."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import Decimal

import pytest
from msgspec.structs import replace

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable
from spotfirst.state import fold
from spotfirst_airflow.costs import bill
from spotfirst_airflow.fleets import Instance
from tests.controller.world import FakeFleet, World

RISES_AFTER = timedelta(seconds=5)
DEARER = Decimal("0.45")


class TellingFleet(FakeFleet):
    """A fleet whose spot price rises some seconds after each launch."""

    def price_timeline(self, instance: Instance) -> list[tuple[datetime, Decimal]]:
        assert instance.ended_at is not None
        since = instance.started_at
        return [(since, instance.price_usd_h), (since + RISES_AFTER, DEARER)]


class SilentFleet(FakeFleet):
    def price_timeline(self, instance: Instance) -> list[tuple[datetime, Decimal]]:
        raise FleetUnavailable("no answer")


class TellingWorld(World):
    fleet: type[FakeFleet] = TellingFleet

    def new_fleet(self) -> FakeFleet:
        return self.fleet(self)


class SilentWorld(TellingWorld):
    fleet = SilentFleet


def test_the_journal_has_the_price_of_a_spot_instance_over_time() -> None:
    [attempt] = TellingWorld().until_done().state.attempts
    assert attempt.launched is not None
    assert attempt.ended is not None
    assert attempt.ended.price_timeline == (
        (attempt.launched.started_at, attempt.launched.price_usd_h),
        (attempt.launched.started_at + RISES_AFTER, DEARER),
    )


def test_the_bill_shows_it_and_stays_with_the_price_of_the_launch() -> None:
    world = TellingWorld()
    state = world.until_done().state
    account = bill(state, now=world.now)
    assert account.charges[0].price_timeline[-1][1] == DEARER
    journal = world.run.journal()
    journal.refresh()
    without = fold(
        replace(event, price_timeline=()) if isinstance(event, e.Ended) else event
        for event in journal.events
    )
    assert without.attempts, "the same run"
    assert bill(without, now=world.now).total_usd == account.total_usd


@pytest.mark.parametrize("world", [World, SilentWorld])
def test_an_end_is_told_where_nobody_knows_the_prices(world: type[World]) -> None:
    [attempt] = world().until_done().state.attempts
    assert attempt.ended is not None
    assert attempt.ended.cause == "completed"
    assert attempt.ended.price_timeline == ()


def test_an_instance_on_demand_has_one_price() -> None:
    world = TellingWorld(policy="on_demand")
    [attempt] = world.until_done().state.attempts
    assert attempt.ended is not None
    assert attempt.ended.price_timeline == ()
