"""What a process knows of the run that its writers and readers are about: one claim for all."""

from __future__ import annotations

import gc
import logging
import sys
import threading
from types import FrameType

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

_LOOK_S = 1.0
"""Between two looks whether another save is over."""

Place = str | Run | TrainerContext | None
"""Where checkpoints are: a folder or URL, a run, or ``None`` for the attempt that we are."""


class Turns:
    """Lets one save at a time in; of those that are under way, the one with the lowest step first.

    Each save is a call of ``dcp.save`` in a thread. One that fails does not always say so: it is over
    when its thread is out of that call.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._steps: dict[int, int] = {}
        self._holder: int | None = None

    def arrive(self, step: int) -> None:
        """The current thread begins a save."""
        self.give()
        with self._changed:
            self._steps[threading.get_ident()] = step

    def take(self) -> None:
        """Wait for this thread's turn, which lasts until :meth:`give`."""
        me = threading.get_ident()
        with self._changed:
            while not self._is_next(me):
                self._changed.wait(_LOOK_S)
            self._holder = me

    def give(self) -> None:
        """The current thread's save is over."""
        me = threading.get_ident()
        with self._changed:
            self._steps.pop(me, None)
            if self._holder == me:
                self._holder = None
            self._changed.notify_all()

    def _is_next(self, me: int) -> bool:
        frames = _current_frames()
        self._steps = {
            thread: step
            for thread, step in self._steps.items()
            if thread == me or _is_saving(frames.get(thread))
        }
        if self._holder is not None and self._holder in self._steps:
            return False
        return min(self._steps, key=self._steps.__getitem__) == me


def _current_frames() -> dict[int, FrameType]:
    """What every thread is doing now.

    Without garbage collection: before Python 3.12, one that frees a value of
    :class:`threading.local` waits for ever for a lock that the call itself holds
    (https://github.com/python/cpython/issues/106883).
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()  # noqa: SLF001 - documented, in spite of its name
    finally:
        if was_enabled:
            gc.enable()


def _is_saving(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict_saver":
            return True
        frame = frame.f_back
    return False


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
