"""The bytes of stored arrays in their order, a bounded piece at a time. Torch-free.

Whoever writes them elsewhere says where each piece goes: a file, or memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from spotfirst.checkpoints.manifest import ArrayRef, Part, Shard, StateManifest
from spotfirst.checkpoints.memory import Block
from spotfirst.checkpoints.packs import Wanted, fetch
from spotfirst.checkpoints.statetree import ITEM_BYTES
from spotfirst.storage import Storage

__all__ = ["Piece", "Span", "pieces", "read_array", "stream"]

_BATCH_BYTES = 64 << 20


class Span(NamedTuple):
    """``size_bytes`` bytes from ``start`` on of a part, that belong at ``offset``."""

    start: int
    offset: int
    size_bytes: int


class Piece(NamedTuple):
    """A part, and where its bytes belong; there may be several places for each."""

    part: Part
    runs: tuple[Span, ...]


def pieces(array: ArrayRef, offsets: Iterable[int] = (0,)) -> Iterator[Piece]:
    """Where the parts of an array go in its row-major bytes, which begin at each of ``offsets``."""
    bases = tuple(offsets)
    for shard in array.regions:
        if not math.prod(shard.shape):
            continue
        runs = _shard_runs(array, shard)
        place, left = next(runs)
        for part in shard.parts:
            found: list[Span] = []
            start = 0
            while start < part.size_bytes:
                if not left:
                    place, left = next(runs)
                size = min(left, part.size_bytes - start)
                found += [Span(start, base + place, size) for base in bases]
                start, place, left = start + size, place + size, left - size
            yield Piece(part, tuple(found))


def stream(
    packs: Storage,
    manifest: StateManifest,
    wanted: Iterable[Piece],
    write: Callable[[int, memoryview], object],
    *,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> None:
    """Read pieces, several at once and verified, and hand each run to ``write(offset, bytes)``.

    Takes some 64 MiB of memory. Raises as :func:`fetch` does; some runs are written then.
    """
    memory: Block | None = None
    for batch in _batches(wanted):
        total = sum(piece.part.size_bytes for piece in batch)
        if memory is None or memory.size_bytes < total:
            memory = Block(max(total, _BATCH_BYTES))
        targets: list[memoryview] = []
        start = 0
        for piece in batch:
            targets.append(memory.view[start : start + piece.part.size_bytes])
            start += piece.part.size_bytes
        fetch(
            packs,
            [
                Wanted(manifest.packs[piece.part.pack].name, piece.part, t)
                for piece, t in zip(batch, targets, strict=True)
            ],
        )
        for piece, target in zip(batch, targets, strict=True):
            for run in piece.runs:
                write(run.offset, target[run.start : run.start + run.size_bytes])
        on_bytes(total)


def read_array(packs: Storage, manifest: StateManifest, array: ArrayRef) -> memoryview:
    """All bytes of one array, in memory."""
    whole = Block(array.size_bytes).view[: array.size_bytes]

    def write(offset: int, data: memoryview) -> None:
        whole[offset : offset + len(data)] = data

    stream(packs, manifest, pieces(array), write)
    return whole


def _batches(wanted: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in wanted:
        if batch and size + piece.part.size_bytes > _BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(piece)
        size += piece.part.size_bytes
    if batch:
        yield batch


def _shard_runs(array: ArrayRef, shard: Shard) -> Iterator[tuple[int, int]]:
    """(offset, size) in the array's bytes of what lies together in a shard, in its order."""
    strides = [ITEM_BYTES[array.dtype]]
    for size in reversed(array.shape[1:]):
        strides.insert(0, strides[0] * size)
    if not array.shape:
        yield 0, strides[0]
        return
    # Behind the last dimension that the shard has a section of, it has everything.
    cut = max(
        (d for d, size in enumerate(array.shape) if shard.shape[d] != size),
        default=0,
    )
    size_bytes = shard.shape[cut] * strides[cut]
    begin = sum(o * stride for o, stride in zip(shard.offset, strides, strict=True))
    index = [0] * cut
    while True:
        yield begin + sum(i * stride for i, stride in zip(index, strides, strict=False)), size_bytes
        for dimension in reversed(range(cut)):
            index[dimension] += 1
            if index[dimension] < shard.shape[dimension]:
                break
            index[dimension] = 0
        else:
            return
