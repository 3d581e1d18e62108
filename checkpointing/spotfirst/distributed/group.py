"""The ranks that train together: rank 0 leads, the others follow.

Only rank 0 reads the clock, the agent's channel and the chain; the others do what it says. They
meet at the end of a step: rank 0 broadcasts orders, the last of which names the step of the next
meeting. Meetings are about a quarter of a second apart, so a fast loop does not pay for them, and
all ranks snapshot the same step and leave at the same step.

When torchrun starts the ranks again after a crash, they claim anew, within the same attempt. For
that, set ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`` for torchrun: else new ranks may find the
addresses of the dead ones in its store (seen with torch 2.13 and gloo, also without Spotfirst).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from enum import IntEnum
from typing import NamedTuple, TypeVar

import torch  # noqa: TID253 - it is about torch's process groups
import torch.distributed as dist  # noqa: TID253

from spotfirst.checkpoints.ranks import Team
from spotfirst.errors import (
    CorruptObject,
    InvalidSpec,
    ObjectMissing,
    SpotfirstError,
    StateMismatch,
)

__all__ = ["MEETING_S", "Group", "Order", "Say", "find_group", "rank_here"]

_T = TypeVar("_T")

MEETING_S = 0.25
"""Between two meetings. An agent that has a notice looks at its own files as often."""
_PATIENCE = timedelta(days=1)
"""Rank 0 may wait long: for the attempt before, or for the storage. A dead peer is noticed at once."""


class Say(IntEnum):
    """What rank 0 says. All but ``SAVE`` end a meeting."""

    DONE = 0
    SAVE = 1
    DRAINED = 2
    SUPERSEDED = 3
    FAILED = 4


class Order(NamedTuple):
    """``value`` is a result, the number of a save, or who has taken over."""

    say: Say
    value: int
    next_meeting: int


class Group(Team):
    """A process group of our own, on the CPU, beside the one that trains."""

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size())
        self._monotonic = monotonic
        self._next = 0
        self._apart = 1
        self._met_step = 0
        self._met_at: float | None = None
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if self.size > 1 else None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def is_due(self, step: int) -> bool:
        """Whether all ranks meet after ``step`` finished steps."""
        return step >= self._next

    def met(self, step: int, interval_s: float) -> None:
        """Rank 0: choose the next meeting, from how long steps take. ``step`` has just ended."""
        now = self._monotonic()
        if self._met_at is not None and step > self._met_step:
            step_s = (now - self._met_at) / (step - self._met_step)
            # Not far ahead on the word of a few fast steps.
            most = 2 * self._apart
            self._apart = max(1, min(most, int(interval_s / step_s) if step_s > 0 else most))
        self._met_step, self._next = step, step + self._apart

    def say(self, say: Say, value: int = 0) -> None:
        """Rank 0: give an order to all."""
        self._broadcast(torch.tensor([say, value, self._next]))
        if say != Say.SAVE:
            self._met_at = self._monotonic()

    def hear(self) -> Order:
        """The others: wait for an order."""
        message = torch.zeros(3, dtype=torch.int64)
        self._broadcast(message)
        say, value, self._next = (int(number) for number in message)
        return Order(Say(say), value, self._next)

    def agree(self, action: Callable[[], _T]) -> _T:
        """The result of ``action``, which succeeds on all ranks or fails on all.

        Raises its own error, or :class:`CorruptObject` or :class:`StateMismatch` when another
        rank has one of that kind.
        """
        error: Exception | None = None
        result: list[_T] = []
        try:
            result.append(action())
        except Exception as own:  # noqa: BLE001 - raised below
            error = own
        damaged = isinstance(error, (CorruptObject, ObjectMissing))
        worst = torch.tensor([0 if error is None else 1 if damaged else 2])
        if self._group is not None:
            dist.all_reduce(worst, dist.ReduceOp.MAX, group=self._group)
        if error is not None and not (damaged and int(worst) == 2):
            raise error
        if int(worst) == 1:
            msg = "another rank cannot read its part of the checkpoint; its log says why"
            raise CorruptObject(msg)
        if int(worst) == 2:
            msg = "another rank cannot use the checkpoint; its log says why"
            raise StateMismatch(msg) from error
        return result[0]

    def _broadcast(self, message: torch.Tensor) -> None:
        if self._group is None:
            return
        try:
            dist.broadcast(message, 0, group=self._group)
        except RuntimeError as error:
            msg = f"rank {self.rank} has lost the other ranks, which cannot go on: {error}"
            raise SpotfirstError(msg) from error


def find_group(
    environment: Mapping[str, str] = os.environ,
    *,
    monotonic: Callable[[], float] = time.monotonic,
) -> Group | None:
    """The ranks that we are one of; ``None`` for a single process. All ranks call it.

    Raises :class:`InvalidSpec` when torchrun has started several processes that do not know each
    other yet: their process group is the script's to make.
    """
    if dist.is_available() and dist.is_initialized():
        return Group(monotonic=monotonic)
    world_size = environment.get("WORLD_SIZE", "1")
    if world_size not in {"", "1"}:
        msg = (
            f"WORLD_SIZE is {world_size}, and there is no process group: several Checkpointers "
            "that do not know of each other would take the run from each other. Call "
            "torch.distributed.init_process_group() before restore() or steps()"
        )
        raise InvalidSpec(msg)
    return None


def rank_here(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank, as far as it is known before there is a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    rank = environment.get("RANK", "0")
    alone = environment.get("WORLD_SIZE", "1") in {"", "1"}
    return int(rank) if rank.isdigit() and not alone else 0
