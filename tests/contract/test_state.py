"""The fold is total and keeps what is known."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.market import Market, Notice, Pool
from spotfirst.state import Phase, RunState, fold
from tests.contract.records import any_event

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
_settings = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def _few_attempts(event: e.Event) -> e.Event:
    import msgspec

    if isinstance(getattr(event, "attempt", None), int):
        return msgspec.structs.replace(event, attempt=event.attempt % 3)
    return event


journals = st.lists(any_event.map(_few_attempts), max_size=25)


@_settings
@given(journals)
def test_any_events_in_any_order_fold(journal: list[e.Event]) -> None:
    state = fold(journal)
    assert state.seq == len(journal)
    # Everything that readers ask of a state has an answer.
    assert state.checkpoint_step is None or state.checkpoint_step >= 0
    assert state.fruitless("lost", "killed") <= len(state.attempts)
    assert set(state.open_attempts) <= set(state.attempts)


@_settings
@given(journals, st.data())
def test_folding_goes_on_from_any_prefix(journal: list[e.Event], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(journal)))
    state = fold(journal[:cut])
    for event in journal[cut:]:
        state = state.apply(event)
    assert state == fold(journal)


@_settings
@given(journals)
def test_what_is_known_of_an_attempt_is_never_overwritten(journal: list[e.Event]) -> None:
    state = RunState()
    for event in journal:
        after = state.apply(event)
        for before, now in zip(state.attempts, after.attempts, strict=False):
            assert (before.number, before.token) == (now.number, now.token)
            for name in ("launched", "not_launched", "handover", "ended"):
                known = getattr(before, name)
                assert known is None or getattr(now, name) == known
            if before.notice is not None and before.notice.kind == "interruption":
                assert now.notice == before.notice
        state = after


@_settings
@given(journals)
def test_an_outcome_stands_until_the_run_is_reopened(journal: list[e.Event]) -> None:
    state = RunState()
    for event in journal:
        after = state.apply(event)
        if state.is_final and not isinstance(event, e.Reopened):
            assert (after.phase, after.result, after.failure) == (
                state.phase, state.result, state.failure,
            )  # fmt: skip
        state = after


def _launching(number: int) -> e.Launching:
    pool = Pool(instance_type="t", zone="z")
    return e.Launching(at=NOW, attempt=number, token="k", market=Market.SPOT, pool=pool, reason="")


def test_a_recommendation_that_becomes_an_interruption_is_news() -> None:
    soft = e.Noticed(at=NOW, attempt=1, notice=Notice(kind="rebalance", seen_at=NOW))
    hard = e.Noticed(at=NOW, attempt=1, notice=Notice(kind="interruption", seen_at=NOW, time=NOW))
    state = fold([_launching(1), soft])
    assert not state.attempt(1).is_leaving
    assert state.apply(hard).attempt(1).is_leaving
    assert state.apply(hard).apply(soft).attempt(1).is_leaving


def test_a_reopened_run_is_active_and_has_no_outcome() -> None:
    failed = fold([_launching(1), e.Failed(at=NOW, message="no"), e.Stopped(at=NOW, reason="late")])
    assert failed.phase is Phase.FAILED
    again = failed.apply(e.Reopened(at=NOW, owner="me"))
    assert (again.phase, again.failure, again.owner, again.reopened_after) == (
        Phase.ACTIVE, None, "me", 1,
    )  # fmt: skip


def test_asking_for_an_attempt_that_is_not_there_says_so() -> None:
    with pytest.raises(LookupError, match="no attempt 7"):
        fold([_launching(1)]).attempt(7)
