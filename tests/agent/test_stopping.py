"""When a trainer is asked to stop, and until when it may run."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.agent.stopping import Watch, drain_margin_s
from spotfirst.heartbeat import Progress

BOOT = datetime(2026, 1, 1, tzinfo=timezone.utc)


def at(seconds: float) -> datetime:
    return BOOT + timedelta(seconds=seconds)


def watch(**heard: float) -> Watch:
    times = {name: at(value) for name, value in heard.items()}
    return Watch(**{"booted": BOOT, "life_ends": at(10_000), **times})  # type: ignore[arg-type]


def test_nothing_heard_means_nothing_to_stop_for() -> None:
    assert watch().stop(at(100), Progress()) is None


def test_a_notice_alone_waits_until_only_the_margin_is_left() -> None:
    noticed = watch(interruption_seen=100, interruption_at=220)
    measured = Progress(checkpoint_s=10.0)  # 2 * 10 + 1, and 2 for the report
    assert noticed.stop(at(220 - 24), measured) is None
    stop = noticed.stop(at(220 - 23), measured)
    assert stop is not None
    assert (stop.reason, stop.by) == ("interruption", at(218))


def test_a_slow_step_is_added_to_the_margin() -> None:
    noticed = watch(interruption_seen=100, interruption_at=220)
    assert noticed.stop(at(170), Progress(checkpoint_s=1.0), step_s=60.0) is not None


def test_a_handover_stops_at_once_and_before_the_interruption() -> None:
    stop = watch(interruption_seen=100, interruption_at=150, handover_at=101).stop(at(101), None)
    assert stop is not None
    assert (stop.reason, stop.by) == ("handover", at(148))


def test_a_handover_alone_may_take_its_patience() -> None:
    stop = watch(handover_at=100).stop(at(100), None)
    assert stop is not None
    assert stop.by == at(220)


def test_a_shutdown_stops_at_once() -> None:
    stop = watch(terminated_at=100).stop(at(100), None)
    assert stop is not None
    assert (stop.reason, stop.by) == ("interruption", at(120))


def test_the_end_of_the_life_is_prepared_for() -> None:
    living = watch()
    assert living.stop(at(9_000), Progress(checkpoint_s=1.0)) is None
    stop = living.stop(at(9_994), Progress(checkpoint_s=1.0))
    assert stop is not None
    assert (stop.reason, stop.by) == ("max_life", at(9_998))


@given(
    window_s=st.floats(0, 1e6),
    checkpoint_s=st.none() | st.floats(0, 1e6),
    step_s=st.floats(0, 1e6),
)
def test_the_margin_never_exceeds_the_window(
    window_s: float, checkpoint_s: float | None, step_s: float
) -> None:
    margin_s = drain_margin_s(window_s, Progress(checkpoint_s=checkpoint_s), step_s)
    assert 0 <= margin_s <= window_s


@pytest.mark.parametrize("window_s", [0.5, 4.0, 120.0])
def test_the_command_is_gone_before_the_instance_is(window_s: float) -> None:
    stop = watch(interruption_seen=0, interruption_at=window_s).stop(at(window_s), None)
    assert stop is not None
    assert stop.by < at(window_s)


def test_at_the_deadline_it_stops_at_once_and_not_much_later() -> None:
    limited = watch(deadline=500)
    assert limited.stop(at(499), Progress(checkpoint_s=1.0)) is None
    stop = limited.stop(at(500), Progress(checkpoint_s=1.0))
    assert stop is not None
    assert (stop.reason, stop.by) == ("deadline", at(530))
    slow = limited.stop(at(500), Progress(checkpoint_s=100.0), step_s=7.0)
    assert slow is not None
    assert slow.by == at(500 + 2 * 100 + 5 + 7), "a large checkpoint has the time that it takes"


def test_before_the_budget_it_stops_when_only_the_end_is_left() -> None:
    limited = watch(budget_ends=500)
    assert limited.stop(at(500 - 8), Progress(checkpoint_s=1.0)) is None
    stop = limited.stop(at(500 - 7), Progress(checkpoint_s=1.0))
    assert stop is not None
    assert (stop.reason, stop.by) == ("budget", at(507))
    assert limited.stop(at(500 - 17), Progress(checkpoint_s=1.0), step_s=10.0) is not None


@given(
    deadline=st.none() | st.integers(0, 1000),
    budget_ends=st.none() | st.integers(0, 1000),
    handover=st.none() | st.integers(0, 1000),
    checkpoint_s=st.none() | st.floats(0, 100),
    step_s=st.floats(0, 100),
    now=st.integers(0, 2000),
)
def test_whoever_asks_what_is_left_ends_soon_after_the_limits(
    *, deadline: int | None, budget_ends: int | None, handover: int | None,
    checkpoint_s: float | None, step_s: float, now: int,
) -> None:  # fmt: skip
    given_times = {"deadline": deadline, "budget_ends": budget_ends, "handover_at": handover}
    watched = watch(**{name: time for name, time in given_times.items() if time is not None})
    progress = Progress(checkpoint_s=checkpoint_s)
    stop = watched.stop(at(now), progress, step_s)
    ends = watched.run_ends(progress, step_s)
    limits = [limit for limit in (deadline, budget_ends) if limit is not None]
    assert (ends is None) == (not limits)
    if limits and now >= min(limits):
        assert stop is not None
    if stop is not None and ends is not None:
        assert stop.by <= ends <= at(min(limits)) + timedelta(seconds=30 + 305 + 2)
