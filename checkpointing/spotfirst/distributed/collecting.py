"""What each rank saves of a state, and where a checkpoint's arrays go on each rank.

Modules and optimizers are common to all ranks. Of a tensor that is sharded (DTensor) each rank
saves its own region, and one of several replicas does. A plain tensor is taken to be the same on
all ranks (as under DDP): one rank saves it, chosen so that all save about as much. What a module
has beside its parameters (BatchNorm's statistics) each rank saves: where they differ, each gets its
own back. All other objects, and the random number generators, are each rank's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch  # noqa: TID253 - it is about torch's objects
from blake3 import blake3
from torch.distributed.tensor import DTensor, Partial, Replicate  # noqa: TID253
from torch.distributed.tensor._utils import (  # noqa: TID253
    compute_local_shape_and_global_offset,
)

from spotfirst.checkpoints.manifest import Made, RankState, StateManifest
from spotfirst.checkpoints.ranks import Piece, RankPart, Team
from spotfirst.checkpoints.statetree import Leaf, flatten, walk_leaves
from spotfirst.checkpoints.tensors import TensorCollector
from spotfirst.checkpoints.wrappers import module_state
from spotfirst.errors import UnsupportedState

__all__ = ["Collected", "Region", "ShardCollector", "collect", "regions_of"]

_SPREAD_FROM_BYTES = 64 << 10
"""Smaller plain tensors are rank 0's."""
_SAMPLES = 8
_SAMPLED_ELEMENTS = 16


@dataclass(frozen=True)
class Region:
    """A live DTensor, this rank's part of it, and where that begins in the whole."""

    tensor: torch.Tensor
    local: torch.Tensor
    offset: tuple[int, ...]


@dataclass(frozen=True)
class Collected:
    """``objects`` are trees over ``leaves``: the whole state as this rank sees it.

    ``mine`` is what this rank saves; ``part`` says what that is, but for where it is written.
    """

    objects: dict[str, Any]
    leaves: list[Leaf]
    mine: list[Leaf]
    part: RankPart


class ShardCollector(TensorCollector):
    """Takes DTensors too: their local tensor, as a leaf that knows the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []
        """Where each leaf was met first."""
        self.regions: dict[int, Region] = {}
        self.replica: dict[int, tuple[int, int]] = {}
        """Of each sharded leaf, which of how many equal copies this rank has."""

    def take(self, value: Any, path: object) -> dict[str, int] | None:
        """The node of a tensor or an array; ``None`` when ``value`` is neither."""
        region = region_of(value, path) if isinstance(value, DTensor) else None
        node = super().take(region.local if region else value, path)
        if node is None:
            return None
        (number,) = node.values()
        if number == len(self.paths):
            self.paths.append(str(path))
            if region is not None:
                whole = (tuple(value.shape), region.offset)
                self.leaves[number] = replace(self.leaves[number], whole=whole)
                self.regions[number] = region
                self.replica[number] = _replica(value)
        return node


def region_of(value: DTensor, path: object) -> Region:
    """Which region of a DTensor this rank has. Raises :class:`UnsupportedState`."""
    if any(isinstance(placement, Partial) for placement in value.placements):
        msg = f"{path} is a DTensor with partial sums, which are no state; reduce it first"
        raise UnsupportedState(msg)
    with torch.no_grad():
        local = value.to_local()
    _, offset = compute_local_shape_and_global_offset(
        value.shape, value.device_mesh, value.placements
    )
    return Region(value.detach(), local.detach(), tuple(offset))


def _replica(value: DTensor) -> tuple[int, int]:
    coordinate = value.device_mesh.get_coordinate()
    if coordinate is None:  # this rank has no part in it
        return -1, 1
    number, count = 0, 1
    for dimension, placement in enumerate(value.placements):
        if isinstance(placement, Replicate):
            size = value.device_mesh.size(dimension)
            number, count = number * size + coordinate[dimension], count * size
    return number, count


def collect(states: Mapping[str, Any], generators: Any, common: Mapping[str, Any], *, step: int,
            team: Team, made: Mapping[str, Made] = {}) -> Collected:  # fmt: skip
    """What this rank saves of ``states`` (by object).

    ``common`` are the objects that all ranks share: modules and optimizers. ``made`` says how
    optimizers and schedulers were made.
    """
    shared = ShardCollector()
    objects = {name: flatten(states[name], shared, name) for name in states if name in common}
    own = TensorCollector()
    ranked = {name: flatten(states[name], own, name) for name in states if name not in common}
    rng = flatten(generators, own, "rng")
    layout = blake3()
    for name, tree in objects.items():
        for path, tag, number in walk_leaves(tree):
            leaf = shared.leaves[number]
            shape = leaf.whole[0] if leaf.whole else leaf.shape
            layout.update(f"{name}\n{path}\n{tag}\n{leaf.dtype}\n{shape}\n".encode())
    mine = list(own.leaves)
    saved: dict[int, int] = {}

    def save(number: int) -> int:
        if number not in saved:
            saved[number] = len(mine)
            mine.append(shared.leaves[number])
        return saved[number]

    beside = _beside_parameters(objects, shared, common)
    load = [0] * team.size
    pieces = []
    plain = [n for n in range(len(shared.leaves)) if n not in shared.replica and n not in beside]
    for number, leaf in enumerate(shared.leaves):
        if number in shared.replica:
            replica, count = shared.replica[number]
            chosen = replica == number % count
        elif number in beside or leaf.size_bytes < _SPREAD_FROM_BYTES:
            chosen = team.rank == 0
        else:
            rank = load.index(min(load))
            load[rank] += leaf.size_bytes
            chosen = rank == team.rank
        if chosen:
            shape, offset = leaf.whole or (leaf.shape, (0,) * len(leaf.shape))
            pieces.append(
                Piece(key=shared.paths[number], shape=shape, offset=offset, array=save(number))
            )
    for name, tree in objects.items():
        pairs = [
            [path, {tag: save(number)}]
            for path, tag, number in walk_leaves(tree)
            if number in beside
        ]
        if pairs:
            ranked[name] = {"dict": pairs}
    first = team.rank == 0
    part = RankPart(
        rank=team.rank, step=step, pieces=tuple(pieces),
        state=RankState(objects=ranked, rng=rng), layout=layout.hexdigest(),
        sample=_sample([shared.leaves[number].value for number in plain]),
        keys=tuple(shared.paths) if first else (), objects=objects if first else {},
        made=dict(made) if first else {},
    )  # fmt: skip
    # One numbering for both, for comparisons.
    return Collected(
        objects={**objects, **{n: t for n, t in ranked.items() if n not in common}},
        leaves=shared.leaves, mine=mine, part=part,
    )  # fmt: skip


def _sample(values: list[Any]) -> str:
    """A digest of the first elements of a few tensors: cheap, also where they are on a GPU."""
    hasher = blake3()
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.numel() and v.is_contiguous()]
    for value in tensors[:: max(1, len(tensors) // _SAMPLES)]:
        first = value.reshape(-1)[:_SAMPLED_ELEMENTS].cpu().resolve_conj().resolve_neg()
        hasher.update(first.view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _beside_parameters(
    objects: Mapping[str, Any], shared: ShardCollector, common: Mapping[str, Any]
) -> set[int]:
    """The plain leaves of modules that are no parameters."""
    found: set[int] = set()
    for name, tree in objects.items():
        module = common[name]
        if not isinstance(module, torch.nn.Module):
            continue
        parameters = {
            p.untyped_storage().data_ptr()
            for p in module.parameters()
            if not isinstance(p, DTensor) and p.device.type != "meta"
        }
        for _, _, number in walk_leaves(tree):
            value = shared.leaves[number].value
            if number not in shared.regions and not (
                isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in parameters
            ):
                found.add(number)
    return found


def regions_of(thing: Any, tree: Any, manifest: StateManifest) -> dict[str, Region]:
    """Where a stored object's sharded arrays go, by the names of :func:`walk_leaves`.

    The state of an optimizer that has none yet is laid out as its parameters are.
    """
    found: dict[str, Region] = {}
    if isinstance(thing, torch.nn.Module):
        collector = ShardCollector()
        for path, _, number in walk_leaves(flatten(module_state(thing), collector)):
            if number in collector.regions:
                found[path] = collector.regions[number]
    elif isinstance(thing, torch.optim.Optimizer):
        parameters = [p for group in thing.param_groups for p in group["params"]]
        for path, tag, number in walk_leaves(tree):
            keys = path.split("/")
            array = manifest.arrays[number]
            if tag != "tensor" or len(keys) != 3 or keys[0] != "state" or not keys[1].isdigit():
                continue
            index = int(keys[1])
            like = parameters[index] if index < len(parameters) else None
            if isinstance(like, DTensor) and array.shape and array.shape == tuple(like.shape):
                found[path] = _empty_like(like, getattr(torch, array.dtype), path)
    return found


def _empty_like(like: DTensor, dtype: torch.dtype, path: str) -> Region:
    region = region_of(like, path)
    local = torch.empty(region.local.shape, dtype=dtype, device=region.local.device)
    value = DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False,
        shape=like.shape, stride=like.stride(),
    )  # fmt: skip
    return Region(value, local, region.offset)
