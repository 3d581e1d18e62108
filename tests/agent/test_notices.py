"""Notices, under the rules of IMDSv2."""

from __future__ import annotations

import socket
from datetime import datetime, timezone

import pytest

from spotfirst.agent.notices import NoticeSource
from spotfirst.market import Notice

from .conftest import Metadata

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def source(metadata: Metadata) -> NoticeSource:
    return NoticeSource(metadata.url, clock=lambda: NOW)


def test_404_means_no_notice(metadata: Metadata, source: NoticeSource) -> None:
    assert source.poll() is None
    assert [status for _, _, status in metadata.asked] == [200, 404, 404]


def test_an_interruption_carries_its_time(metadata: Metadata, source: NoticeSource) -> None:
    metadata.interruption = '{"action": "terminate", "time": "2026-01-01T00:02:00Z"}'
    time_ = datetime(2026, 1, 1, 0, 2, tzinfo=timezone.utc)
    assert source.poll() == Notice(kind="interruption", seen_at=NOW, time=time_)


def test_a_recommendation_has_no_time(metadata: Metadata, source: NoticeSource) -> None:
    metadata.recommend()
    assert source.poll() == Notice(kind="rebalance", seen_at=NOW)


def test_an_interruption_outranks_a_recommendation(
    metadata: Metadata, source: NoticeSource
) -> None:
    metadata.recommend()
    metadata.interrupt(120)
    found = source.poll()
    assert found is not None
    assert found.kind == "interruption"


def test_one_token_serves_many_polls(metadata: Metadata, source: NoticeSource) -> None:
    for _ in range(3):
        source.poll()
    assert [method for method, _, _ in metadata.asked].count("PUT") == 1


def test_an_expired_token_is_replaced_and_the_question_asked_again(
    metadata: Metadata, source: NoticeSource
) -> None:
    source.poll()
    metadata.tokens.clear()
    metadata.interrupt(120)
    assert source.poll() is not None
    assert [(m, s) for m, _, s in metadata.asked[-3:]] == [("GET", 401), ("PUT", 200), ("GET", 200)]


@pytest.mark.parametrize("status", [200, 301, 403, 500, 503])
def test_an_answer_that_is_no_notice_is_no_notice(
    metadata: Metadata, source: NoticeSource, status: int
) -> None:
    metadata.status = status
    assert source.poll() is None


@pytest.mark.parametrize(
    "body",
    ["", "null", "[]", "{}", '{"action": "terminate"}', '{"action": "terminate", "time": 3}',
     '{"action": "none", "time": "2026-01-01T00:02:00Z"}', '{"action": "stop", "time": "soon"}'],
)  # fmt: skip
def test_a_notice_that_makes_no_sense_is_no_notice(
    metadata: Metadata, source: NoticeSource, body: str
) -> None:
    metadata.interruption = body
    assert source.poll() is None


def test_a_machine_without_a_metadata_service_has_no_notice() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        assert NoticeSource(f"http://127.0.0.1:{closed.getsockname()[1]}").poll() is None


def test_a_service_that_never_answers_is_left_soon() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert NoticeSource(url, timeout_s=0.1).poll() is None
