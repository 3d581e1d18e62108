"""One checkpoint of several ranks: each writes its part, the first merges them. Torch-free.

Each rank writes its own packs, and then a *part*: an object that says what it wrote. Rank 0 waits
for the parts of all ranks, makes one manifest of them and commits it. So the ranks need not talk to
each other while they save; and when one of them dies, nothing is committed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from spotfirst.checkpoints.manifest import (
    MAX_MANIFEST_BYTES,
    ArrayRef,
    Made,
    PackRef,
    Part,
    RankState,
    Shard,
    StateManifest,
)
from spotfirst.checkpoints.statetree import renumber, walk_leaves
from spotfirst.errors import SpotfirstError, StateMismatch
from spotfirst.patience import Sleep
from spotfirst.storage import Storage
from spotfirst.wire import Record, decode, encode

__all__ = [
    "Merger",
    "Piece",
    "RankPart",
    "Team",
    "hand_in",
    "merge",
    "part_name",
    "rank_trees",
    "unlike",
    "wait_for_parts",
]

_POLL_S = (0.01, 0.5)
"""How long to wait between two looks: at first, and at most."""


@dataclass(frozen=True)
class Team:
    """Which of how many ranks this process is."""

    rank: int
    size: int


class Piece(Record, array_like=True):
    """Array number ``array`` of a part is the region from ``offset`` on of the array ``key``.

    ``shape`` is that of the whole array, which the ranks have in common.
    """

    key: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    array: int


class RankPart(Record):
    """What one rank has written of a checkpoint.

    The trees in ``state`` are over ``arrays``. Only rank 0 has ``made``, and the trees in ``objects``:
    they are over ``keys``. ``layout`` is the same on all ranks when the names and shapes of their common
    objects are, ``sample`` when some values of their plain tensors are. With ``error``, the rank
    could not save.
    """

    rank: int
    step: int
    packs: tuple[PackRef, ...] = ()
    arrays: tuple[ArrayRef, ...] = ()
    pieces: tuple[Piece, ...] = ()
    state: RankState = RankState()
    objects: dict[str, Any] = {}
    keys: tuple[str, ...] = ()
    made: dict[str, Made] = {}
    layout: str = ""
    sample: str = ""
    new_bytes: int = 0
    error: str = ""


def part_name(claim: int, save: int, rank: int) -> str:
    """The name of a part, below the run's ``packs/``. It ages as the packs of its save do."""
    return f"{claim:08d}/{save:06d}-{rank:05d}.part.json"


def hand_in(packs: Storage, claim: int, save: int, part: RankPart) -> None:
    """Write a part, after all the packs that it names."""
    packs.write(part_name(claim, save, part.rank), encode(part))


def wait_for_parts(
    packs: Storage,
    claim: int,
    save: int,
    ranks: Sequence[int],
    *,
    limit_s: float,
    stop: Callable[[], bool] = lambda: False,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Sleep = time.sleep,
) -> list[RankPart]:
    """The parts of ``ranks``, once they are all there.

    Raises :class:`TimeoutError` when one is not there after ``limit_s``, or when ``stop`` says so,
    and :class:`SpotfirstError` when a rank says that it could not save.
    """
    end = monotonic() + limit_s
    parts = []
    for rank in ranks:
        name = part_name(claim, save, rank)
        delay_s = _POLL_S[0]
        while (data := packs.read_or_none(name, limit_bytes=MAX_MANIFEST_BYTES)) is None:
            if stop() or monotonic() >= end:
                msg = f"rank {rank} has not saved its part within {limit_s:g} s; is it alive?"
                raise TimeoutError(msg)
            sleep(delay_s)
            delay_s = min(delay_s * 1.5, _POLL_S[1])
        part = decode(data, RankPart, path=f"{packs.url}/{name}")
        if part.error:
            msg = f"rank {rank} could not save its part: {part.error}"
            raise SpotfirstError(msg)
        parts.append(part)
    return parts


class Merger:
    """Puts parts together: one table of packs, one of arrays."""

    def __init__(self) -> None:
        self._packs: dict[str, int] = {}
        self._refs: list[PackRef] = []
        self.arrays: list[ArrayRef] = []

    @property
    def packs(self) -> tuple[PackRef, ...]:
        """All packs that the arrays name."""
        return tuple(self._refs)

    def own(self, part: RankPart, number: int) -> int:
        """Take one of a part's arrays as it is; its new number."""
        array = part.arrays[number]
        self.arrays.append(
            ArrayRef(dtype=array.dtype, shape=array.shape, parts=self._moved(part, array))
        )
        return len(self.arrays) - 1

    def whole(self, key: str, pieces: Sequence[tuple[RankPart, Piece]]) -> int:
        """Make one array of the pieces that ranks have of it; its number.

        Raises :class:`StateMismatch` when they do not make it up.
        """
        if not pieces:
            msg = f"{key}: no rank has saved it"
            raise StateMismatch(msg)
        shape = pieces[0][1].shape
        dtypes = {part.arrays[piece.array].dtype for part, piece in pieces}
        if len(dtypes) > 1 or any(piece.shape != shape for _, piece in pieces):
            msg = f"{key} has another type or shape on each rank: {sorted(dtypes)}, {shape}"
            raise StateMismatch(msg)
        shards = sorted(
            (
                Shard(
                    offset=piece.offset,
                    shape=part.arrays[piece.array].shape,
                    parts=self._moved(part, part.arrays[piece.array]),
                )
                for part, piece in pieces
                if math.prod(part.arrays[piece.array].shape)
            ),
            key=lambda shard: shard.offset,
        )
        if sum(math.prod(shard.shape) for shard in shards) != math.prod(shape):
            msg = (
                f"{key}: what the ranks have saved of it does not make up its shape {shape}. A "
                "sharded tensor is to be sharded over all ranks that save"
            )
            raise StateMismatch(msg)
        (dtype,) = dtypes
        if len(shards) == 1:
            array = ArrayRef(dtype=dtype, shape=shape, parts=shards[0].parts)
        else:
            array = ArrayRef(dtype=dtype, shape=shape, shards=tuple(shards))
        self.arrays.append(array)
        return len(self.arrays) - 1

    def _moved(self, part: RankPart, array: ArrayRef) -> tuple[Part, ...]:
        return tuple(
            msgspec.structs.replace(each, pack=self._pack(part.packs[each.pack]))
            for each in array.parts
        )

    def _pack(self, ref: PackRef) -> int:
        if ref.name not in self._packs:
            self._packs[ref.name] = len(self._refs)
            self._refs.append(ref)
        return self._packs[ref.name]


def merge(parts: Sequence[RankPart]) -> StateManifest:
    """One manifest of the parts of all ranks, in their order.

    What ranks have of an object that all share (buffers that differ from rank to rank) is dropped
    where all have the same. Raises :class:`StateMismatch` when the parts do not fit each other.
    """
    first = parts[0]
    for part in parts:
        if (part.layout, part.step) != (first.layout, first.step):
            msg = (
                f"rank {part.rank}'s modules and optimizers have other names or shapes than rank "
                f"{first.rank}'s (or another step: {part.step}, {first.step}). Objects that are "
                "not the same on all ranks go through torch.distributed.checkpoint, with "
                "spotfirst.distributed.SpotfirstWriter"
            )
            raise StateMismatch(msg)
    merger = Merger()
    pieces: dict[str, list[tuple[RankPart, Piece]]] = {}
    for part in parts:
        for piece in part.pieces:
            pieces.setdefault(piece.key, []).append((part, piece))
    numbers = [merger.whole(key, pieces.get(key, [])) for key in first.keys]
    objects = {
        name: renumber(tree, lambda number: numbers[number]) for name, tree in first.objects.items()
    }
    same = {name for name in first.objects if _is_same(parts, name)}
    ranks = []
    for part in parts:
        taken: dict[int, int] = {}

        def number(old: int, part: RankPart = part, taken: dict[int, int] = taken) -> int:
            if old not in taken:
                taken[old] = merger.own(part, old)
            return taken[old]

        own = {
            name: renumber(tree, number)
            for name, tree in part.state.objects.items()
            if name not in same
        }
        ranks.append(RankState(objects=own, rng=renumber(part.state.rng, number)))
    return StateManifest(
        step=first.step, packs=merger.packs, arrays=tuple(merger.arrays), objects=objects,
        ranks=tuple(ranks), made=first.made,
    )  # fmt: skip


def unlike(parts: Sequence[RankPart]) -> list[int]:
    """The ranks whose plain tensors have other values than rank 0's, by a few samples."""
    return [part.rank for part in parts if part.sample != parts[0].sample]


def _is_same(parts: Sequence[RankPart], name: str) -> bool:
    return len({_content(part, part.state.objects.get(name)) for part in parts}) == 1


def _content(part: RankPart, tree: Any) -> tuple[Any, ...]:
    return tuple(
        (path, array.dtype, array.shape, tuple(each.digest for each in array.parts))
        for path, _, number in walk_leaves(tree)
        for array in [part.arrays[number]]
    )


def rank_trees(manifest: StateManifest, rank: int, size: int) -> dict[str, Any]:
    """The trees by object for ``rank`` of ``size``: the common ones, and its own.

    At the number of ranks that it was saved by, a rank gets what it had of the common ones too.
    """
    if not manifest.ranks:
        return dict(manifest.objects)
    own = manifest.ranks[rank % len(manifest.ranks)].objects
    trees = {**own, **manifest.objects}
    if len(manifest.ranks) == size:
        for name in own.keys() & manifest.objects.keys():
            numbers = {path: number for path, _, number in walk_leaves(own[name])}
            trees[name] = _overlaid(manifest.objects[name], numbers)
    return trees


def _overlaid(tree: Any, own: Mapping[str, int]) -> Any:
    """A common object's tree in which the arrays named in ``own`` are a rank's own."""
    moved = {number: own[name] for name, _, number in walk_leaves(tree) if name in own}
    return renumber(tree, lambda number: moved.get(number, number))
