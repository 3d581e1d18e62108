"""When a change of instance begins and ends, and what of it is start-up."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal

from spotfirst import events as e
from spotfirst.heartbeat import Progress, Timings
from spotfirst.market import Market, Notice, Pool
from spotfirst.state import fold
from spotfirst_airflow.changeovers import changeovers

POOL = Pool(instance_type="g6.xlarge", zone="local-a")


def at(seconds: float) -> datetime:
    return datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=seconds)


def launch(number: int, seconds: float) -> list[e.Event]:
    return [
        e.Launching(
            at=at(seconds), attempt=number, token=f"t{number}", market=Market.SPOT, pool=POOL,
            reason="",
        ),
        e.Launched(
            at=at(seconds), attempt=number, instance_id="i", started_at=at(seconds),
            price_usd_h=Decimal(1), price_source="", price_at=at(0), on_demand_usd_h=Decimal(2),
        ),
    ]  # fmt: skip


def end(number: int, seconds: float, cause: e.EndCause) -> e.Event:
    return e.Ended(at=at(seconds), attempt=number, cause=cause, ended_at=at(seconds))


def notice(number: int, seconds: float) -> e.Event:
    told = Notice(kind="interruption", seen_at=at(seconds), time=at(seconds + 120))
    return e.Noticed(at=at(seconds + 1), attempt=number, notice=told)


def progress(
    *, start: int, step: int, standby_s: float | None, first_s: float | None, last_s: float | None
) -> Progress:
    def point(seconds: float | None) -> datetime | None:
        return None if seconds is None else at(seconds)

    return Progress(
        start_step=start,
        step=step,
        timings=Timings(
            standby=point(standby_s), first_step=point(first_s), last_step=point(last_s)
        ),
    )


OLD = progress(start=0, step=100, standby_s=5, first_s=6, last_s=113)


def test_with_notice_it_lasts_from_the_notice_to_the_first_new_step() -> None:
    state = fold([*launch(1, 0), notice(1, 100), *launch(2, 102), end(1, 114, "interrupted")])
    new = progress(start=100, step=150, standby_s=112, first_s=115, last_s=150)
    [change] = changeovers(state, {1: OLD, 2: new})
    assert change.why == "notice"
    assert change.changeover_s == 15
    assert change.startup_s == 10  # from the launch to standby
    assert change.beyond_startup_s == 5
    assert change.pause_s == 2
    assert change.lost_steps == 0


def test_without_notice_it_begins_when_the_instance_is_gone() -> None:
    state = fold([*launch(1, 0), end(1, 120, "interrupted"), *launch(2, 123)])
    new = progress(start=80, step=150, standby_s=133, first_s=134, last_s=150)
    [change] = changeovers(state, {1: OLD, 2: new})
    assert (change.why, change.changeover_s, change.startup_s) == ("loss", 14, 10)
    assert change.lost_steps == 20


def test_a_move_begins_when_it_is_decided() -> None:
    state = fold([*launch(1, 0), *launch(2, 100), end(1, 114, "handed_over")])
    new = progress(start=100, step=150, standby_s=112, first_s=115, last_s=150)
    [change] = changeovers(state, {1: OLD, 2: new})
    assert (change.why, change.changeover_s) == ("move", 15)


def test_an_attempt_that_never_trained_makes_the_change_longer_not_two_of_it() -> None:
    state = fold(
        [*launch(1, 0), end(1, 100, "lost"), *launch(2, 101), end(2, 110, "lost"), *launch(3, 111)]
    )
    idle = progress(start=0, step=0, standby_s=None, first_s=None, last_s=None)
    new = progress(start=100, step=150, standby_s=118, first_s=120, last_s=150)
    [change] = changeovers(state, {1: OLD, 2: idle, 3: new})
    assert (change.from_attempt, change.to_attempt, change.changeover_s) == (1, 3, 20)


def test_a_first_attempt_changes_nothing() -> None:
    assert changeovers(fold(launch(1, 0)), {1: OLD}) == ()
