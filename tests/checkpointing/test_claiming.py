from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from spotfirst import events
from spotfirst.checkpoints.claiming import wait_for_claim
from spotfirst.errors import ClaimLost
from spotfirst.heartbeat import ExitReport, Heartbeat
from spotfirst.market import Market, Notice, Pool
from spotfirst.run import Run
from tests.checkpointing.conftest import LONG_AGO
from tests.checkpointing.storages import Outage


class Waiting:
    """A stepped clock, on which things happen at given seconds."""

    def __init__(self, run: Run, **happens: Callable[[], object]) -> None:
        self.run = run
        self.now_s = 0.0
        self.happens = {float(name[1:].replace("_", ".")): act for name, act in happens.items()}

    def sleep(self, seconds: float) -> None:
        assert self.now_s < 1000, "nobody would ever claim"
        self.now_s += seconds
        for at in [at for at in self.happens if at <= self.now_s]:
            self.happens.pop(at)()

    def clock(self) -> datetime:
        return LONG_AGO + timedelta(seconds=self.now_s)

    def claim(self, attempt: int, leave: Callable[[], bool] = lambda: False) -> bool:
        return wait_for_claim(
            self.run, self.run.chain(), attempt, clock=self.clock, monotonic=lambda: self.now_s,
            sleep=self.sleep, leave=leave,
        )  # fmt: skip


def _holder(run: Run) -> int | None:
    return run.chain().refresh().holder


def _launch(run: Run, number: int) -> None:
    run.journal().decide(
        lambda _: events.Launching(
            attempt=number, token=f"t{number}", market=Market.SPOT,
            pool=Pool(instance_type="local", zone="a"), reason="test", at=LONG_AGO,
        )
        if not run.journal().refresh().attempts
        else None
    )  # fmt: skip


def test_a_free_chain_is_claimed_without_waiting(run: Run) -> None:
    waiting = Waiting(run)
    assert waiting.claim(1)
    assert (_holder(run), waiting.now_s) == (1, 0)


def test_another_process_of_the_attempt_that_holds_the_chain_need_not_wait(run: Run) -> None:
    before = run.chain()
    before.claim(1)
    waiting = Waiting(run)
    assert waiting.claim(1)
    assert waiting.now_s == 0
    with pytest.raises(ClaimLost):
        before.commit(1, step=1, manifest="m", digest="d", content="state")


def test_the_holder_is_asked_once_and_its_release_is_enough(run: Run) -> None:
    chain = run.chain()
    chain.claim(1)
    waiting = Waiting(run, s3=lambda: chain.release(1))
    assert waiting.claim(2)
    assert _holder(run) == 2
    assert waiting.now_s == pytest.approx(3, abs=0.2)
    handover = run.handover(1)
    assert handover is not None
    assert (handover.to, handover.at) == (2, LONG_AGO)


def test_a_holder_that_left_an_exit_report_is_not_waited_for(run: Run) -> None:
    run.chain().claim(1)
    report = ExitReport(attempt=1, at=LONG_AGO, cause="killed")
    waiting = Waiting(run, s3=lambda: run.report_exit(report))
    assert waiting.claim(2)
    assert waiting.now_s == pytest.approx(3, abs=0.2)


def test_a_holder_that_has_ended_in_the_journal_is_not_waited_for(run: Run) -> None:
    run.chain().claim(1)
    _launch(run, 1)
    ended = events.Ended(attempt=1, cause="lost", ended_at=LONG_AGO, at=LONG_AGO)
    waiting = Waiting(run, s3=lambda: run.journal().decide(
        lambda state: ended if state.open_attempts else None
    ))  # fmt: skip
    assert waiting.claim(2)
    assert waiting.now_s == pytest.approx(3, abs=0.8)


def test_a_holder_is_gone_shortly_after_its_interruption_time(run: Run) -> None:
    run.chain().claim(1)
    time = LONG_AGO + timedelta(seconds=20)
    notice = Notice(kind="interruption", seen_at=LONG_AGO, time=time)
    run.beat(Heartbeat(attempt=1, beat=1, at=LONG_AGO, phase="training", notice=notice))
    waiting = Waiting(run)
    assert waiting.claim(2)
    assert 20 < waiting.now_s < 24


def test_a_rebalance_recommendation_is_no_end(run: Run) -> None:
    run.chain().claim(1)
    notice = Notice(kind="rebalance", seen_at=LONG_AGO, time=LONG_AGO)
    run.beat(Heartbeat(attempt=1, beat=1, at=LONG_AGO, phase="training", notice=notice))
    waiting = Waiting(run)
    assert waiting.claim(2)
    assert waiting.now_s >= 120


def test_a_silent_holder_is_fenced_when_patience_ends(run: Run) -> None:
    chain = run.chain()
    chain.claim(1)
    waiting = Waiting(run)
    assert waiting.claim(2)
    assert waiting.now_s == pytest.approx(120, abs=0.5)
    with pytest.raises(ClaimLost):
        chain.commit(1, step=1, manifest="m", digest="d", content="state")


def test_a_heartbeat_that_cannot_be_read_leaves_it_to_patience(run: Run) -> None:
    run.chain().claim(1)
    run.storage.write("attempts/1/heartbeat.json", b'{"v":99}')
    waiting = Waiting(run)
    assert waiting.claim(2)
    assert waiting.now_s == pytest.approx(120, abs=0.5)


def test_patience_begins_again_with_a_new_holder(run: Run) -> None:
    run.chain().claim(1)
    waiting = Waiting(run, s100=lambda: run.chain().claim(2))
    assert waiting.claim(3)
    assert waiting.now_s == pytest.approx(220, abs=1)
    handover = run.handover(2)
    assert handover is not None
    assert handover.to == 3


def test_a_newer_holder_is_not_waited_for(run: Run) -> None:
    run.chain().claim(3)
    with pytest.raises(ClaimLost) as lost:
        Waiting(run).claim(2)
    assert lost.value.holder == 3


def test_losing_the_race_for_the_claim_to_a_newer_attempt_ends_the_wait(run: Run) -> None:
    run.chain().claim(1)
    waiting = Waiting(run, s3=lambda: run.chain().claim(3))
    with pytest.raises(ClaimLost):
        waiting.claim(2)


def test_one_that_is_told_to_leave_does_not_claim(run: Run) -> None:
    run.chain().claim(1)
    waiting = Waiting(run)
    assert not waiting.claim(2, leave=lambda: waiting.now_s > 5)
    assert _holder(run) == 1


def test_an_unreachable_storage_is_waited_for(run: Run) -> None:
    outage = Outage()
    outage.begin()
    waiting = Waiting(Run(outage.over(run.root), "r"), s30=outage.end)
    assert waiting.claim(1)
    assert _holder(run) == 1
    assert waiting.now_s >= 30
