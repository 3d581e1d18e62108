"""At a notice, the time left, the bytes not yet stored and the throughput decide."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.agent.stopping import drain_margin_s
from spotfirst.checkpoints.last import COMMIT_S, Estimate, Running, decide, drain_s, needed_s
from spotfirst.heartbeat import Progress

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
MB = 1_000_000

ESTIMATES = st.builds(Estimate, st.integers(0, 10**12), st.floats(0, 1e5))


@st.composite
def running_saves(draw: st.DrawFn) -> Running:
    size = draw(st.integers(0, 10**12))
    return Running(7, draw(st.integers(0, size)), size, draw(st.floats(0, 1e5)))


def half_done(elapsed_s: float = 5.0) -> Running:
    return Running(step=7, left_bytes=50 * MB, size_bytes=100 * MB, elapsed_s=elapsed_s)


@given(left_s=st.floats(-10, 1e6), estimate=ESTIMATES)
def test_nothing_is_begun_that_by_its_estimate_is_not_committed_in_time(
    left_s: float, estimate: Estimate
) -> None:
    decision = decide(left_s, estimate=estimate)
    fits = 1.2 * estimate.took_s + 0.5 <= left_s
    assert decision.action == ("take" if fits and left_s > COMMIT_S else "stop")


@given(left_s=st.floats(-10, 1e6), estimate=st.none() | ESTIMATES, running=running_saves())
def test_what_runs_goes_on_only_as_long_as_it_can_make_it(
    left_s: float, estimate: Estimate | None, running: Running
) -> None:
    decision = decide(left_s, estimate=estimate, running=running)
    rest_s = running.left_s(estimate)
    fits = left_s > COMMIT_S and (rest_s is None or rest_s <= left_s - COMMIT_S)
    assert decision.action == ("finish" if fits else "stop")


@given(left_s=st.floats(-10, 1e6), estimate=st.none() | ESTIMATES, running=running_saves())
def test_all_that_is_waited_for_is_given_up_before_the_end(
    left_s: float, estimate: Estimate | None, running: Running
) -> None:
    for decision in (
        decide(left_s, estimate=estimate),
        decide(left_s, estimate=estimate, running=running),
    ):
        assert decision.patience_s is not None
        assert 0 <= decision.patience_s <= max(0.0, left_s - COMMIT_S)


def test_the_reason_has_the_numbers() -> None:
    estimate = Estimate(100 * MB, 10.0)
    take = decide(30.0, estimate=estimate)
    assert take.reason == (
        "30 s left: taking a last checkpoint (100 MB at 10 MB/s, 10 s; with a margin 12 s)"
    )
    assert decide(3.0, estimate=estimate).reason.startswith("3 s left: not enough for a last")
    finish = decide(30.0, estimate=estimate, running=half_done())
    assert finish.reason == (
        "30 s left: finishing the checkpoint of step 7 (50 MB of 100 MB left after 5 s, needs 5 s)"
    )


def test_a_save_that_has_become_slow_is_judged_by_itself() -> None:
    usual = Estimate(100 * MB, 10.0)
    assert half_done(elapsed_s=5).left_s(usual) == 5
    assert half_done(elapsed_s=60).left_s(usual) == 60
    just_begun = Running(step=7, left_bytes=99 * MB, size_bytes=100 * MB, elapsed_s=60)
    assert just_begun.left_s(usual) == pytest.approx(9.9)


def test_without_any_measurement_it_is_tried() -> None:
    assert decide(10.0, estimate=None).action == "take"
    unknown = Running(step=7, left_bytes=100, size_bytes=100, elapsed_s=1.0)
    assert decide(10.0, estimate=None, running=unknown).action == "finish"


def test_without_a_limit_everything_is_stored() -> None:
    assert decide(None, estimate=Estimate(MB, 1e9)).action == "take"
    assert decide(None, estimate=None, running=half_done()).action == "finish"
    assert decide(None, estimate=None).patience_s is None


@given(took_s=st.floats(0, 1e4), already=st.floats(0, 1))
def test_whoever_is_asked_with_the_margin_left_can_store_its_last_step(
    took_s: float, already: float
) -> None:
    """The agent asks ``drain_s`` (and more) before the end, whatever is running then."""
    estimate = Estimate(100 * MB, took_s)
    window_s = 10 * took_s + 100
    progress = Progress(checkpoint_s=took_s, drain_s=drain_s(estimate))
    left_s = drain_margin_s(window_s, progress) + 1e-6
    running = Running(7, round(100 * MB * (1 - already)), 100 * MB, already * took_s)
    assert decide(left_s, estimate=estimate, running=running).action == "finish"
    rest_s = running.left_s(estimate)
    assert rest_s is not None
    assert decide(left_s - rest_s, estimate=estimate).action == "take"
    assert needed_s(took_s) <= left_s - rest_s
