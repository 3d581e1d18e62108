"""Reading a region of a stored array, however it was cut into shards: what to read, what to copy.

A chunk is read whole, because only so it can be verified. What lies in the target as it lies in the
storage is read right there; the rest goes through memory of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch  # noqa: TID253 - this module fills tensors; only the Checkpointer's side imports it

from spotfirst.checkpoints.manifest import ArrayRef, PackRef, Part, Shard
from spotfirst.checkpoints.packs import Wanted
from spotfirst.checkpoints.statetree import ITEM_BYTES
from spotfirst.checkpoints.tensors import is_plain, writable_bytes

__all__ = ["RegionPlan"]


class RegionPlan:
    """What to read (:attr:`wanted`), and what to do once it is read (:meth:`finish`)."""

    def __init__(self, packs: Sequence[PackRef]) -> None:
        self._packs = packs
        self._copies: list[Callable[[], None]] = []
        self.wanted: list[Wanted] = []

    def add(self, array: ArrayRef, offset: Sequence[int], target: torch.Tensor) -> None:
        """Fill ``target`` with the region from ``offset`` on of ``array`` that has its shape.

        A target of another element type or device gets the values converted.
        """
        for shard in array.regions:
            starts = [max(a, b) for a, b in zip(shard.offset, offset, strict=True)]
            ends = [
                min(a + n, b + m)
                for a, n, b, m in zip(
                    shard.offset, shard.shape, offset, target.shape, strict=True
                )
            ]  # fmt: skip
            size = [end - start for start, end in zip(starts, ends, strict=True)]
            if any(n <= 0 for n in size):
                continue
            view = target
            for dimension, (start, base, n) in enumerate(zip(starts, offset, size, strict=True)):
                view = view.narrow(dimension, start - base, n)
            inner = [start - base for start, base in zip(starts, shard.offset, strict=True)]
            self._add_overlap(array, shard, inner, size, view)

    def finish(self) -> None:
        """Copy what was not read to its place."""
        for copy in self._copies:
            copy()
        self._copies = []
        self.wanted = []

    def _add_overlap(
        self, array: ArrayRef, shard: Shard, inner: list[int], size: list[int], view: torch.Tensor
    ) -> None:
        item = ITEM_BYTES[array.dtype]
        strides = _strides(shard.shape)
        first = sum(i * s for i, s in zip(inner, strides, strict=True))
        last = first + sum((n - 1) * s for n, s in zip(size, strides, strict=True))
        start, end = first * item, (last + 1) * item
        dtype = getattr(torch, array.dtype)
        if end - start == math.prod(size) * item and view.dtype == dtype and is_plain(view):
            self._read_there(shard, start, end, writable_bytes(view))
            return
        base, raw = self._read_aside(shard, start, end)

        def copy() -> None:
            data = raw[start - base : end - base]
            if (start - base) % item:
                data = data.clone()
            view.copy_(data.view(dtype).as_strided(size, strides))

        self._copies.append(copy)

    def _read_there(self, shard: Shard, start: int, end: int, memory: memoryview) -> None:
        """The chunks of bytes ``start`` to ``end`` of a shard, into ``memory`` of that size."""
        position = 0
        for part in shard.parts:
            begin, position = position, position + part.size_bytes
            if position <= start or begin >= end:
                continue
            if start <= begin and position <= end:
                target = memory[begin - start : position - start]
            else:
                target = memoryview(bytearray(part.size_bytes))
                a, b = max(begin, start), min(position, end)
                here, there = memory[a - start : b - start], target[a - begin : b - begin]
                self._copies.append(lambda here=here, there=there: _assign(here, there))  # type: ignore[misc]
            self._want(part, target)

    def _read_aside(self, shard: Shard, start: int, end: int) -> tuple[int, torch.Tensor]:
        """The same into memory of its own, and where in the shard that begins."""
        chosen: list[Part] = []
        position = 0
        base = 0
        for part in shard.parts:
            begin, position = position, position + part.size_bytes
            if position > start and begin < end:
                base = base if chosen else begin
                chosen.append(part)
        raw = torch.empty(sum(part.size_bytes for part in chosen), dtype=torch.uint8)
        memory = writable_bytes(raw)
        position = 0
        for part in chosen:
            self._want(part, memory[position : position + part.size_bytes])
            position += part.size_bytes
        return base, raw

    def _want(self, part: Part, target: memoryview) -> None:
        self.wanted.append(Wanted(self._packs[part.pack].name, part, target))


def _assign(target: memoryview, source: memoryview) -> None:
    target[:] = source


def _strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for dimension in range(len(shape) - 2, -1, -1):
        strides[dimension] = strides[dimension + 1] * max(1, shape[dimension + 1])
    return strides
