"""Calls of the agent that wait for the storage."""

from __future__ import annotations

import pytest

from spotfirst.agent import retrying
from spotfirst.agent.retrying import until_answered
from spotfirst.errors import StorageDenied, StorageUnavailable


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What was slept, without sleeping."""
    slept: list[float] = []
    monkeypatch.setattr(retrying.time, "sleep", slept.append)
    return slept


def answers(*errors: Exception) -> list[Exception]:
    return list(reversed(errors))


def call(left: list[Exception]) -> str:
    if left:
        raise left.pop()
    return "stored"


def test_silence_is_waited_out(slept: list[float]) -> None:
    left = answers(*[StorageUnavailable("away")] * 5000)
    assert until_answered("store it", lambda: call(left), denied_s=10) == "stored"
    assert sum(slept) == 5000


def test_a_refusal_is_raised_once_it_has_lasted(slept: list[float]) -> None:
    left = answers(*[StorageDenied("no")] * 5000)
    with pytest.raises(StorageDenied):
        until_answered("store it", lambda: call(left), denied_s=10)
    assert sum(slept) == 10


def test_an_outage_before_a_refusal_does_not_count_as_one(slept: list[float]) -> None:
    left = answers(*[StorageUnavailable("away")] * 5000, *[StorageDenied("no")] * 9)
    assert until_answered("store it", lambda: call(left), denied_s=10) == "stored"


def test_a_lasting_refusal_is_raised_at_once(slept: list[float]) -> None:
    left = answers(StorageDenied("no", lasting=True))
    with pytest.raises(StorageDenied):
        until_answered("store it", lambda: call(left))
    assert slept == []
