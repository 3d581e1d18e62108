"""A consistent copy of a training state, taken while the training goes on.

*Lazy*: parameters and optimizer state change in ``optimizer.step()`` and nowhere else. So between
two of those calls, that is during the forward and the backward pass, a background thread can copy
them; only ``optimizer.step()`` waits for the rest. What the forward pass itself may change (buffers
such as BatchNorm's, small tensors, random number generators, everything that is no tensor) is
copied at once.

What is copied lazily is written meanwhile, and then its memory is used again: as long as the writes
keep up with the training, a fraction of the state's size is enough. That saves memory, and faulting
it in, which takes longer than the copy.

*In place*: while the training waits for the checkpoint to be stored, as at an interruption notice,
large arrays are not copied at all, but hashed and stored from where they are.

A lazy copy proves itself: torch counts the in-place changes of a tensor, and the count must be the
same after the copy as at the snapshot; in place, after it is stored. A write that bypasses the
count (through ``.data``) is found by samples of the bytes. A snapshot that does not pass is dropped,
never committed.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch  # noqa: TID253 - this module copies tensors; only the Checkpointer's side imports it

from spotfirst.checkpoints.manifest import Made
from spotfirst.checkpoints.memory import ALIGNMENT, Arena, Lending, move
from spotfirst.checkpoints.packs import CHUNK_BYTES, PACK_BYTES, chunk_cuts, chunk_digest
from spotfirst.checkpoints.ranks import RankPart
from spotfirst.checkpoints.statetree import Leaf
from spotfirst.checkpoints.tensors import writable_bytes

__all__ = ["Block", "Plan", "Planner", "Snapshot", "Torn", "settled_until_step"]

_ITEM_ALIGNMENT = 64
_LAZY_FROM_BYTES = 256 << 10
"""Below this, watching a tensor costs more than copying it."""
_IN_PLACE_FROM_BYTES = PACK_BYTES // 8
"""Smaller arrays are stored together with others, which takes a copy."""
_EARLY_BLOCKS = 2
_SHARED_FROM_BYTES = 1 << 20
"""From here on several threads copy faster than one."""
_SAMPLE_BYTES = 64
_READY_BYTES = 4 * PACK_BYTES
"""What lazy copies begin with where the storage may keep up: as much as is written at once."""
_IN_TIME = 0.9
"""The share of the time until the state changes after which all is to be copied."""


class Torn(Exception):
    """Something changed while it was copied."""


@dataclass(frozen=True)
class Block:
    """Neighbouring chunks, about as large as a pack.

    ``cuts`` has (offset, size) within ``memory`` for each chunk, ``leaves`` the leaf it is of, and
    ``digests`` its digest, where that is known already. ``free`` is to be called once they are
    written: the memory may be used again.
    """

    memory: memoryview
    cuts: list[tuple[int, int]]
    leaves: list[int]
    digests: list[str | None]
    free: Callable[[], None]

    def hashed(self) -> list[str]:
        """The digests of all chunks."""
        return [
            known or chunk_digest(self.memory[start : start + size])
            for known, (start, size) in zip(self.digests, self.cuts, strict=True)
        ]


@dataclass
class _Span:
    """A block before it has memory: where it begins and ends in the layout, and its chunks."""

    start: int
    end: int
    movable: bool = False
    """Whether it is copied wherever there is memory, when its turn has come."""
    in_place: int | None = None
    """The leaf that it is a part of where that is; it has no place in the layout."""
    chunks: list[tuple[int, int, int, int]] = field(default_factory=list)
    """(leaf, offset in the leaf, size, offset in the span)"""


class Snapshot:
    """A training state after ``step`` finished steps, being copied to ``arena``.

    ``objects``, ``ranked`` and ``rng`` are trees over ``leaves``, and ``plan`` says how those are
    copied. ``taken_at`` is monotonic time, and the state changes about ``changes_in_s`` after it
    (``None``: nobody knows). At most ``memory_bytes`` of the arena are used: a larger state is
    copied piece by piece as earlier pieces are written, and the training waits meanwhile. What the
    plan stores in place must not change until it is stored: see :meth:`prove_stored`.
    """

    def __init__(
        self,
        *,
        step: int,
        objects: dict[str, Any],
        ranked: dict[str, Any],
        rng: Any,
        leaves: list[Leaf],
        metrics: dict[str, float],
        taken_at: float,
        arena: Arena,
        plan: Plan,
        memory_bytes: int | None = None,
        part: RankPart | None = None,
        made: Mapping[str, Made] = {},
        changes_in_s: float | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.step = step
        self.made = dict(made)
        """How optimizers and schedulers were made."""
        self.part = part
        """Of several ranks: what ``leaves`` are of the whole."""
        self.objects = objects
        self.ranked = ranked
        self.rng = rng
        self.leaves = leaves
        self.metrics = metrics
        self.taken_at = taken_at
        self._copied = threading.Event()
        self._spans, size = plan.spans, plan.copied_bytes
        self._piecemeal = memory_bytes is not None and size > memory_bytes
        room = max(PACK_BYTES + CHUNK_BYTES, memory_bytes or 0) if self._piecemeal else size
        self.size_bytes = plan.size_bytes
        """What is to be stored, with gaps."""
        self._arena = arena
        self._memory = arena.fit(room, pinned=plan.on_gpu)
        self._starts = plan.starts
        self._lending = Lending(0 if self._piecemeal else plan.fixed_bytes, self._memory.size_bytes)
        self._monotonic = monotonic
        self._in_time_s = (changes_in_s or 0.0) * _IN_TIME
        self._movable_bytes = size - plan.fixed_bytes
        self._moved_bytes = 0
        self._done: set[int] = set()
        self._lazy: dict[int, tuple[int, bytes]] = {}
        self._in_place = {number: _mark(leaves[number]) for number in plan.in_place}
        self._gpu_done: Any = None
        if not self._piecemeal:
            self._begin(plan)
            if not self._lazy and self._gpu_done is None:
                self._copied.set()

    # -- on the training thread -------------------------------------------------------------

    def wait_copied(self) -> bool:
        """Wait until the state may change again; whether that took any time."""
        if self._copied.is_set():
            return False
        if self._gpu_done is not None and not self._lazy:
            torch.cuda.current_stream().wait_event(self._gpu_done)  # the GPU waits, not this thread
            return False
        self._copied.wait()
        return True

    @property
    def is_copied(self) -> bool:
        """Whether the state may change."""
        return self._copied.is_set()

    @property
    def must_wait(self) -> bool:
        """Whether the training may not even begin its next step: there is not enough memory."""
        return self._piecemeal

    def _begin(self, plan: Plan) -> None:
        side = None
        for number, leaf in enumerate(self.leaves):
            if number in plan.in_place:
                continue
            if number not in plan.lazy:
                if leaf.size_bytes:
                    self._copy_now(number, leaf)
                continue
            value = leaf.value
            if value.is_cuda:
                side = side or _side_stream()
                with torch.cuda.stream(side):
                    self._view(number).copy_(value, non_blocking=True)
                    value.record_stream(side)
                self._done.add(number)
                continue
            self._lazy[number] = _mark(leaf)
        if side is not None:
            side.wait_stream(torch.cuda.current_stream())  # for what was copied at once
            self._gpu_done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._gpu_done.record(side)
        elif plan.on_gpu:
            torch.cuda.current_stream().synchronize()

    def _copy_now(self, number: int, leaf: Leaf) -> None:
        if leaf.plain and leaf.size_bytes < _SHARED_FROM_BYTES:
            move(self._memory.address + self._starts[number], leaf.address, leaf.size_bytes)
        elif isinstance(leaf.value, torch.Tensor):
            # The training stands still: all of torch's threads copy.
            self._view(number).copy_(leaf.value, non_blocking=leaf.value.is_cuda)
        else:
            start = self._starts[number]
            self._memory.view[start : start + leaf.size_bytes] = leaf.value

    # -- on the saving thread ---------------------------------------------------------------

    def blocks(self) -> Iterator[Block]:
        """The blocks, each whole in memory until it is freed; raises :class:`Torn`.

        Waits for the memory of earlier ones where there is no other.
        """
        try:
            if self._gpu_done is not None:
                self._gpu_done.synchronize()
            for span in self._spans:
                if span.in_place is not None:
                    yield self._where_it_is(span, span.in_place)
                    continue
                movable = self._piecemeal or span.movable
                size = span.end - span.start
                start = self._lending.take(size, self._limit) if movable else span.start
                self._arena.populate(start + size)
                free = partial(self._lending.give_back, start, size) if movable else _nothing
                memory = self._memory.view[start : start + size]
                block = Block(memory, [], [], [], free)
                for leaf, offset, length, position in span.chunks:
                    if movable:
                        self._copy_piece(leaf, offset, length, start + position)
                    elif leaf in self._lazy:
                        self._copy_lazily(leaf)
                    digest = None
                    if leaf in self._lazy:
                        # Now: it is in the processor's cache, and in a moment it is not.
                        digest = chunk_digest(memory[position : position + length])
                    block.cuts.append((position, length))
                    block.leaves.append(leaf)
                    block.digests.append(digest)
                self._moved_bytes += size if movable else 0
                yield block
            # Once more for all: this is the moment from which the state may change.
            self._prove(self._lazy, "before optimizer.step()")
        finally:
            self._copied.set()

    def prove_stored(self) -> None:
        """Raise :class:`Torn` if what was stored in place has changed since the snapshot.

        To be called once all is stored, and before it counts.
        """
        self._prove(self._in_place, "while its checkpoint was waited for")

    def _where_it_is(self, span: _Span, number: int) -> Block:
        _, start, _, _ = span.chunks[0]
        size = sum(length for _, _, length, _ in span.chunks)
        memory = writable_bytes(self.leaves[number].value)[start : start + size]
        cuts = [(position, length) for _, _, length, position in span.chunks]
        return Block(memory, cuts, [number] * len(cuts), [None] * len(cuts), _nothing)

    def _limit(self) -> tuple[int, float | None]:
        """Up to where memory is used, and how long that holds.

        Memory that is there is, at once. More is taken when the copy would otherwise come too late.
        """
        if self._piecemeal:
            return self._memory.size_bytes, None
        in_time_s = self._in_time_s * self._moved_bytes / self._movable_bytes
        ahead_s = in_time_s - (self._monotonic() - self.taken_at)
        if ahead_s <= 0:
            return self._memory.size_bytes, None
        return self._arena.populated_bytes, ahead_s

    def _prove(self, marks: dict[int, tuple[int, bytes]], when: str) -> None:
        for number, mark in marks.items():
            version, sample = _mark(self.leaves[number])
            if version != mark[0]:
                msg = f"a parameter or optimizer state was changed in place {when}"
                raise Torn(msg)
            if sample != mark[1]:
                msg = f"a parameter was changed through .data {when}"
                raise Torn(msg)

    def _copy_lazily(self, number: int) -> None:
        """The whole leaf: that it lies scattered is why it does not move."""
        if number not in self._done:
            self._done.add(number)
            self._view(number).copy_(self.leaves[number].value)

    def _copy_piece(self, number: int, offset: int, size: int, position: int) -> None:
        value = self.leaves[number].value
        if not isinstance(value, torch.Tensor):
            self._memory.view[position : position + size] = value[offset : offset + size]
        elif self.leaves[number].plain:
            move(self._memory.address + position, self.leaves[number].address + offset, size)
        else:
            item = value.element_size()
            flat = value.reshape(-1)[offset // item : (offset + size) // item]
            target = torch.frombuffer(
                self._memory.view[position : position + size], dtype=torch.uint8
            )
            target.view(value.dtype).copy_(flat)

    # -- both -------------------------------------------------------------------------------

    def _view(self, number: int) -> torch.Tensor:
        leaf = self.leaves[number]
        start = self._starts[number]
        raw = torch.frombuffer(
            self._memory.view[start : start + leaf.size_bytes], dtype=torch.uint8
        )
        return raw.view(leaf.value.dtype).view(leaf.shape)


@dataclass(frozen=True)
class Plan:
    """How a state is copied: where each leaf goes, and which are copied lazily."""

    spans: list[_Span]
    starts: dict[int, int]
    copied_bytes: int
    fixed_bytes: int
    """Of what is copied to where ``starts`` says; the rest is copied wherever there is memory."""
    lazy: frozenset[int]
    on_gpu: bool
    in_place: frozenset[int] = frozenset()
    """What is not copied: ``spans`` have where it is."""
    in_place_bytes: int = 0

    @property
    def size_bytes(self) -> int:
        """What is stored, with the gaps between what is copied."""
        return self.copied_bytes + self.in_place_bytes

    @property
    def ready_bytes(self) -> int:
        """The memory to begin with where the storage may keep up with the training."""
        return min(self.copied_bytes, self.fixed_bytes + _READY_BYTES)


class Planner:
    """Makes plans, and keeps the last one as long as the leaves are where they were."""

    def __init__(self) -> None:
        self._signature: list[tuple[int, int]] = []
        self._plan: Plan | None = None

    def plan(
        self,
        leaves: list[Leaf],
        settled: Callable[[], frozenset[int]] = frozenset,
        *,
        in_place: bool = False,
    ) -> Plan:
        """A plan for ``leaves``. ``settled`` gives the addresses of what may be copied lazily.

        It is called only when a leaf has moved since the last plan. With ``in_place``, large
        arrays are not copied.
        """
        # Small ones are copied at once, wherever they are: generators' states are always new.
        signature = [
            (leaf.address if leaf.size_bytes >= _LAZY_FROM_BYTES else 0, leaf.size_bytes)
            for leaf in leaves
        ]
        signature.append((settled is frozenset, in_place))
        if self._plan is None or signature != self._signature:
            now = settled()
            stay = frozenset(n for n, leaf in enumerate(leaves) if in_place and _may_stay(leaf))
            waiting = frozenset(n for n, leaf in enumerate(leaves) if _is_lazy(leaf, now)) - stay
            spans, copied_bytes = _layout(leaves, waiting, stay)
            starts = {
                leaf: span.start + position
                for span in spans
                for leaf, offset, _, position in span.chunks
                if offset == 0 and leaf not in stay
            }
            fixed_bytes = min((s.start for s in spans if s.movable), default=copied_bytes)
            tensors = (leaf.value for leaf in leaves if isinstance(leaf.value, torch.Tensor))
            on_gpu = any(tensor.is_cuda for tensor in tensors)
            self._signature = signature
            stay_bytes = sum(leaves[number].size_bytes for number in stay)
            self._plan = Plan(
                spans, starts, copied_bytes, fixed_bytes, waiting, on_gpu, stay, stay_bytes
            )
        return self._plan


def _is_lazy(leaf: Leaf, settled: frozenset[int]) -> bool:
    value = leaf.value
    return (
        leaf.size_bytes >= _LAZY_FROM_BYTES
        and isinstance(value, torch.Tensor)
        and not value.is_inference()
        and value.untyped_storage().data_ptr() in settled
    )


def _may_stay(leaf: Leaf) -> bool:
    return (
        leaf.plain
        and leaf.size_bytes >= _IN_PLACE_FROM_BYTES
        and isinstance(leaf.value, torch.Tensor)
        and not leaf.value.is_inference()
    )


def settled_until_step(objects: Iterable[Any]) -> frozenset[int]:
    """Addresses of the memory that only ``optimizer.step()`` changes.

    It is that of the parameters and states of the torch optimizers among ``objects``, and of all
    parameters of a module that has one of those: a frozen backbone is not changed at all. Memory
    that a buffer shares is left out; and where there is no optimizer, nothing is known.
    """
    objects = list(objects)
    owned: set[int] = set()
    for each in objects:
        if isinstance(each, torch.optim.Optimizer):
            tensors = [p for group in each.param_groups for p in group["params"]]
            tensors += [
                value
                for state in each.state.values()
                if isinstance(state, dict)
                for value in state.values()
                if isinstance(value, torch.Tensor)
            ]
            owned.update(map(_address, tensors))
    buffers: set[int] = set()
    for each in objects:
        if isinstance(each, torch.nn.Module):
            addresses = set(map(_address, each.parameters()))
            if addresses & owned:
                owned |= addresses
            buffers.update(map(_address, each.buffers()))
    return frozenset(owned - buffers - {0})


def _address(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    if local.layout is not torch.strided or local.device.type == "meta":
        return 0
    return int(local.untyped_storage().data_ptr())


def _layout(
    leaves: list[Leaf], lazy: Collection[int], stay: Collection[int]
) -> tuple[list[_Span], int]:
    """Where each leaf goes, and which chunks go together; the bytes of all that is copied.

    What may ``stay`` where it is comes before everything: it can be stored at once.

    What is copied at once comes first and close together: scattered over all of the arena, small
    leaves would fault most of its pages in while the training waits. What may move comes last. The
    first blocks are small, so that writing begins early. A block begins at a multiple of 4096, for
    disks; so do large leaves.
    """
    spans = [span for number in sorted(stay) for span in _where(number, leaves[number])]
    stayed, end = len(spans), 0
    movable = {n for n in lazy if leaves[n].plain and not leaves[n].value.is_cuda}
    for number in sorted(range(len(leaves)), key=lambda n: (n in lazy, n in movable)):
        if number in stay:
            continue
        size = leaves[number].size_bytes
        moves = number in movable
        end = _up(end, ALIGNMENT if size >= _LAZY_FROM_BYTES else _ITEM_ALIGNMENT)
        for offset, length in chunk_cuts(size):
            copied = len(spans) - stayed
            most = PACK_BYTES if copied > _EARLY_BLOCKS else PACK_BYTES // 4
            last = spans[-1] if copied else None
            if last is None or last.movable != moves or end + length - last.start > most:
                end = _up(end, ALIGNMENT)
                spans.append(_Span(end, end, moves))
            spans[-1].chunks.append((number, offset, length, end - spans[-1].start))
            end += length
            spans[-1].end = end
    return spans, _up(end, ALIGNMENT)


def _where(number: int, leaf: Leaf) -> Iterator[_Span]:
    """The chunks of a leaf that stays where it is, as many together as fit into a pack."""
    together = PACK_BYTES // CHUNK_BYTES
    cuts = chunk_cuts(leaf.size_bytes)
    for first in range(0, len(cuts), together):
        begin = cuts[first][0]
        chunks = [(number, at, size, at - begin) for at, size in cuts[first : first + together]]
        yield _Span(0, 0, in_place=number, chunks=chunks)


def _up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


def _mark(leaf: Leaf) -> tuple[int, bytes]:
    """What tells whether a tensor has changed: torch's count of changes, and samples of bytes."""
    sample = _sample(leaf.address, leaf.size_bytes) if leaf.plain else b""
    return leaf.value._version, sample  # noqa: SLF001 - torch documents it so


def _sample(address: int, size: int) -> bytes:
    """Bytes from five places."""
    length = min(_SAMPLE_BYTES, size)
    places = (0, size // 4, size // 2, size - size // 4 - length, size - length)
    return b"".join(ctypes.string_at(address + max(0, place), length) for place in places)


def _nothing() -> None:
    """The memory of what does not move is the snapshot's until the next one."""


def _side_stream() -> Any:
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    return stream
