"""How a new attempt gets the checkpoint chain from the one before: make before break.

The newcomer is warm when it asks. The holder takes a last checkpoint, releases, and goes; the
newcomer claims at once. A holder that is gone or silent is not waited for: the claim itself
fences it, because its next commit fails.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta

from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst.errors import FormatError, StorageDenied, StorageUnavailable
from spotfirst.heartbeat import Handover
from spotfirst.journal import Journal
from spotfirst.patience import DENIED_S, Sleep
from spotfirst.run import Run
from spotfirst.wire import Clock, utc_now

__all__ = ["HANDOVER_PATIENCE_S", "MOST_WAIT_S", "wait_for_claim"]

_log = logging.getLogger(__name__)

HANDOVER_PATIENCE_S = 120.0
"""How long a holder that was asked may take: the length of a spot notice."""
READY_PATIENCE_S = 300.0
"""How long to read beforehand at most, before the holder is asked. One with a notice drains by
itself before its time is up."""
MOST_WAIT_S = 900.0
"""How long a holder in files mode may wait for a save of its script before it hands over."""
_NOTICE_GRACE_S = 2.0
"""After its interruption time an instance is gone; clocks may differ by this much."""
_POLL_S = 0.15
_SLOW_POLLS = 4
"""The journal and the heartbeat, which seldom decide, are read at every fourth poll."""


def wait_for_claim(
    run: Run,
    chain: CheckpointChain,
    attempt: int,
    *,
    leave: Callable[[], bool] = lambda: False,
    is_ready: Callable[[], bool] = lambda: True,
    patience_s: float = HANDOVER_PATIENCE_S,
    clock: Clock = utc_now,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Sleep = time.sleep,
) -> bool:
    """Claim the chain for ``attempt``, when its holder has let go of it or cannot hold it.

    The holder is asked to hand over (``attempts/{holder}/handover.json``). It has let go when it
    released, left an exit report, is ended in the journal, or its interruption time is over; or
    ``patience_s`` after it was asked, or after it last said that it waits for a save. It is asked once ``is_ready`` says so, or after
    :data:`READY_PATIENCE_S`: until then it trains. ``leave`` is looked at between polls: when it says so, the
    wait ends without a claim and the result is ``False``.

    Raises :class:`ClaimLost` when a newer attempt holds the chain. An unreachable storage is
    waited for, and so is for :data:`~spotfirst.patience.DENIED_S` one that refuses.
    """
    journal = run.journal()
    asked_at: dict[int, float] = {}
    first_asked_at: dict[int, float] = {}
    seen_at: dict[int, float] = {}
    refused_at: float | None = None
    polls = 0
    while not leave():
        try:
            chain.refresh()
            holder = chain.holder
            # A newer holder is not waited for: claim() raises ClaimLost.
            if holder is None or chain.released or holder >= attempt:
                chain.claim(attempt)
                return True
            since_s = seen_at.setdefault(holder, monotonic())
            if holder not in asked_at and (is_ready() or monotonic() - since_s >= READY_PATIENCE_S):
                _log.info("attempt %d is ready and waits for attempt %d", attempt, holder)
                reason = f"attempt {attempt} is ready to take over"
                run.request_handover(holder, Handover(reason=reason, at=clock(), to=attempt))
                asked_at[holder] = monotonic()
            is_slow_poll = polls % _SLOW_POLLS == 0
            cause = _gone(run, journal if is_slow_poll else None, holder, clock)
            if holder in asked_at and is_slow_poll and _waits(run, holder, clock):
                waited_s = monotonic() - first_asked_at.setdefault(holder, asked_at[holder])
                if waited_s < MOST_WAIT_S:
                    asked_at[holder] = monotonic()
            if monotonic() - asked_at.get(holder, monotonic()) >= patience_s:
                cause = cause or f"has not released {patience_s:g} s after it was asked"
            if cause:
                _log.warning("attempt %d claims: attempt %d %s", attempt, holder, cause)
                chain.claim(attempt)
                return True
        except StorageUnavailable as error:
            _log.warning("the storage does not answer, waiting: %s", error)
        except StorageDenied as error:
            refused_at = monotonic() if refused_at is None else refused_at
            if error.lasting or monotonic() - refused_at >= DENIED_S:
                raise
            _log.warning("the storage refuses, waiting: %s", error)
        else:
            refused_at = None
        polls += 1
        sleep(_POLL_S)
    return False


def _waits(run: Run, holder: int, clock: Clock) -> bool:
    """Whether ``holder`` says that it waits for a save of its script."""
    try:
        heartbeat = run.heartbeat(holder)
    except FormatError:
        return False
    until = heartbeat.progress.waits_until if heartbeat else None
    return until is not None and clock() < until + timedelta(seconds=HANDOVER_PATIENCE_S)


def _gone(run: Run, journal: Journal | None, holder: int, clock: Clock) -> str:
    """Why ``holder`` cannot be alive any more; empty when it may be."""
    try:
        if run.exit_report(holder) is not None:
            return "has exited"
        if journal is None:
            return ""
        attempts = journal.refresh().attempts
        heartbeat = run.heartbeat(holder)
    except FormatError as error:  # then patience decides
        _log.warning("cannot read how attempt %d is doing: %s", holder, error)
        return ""
    if any(attempt.number == holder and not attempt.is_open for attempt in attempts):
        return "has ended, says the journal"
    notice = heartbeat.notice if heartbeat else None
    if notice is None or notice.kind != "interruption" or notice.time is None:
        return ""
    over = clock() >= notice.time + timedelta(seconds=_NOTICE_GRACE_S)
    return f"was to be interrupted at {notice.time:%H:%M:%S}" if over else ""
