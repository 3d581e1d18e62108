"""What a process knows of the run that its writers and readers are about: one claim for all."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import threading
from collections.abc import Iterator

from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst.checkpoints.claiming import wait_for_claim
from spotfirst.checkpoints.packs import Location
from spotfirst.checkpoints.retention import Retention
from spotfirst.context import TrainerContext
from spotfirst.errors import InvalidSpec
from spotfirst.leaving import Drained
from spotfirst.patience import patiently
from spotfirst.run import Run

__all__ = ["Place", "Session", "session"]

_log = logging.getLogger(__name__)

Place = str | Run | TrainerContext | None
"""Where checkpoints are: a folder or URL, a run, or ``None`` for the attempt that we are."""


class Turns:
    """Lets one thread at a time in; of those that wait, the one with the lowest step first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        self._numbers = itertools.count()
        self._is_taken = False

    @contextlib.contextmanager
    def turn(self, step: int) -> Iterator[None]:
        """Wait for this thread's turn; it ends with the block."""
        with self._changed:
            mine = (step, next(self._numbers))
            heapq.heappush(self._waiting, mine)
            self._changed.wait_for(lambda: not self._is_taken and self._waiting[0] == mine)
            heapq.heappop(self._waiting)
            self._is_taken = True
        try:
            yield
        finally:
            with self._changed:
                self._is_taken = False
                self._changed.notify_all()


class Session:
    """The run, and our claim of its chain once this process has one."""

    def __init__(self, context: TrainerContext) -> None:
        self.run = context.run
        self.attempt = context.attempt
        self.chain: CheckpointChain = context.run.chain()
        self.retention: Retention | None = None
        self.claim = 0
        """The number of our claim in the chain; 0 before there is one."""
        self.saves = 0
        """Saves begun under the claim."""
        self.lock = threading.RLock()
        self.turns = Turns()
        """Who writes: saves that overlap take turns."""
        self.written: set[tuple[int, int]] = set()
        """Claims and saves of what this process has written."""
        self.committed: list[tuple[int, int]] = []
        """Save and step of each commit of this process, in their order."""
        self.known_of = ""
        """The manifest that :attr:`known` is of."""
        self.known: dict[str, Location] = {}
        """What need not be written again."""
        self._context = context

    def take(self) -> None:
        """Claim the chain, once; waits for the attempt before. Rank 0 does it for all.

        Raises :class:`ClaimLost`, and :class:`Drained` when the agent asks to stop meanwhile.
        """
        with self.lock:
            if self.claim:
                return
            if self.attempt is None:
                holder = patiently(self.chain.refresh, what="read the run").holder
                attempt = (holder or 0) + 1
                patiently(lambda: self.chain.claim(attempt), what="claim the run")
                self.attempt = attempt
                self.retention = Retention()
            else:
                spec = patiently(self.run.spec, what="read the run's spec")
                if spec.checkpoint_mode != "trainer":
                    msg = (
                        f"run {self.run.run_id} has checkpoint_mode={spec.checkpoint_mode!r}: the "
                        "agent saves the files of $SPOTFIRST_CHECKPOINT_DIR. Ask for 'trainer' to "
                        "save with torch.distributed.checkpoint"
                    )
                    raise InvalidSpec(msg)
                self.retention = spec.retention
                channel = self._context.channel
                if not wait_for_claim(
                    self.run, self.chain, self.attempt,
                    leave=lambda: channel is not None and channel.drain() is not None,
                ):  # fmt: skip
                    raise Drained(0)
            self.claim = self.chain.claims[-1]
            self.saves = 0


_sessions: dict[tuple[str, int | None], Session] = {}
_lock = threading.Lock()


def session(place: Place) -> Session:
    """The session of this process for ``place``. Raises :class:`InvalidSpec` when there is none."""
    if isinstance(place, TrainerContext):
        context: TrainerContext | None = place
    elif isinstance(place, Run):
        context = TrainerContext(place, None)
    else:
        context = TrainerContext.find(place)
    if context is None:
        msg = "outside of a Spotfirst run, say where checkpoints are: storage='./checkpoints'"
        raise InvalidSpec(msg)
    key = (context.run.url, context.attempt)
    with _lock:
        if key not in _sessions:
            _sessions[key] = Session(context)
        return _sessions[key]
