"""What the agent puts into the run's log about its trainer."""

from __future__ import annotations

import logging
import secrets

import msgspec
import pytest

from spotfirst.agent.logs import LogShipper
from spotfirst.agent.telling import Teller
from spotfirst.checkpoints.period import Period
from spotfirst.heartbeat import Progress
from spotfirst.run import Run
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now


@pytest.fixture
def teller() -> Teller:
    run = Run(open_storage(f"memory://{secrets.token_hex(8)}"), "r")
    logs = LogShipper(lambda _number, _data: None)
    return Teller(run, 1, logs, clock=utc_now, notice=lambda: None)


def test_the_trainers_period_is_logged_when_it_changes_by_more_than_a_quarter(
    teller: Teller, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for period_s in (10.0, 10.0, 12.0, 9.0, 13.0, 12.0):
            period = Period(period_s=period_s, reason="Young/Daly", cost_s=0.5)
            teller.take(Progress(step=1, period=period))
    assert caplog.messages == [
        "a checkpoint every 10 s: Young/Daly (cost 0.5 s)",
        "a checkpoint every 13 s: Young/Daly (cost 0.5 s)",
    ]


def test_what_the_trainer_decides_when_it_leaves_is_logged_once(
    teller: Teller, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress(step=1)
    with caplog.at_level(logging.INFO):
        for leaving in ((), ("9 s left: finishing",), ("9 s left: finishing", "5 s left: taking")):
            teller.take(msgspec.structs.replace(progress, leaving=leaving))
            teller.take(msgspec.structs.replace(progress, leaving=leaving))
    assert caplog.messages == ["leaving, 9 s left: finishing", "leaving, 5 s left: taking"]
