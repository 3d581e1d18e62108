"""The order of samples, computed instead of stored: enter it at any position, at once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

__all__ = ["SampleOrder"]

_MASK = (1 << 64) - 1
_ROUNDS = 8


class SampleOrder:
    """An endless, seeded order over ``length`` samples, reshuffled every epoch.

    ``order[position]`` is an index from 0 to ``length - 1``. Positions 0 to ``length - 1`` are
    epoch 0 and hold every index once, the next ``length`` are epoch 1 in another order, and so
    on. Any position costs the same few microseconds and no memory, so a resumed run goes on at
    ``step * batch_size`` without replaying what came before.

    The same (length, seed) gives the same order on every machine and Python version.

    How: a Feistel network over a grid of ``rows`` by ``columns`` cells, barely larger than
    ``length``, walking on while it lands outside. Source: J. Black and P. Rogaway, "Ciphers with
    Arbitrary Finite Domains" (CT-RSA 2002), generalised Feistel and cycle walking.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            msg = f"an order over {length} samples has nothing to give; it needs at least 1"
            raise ValueError(msg)
        self.length = length
        self.seed = seed
        self._rows = math.isqrt(length - 1) + 1
        self._columns = -(-length // self._rows)
        self._keys: tuple[int, tuple[int, ...]] = (-1, ())

    def __repr__(self) -> str:
        return f"SampleOrder(length={self.length}, seed={self.seed})"

    def __getitem__(self, position: int) -> int:
        """The sample at ``position``, counted over all epochs from 0."""
        if position < 0:
            msg = f"position {position} is before the first one, 0"
            raise IndexError(msg)
        epoch, place = divmod(position, self.length)
        keys = self._round_keys(epoch)
        index = self._shuffle(place, keys)
        while index >= self.length:
            index = self._shuffle(index, keys)
        return index

    def __iter__(self) -> Iterator[int]:
        """All positions from 0 on. Never ends."""
        return map(self.__getitem__, itertools.count())

    def take(self, start: int, count: int) -> list[int]:
        """The samples at positions ``start`` to ``start + count - 1``."""
        return [self[position] for position in range(start, start + count)]

    def batch(self, step: int, size: int, *, rank: int = 0, world_size: int = 1) -> list[int]:
        """The part of one of ``world_size`` ranks of the batch of ``step``, counted from 0.

        ``size`` is that of the whole batch, over all ranks. Rank after rank, the parts make up
        the same batch at every world size, so a run can resume on another number of GPUs.
        """
        if not 0 <= rank < world_size:
            msg = f"rank {rank} is not one of 0 to {world_size - 1}"
            raise ValueError(msg)
        first, end = size * rank // world_size, size * (rank + 1) // world_size
        return self.take(step * size + first, end - first)

    def _round_keys(self, epoch: int) -> tuple[int, ...]:
        # One attribute, replaced whole: threads may share an order.
        known, keys = self._keys
        if known != epoch:
            state = _mix(_mix(self.seed & _MASK) ^ epoch)
            keys = tuple(_mix(state + number) for number in range(1, _ROUNDS + 1))
            self._keys = (epoch, keys)
        return keys

    def _shuffle(self, cell: int, keys: tuple[int, ...]) -> int:
        """One permutation of the grid's cells."""
        rows, columns = self._rows, self._columns
        column, row = divmod(cell, rows)
        for number, key in enumerate(keys):
            if number % 2:
                column = (column + _mix(row ^ key)) % columns
            else:
                row = (row + _mix(column ^ key)) % rows
        return column * rows + row


def _mix(value: int) -> int:
    """SplitMix64's step: 64 bits to 64 well-mixed bits (Steele, Lea, Flood, OOPSLA 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
