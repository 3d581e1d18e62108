"""Notices, under the rules of IMDSv2."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import pytest

from spotfirst.agent import listening
from spotfirst.agent.listening import Listener
from spotfirst.agent.notices import NoticeSource
from spotfirst.agent.settings import Settings
from spotfirst.market import Notice
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from tests.waiting import PATIENCE_S, wait_until

from .conftest import Lab, Metadata

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


TROUBLE = {
    "refuses": ({"status": 403}, "status 403"),
    "is overloaded": ({"status": 503}, "status 503"),
    "answers garbage": ({"status": 200}, "an error page"),
    "sends an odd notice": ({"interruption": '{"action": "perhaps"}'}, "perhaps"),
    "sends a notice of another millennium": (
        {"interruption": '{"action": "stop", "time": "9999-12-31T23:59:59Z"}'},
        "9999",
    ),
}


def listener(
    run: Run, url: str, said: list[str], *, on_notice: Callable[[], None] = lambda: None
) -> Listener:
    folder = Path(run.url)
    settings = Settings(
        storage_url=run.root.url, run_id="r", attempt=1, workdir=folder, cache=folder,
        metadata_url=url,
    )  # fmt: skip
    return Listener(run, settings, clock=lambda: NOW, on_notice=on_notice, warn=said.append)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    spec = RunSpec(run_id="r", created_at=NOW, command=("true",))
    return create_run(open_storage(str(tmp_path)), spec)


@pytest.mark.parametrize("name", TROUBLE)
def test_a_service_that_does_not_tell_becomes_one_warning_that_says_what_it_does(
    metadata: Metadata, run: Run, name: str
) -> None:
    changes, reason = TROUBLE[name]
    for field, value in changes.items():
        setattr(metadata, field, value)
    said: list[str] = []
    heard = listener(run, metadata.url, said)
    heard.start(notice_poll_s=0.01, handover_poll_s=60)
    wait_until(lambda: len(metadata.asked) > 40)
    heard.stop()
    [text] = said
    assert "interruption notices cannot be heard" in text
    assert reason in text
    assert metadata.url in text


class Moody(Metadata):
    """Fails four questions, which are two to four looks, and answers the next four."""

    @property  # type: ignore[override]
    def status(self) -> int | None:
        return 503 if len(self.asked) % 8 < 4 else None

    @status.setter
    def status(self, _: object) -> None:
        pass


def test_a_service_that_fails_now_and_then_is_no_warning(run: Run) -> None:
    said: list[str] = []
    metadata = Moody()
    heard = listener(run, metadata.url, said)
    heard.start(notice_poll_s=0.01, handover_poll_s=60)
    wait_until(lambda: len(metadata.asked) > 60)
    heard.stop()
    metadata.close()
    assert said == []


def test_a_notice_is_heard_as_soon_as_the_service_answers_again(
    metadata: Metadata, run: Run
) -> None:
    said: list[str] = []
    metadata.status = 503
    noticed = threading.Event()
    heard = listener(run, metadata.url, said, on_notice=noticed.set)
    heard.start(notice_poll_s=0.01, handover_poll_s=60)
    wait_until(lambda: bool(said))
    metadata.interrupt(120)
    metadata.status = None
    assert noticed.wait(PATIENCE_S)
    heard.stop()


def test_the_warning_reaches_the_run(lab: Lab) -> None:
    lab.metadata.status = 503
    instance = lab.start(lab.shell("sleep 600"))
    beat = instance.until(lambda b: bool(b.progress.warnings))
    assert "interruption notices cannot be heard" in beat.progress.warnings[0]
    instance.hand_over()
    instance.exit()


def test_a_service_that_never_ends_an_answer_is_a_warning_too(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "_STUCK_S", 0.3)
    over = threading.Event()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def drip() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
                while not over.wait(0.05):
                    connection.sendall(b"z")

        threading.Thread(target=drip, daemon=True).start()
        said: list[str] = []
        heard = listener(run, f"http://127.0.0.1:{server.getsockname()[1]}", said)
        heard.start(notice_poll_s=0.01, handover_poll_s=0.05)
        wait_until(lambda: bool(said))
        heard.stop()
        over.set()
    assert "has not finished one answer" in said[0]
