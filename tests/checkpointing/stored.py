"""Checkpoints written by hand: whole, or in shards, without a trainer around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.checkpoints.manifest import (
    ArrayRef,
    Manifest,
    Part,
    RankState,
    Shard,
    StateManifest,
    read_manifest,
    write_manifest,
)
from spotfirst.checkpoints.packs import (
    Location,
    PackWriter,
    chunk_cuts,
    chunk_digest,
    known_parts,
    pack_prefix,
)
from spotfirst.checkpoints.statetree import ITEM_BYTES, Leaf, flatten
from spotfirst.checkpoints.tensors import TensorCollector, bytes_of
from spotfirst.run import Run


class Writer:
    """The holder of a run's claim, saving what it is given."""

    def __init__(self, run: Run, *, compressed: bool = False) -> None:
        self.run = run
        self.compressed = compressed
        self.chain: CheckpointChain = run.chain()
        self.chain.claim((self.chain.refresh().holder or 0) + 1)
        self.saves = 0
        self.known: dict[str, Location] = {}

    def save(
        self,
        step: int,
        *,
        shards: int = 1,
        ranked: list[Mapping[str, Any]] | None = None,
        metrics: dict[str, float] | None = None,
        **objects: Any,
    ) -> int:
        """Commit objects; with ``shards``, each tensor cut along its last dimension."""
        self.saves += 1
        assert self.chain.holder is not None
        claim = self.chain.claims[-1]
        writer = PackWriter(self.run.packs(), pack_prefix(claim, self.saves), self.known)
        collector = TensorCollector()
        trees = {name: flatten(value, collector) for name, value in objects.items()}
        ranks = tuple(
            RankState(objects={name: flatten(value, collector) for name, value in own.items()})
            for own in ranked or []
        )

        def store(data: Any, dtype: str) -> tuple[Part, ...]:
            view = memoryview(bytes(data))
            cuts = chunk_cuts(len(view))
            digests = [chunk_digest(view[start : start + size]) for start, size in cuts]
            items = [ITEM_BYTES[dtype]] * len(cuts) if self.compressed else None
            return tuple(writer.add(view, cuts, digests, items))

        arrays = [_array(leaf, store, shards) for leaf in collector.leaves]
        manifest = StateManifest(
            step=step, packs=writer.finish(), arrays=tuple(arrays), objects=trees, ranks=ranks
        )
        self.known = known_parts(
            manifest.packs, [p for a in arrays for region in a.regions for p in region.parts]
        )
        name = f"{claim:08d}/{self.saves:06d}.json"
        digest, _ = write_manifest(self.run.packs(), name, manifest)
        return self.chain.commit(
            self.chain.holder, step=step, manifest=name, digest=digest, content="state",
            size_bytes=manifest.size_bytes, new_bytes=writer.new_bytes, metrics=metrics,
        )  # fmt: skip


def _array(leaf: Leaf, store: Callable[[Any, str], tuple[Part, ...]], shards: int) -> ArrayRef:
    value = leaf.value
    cuttable = isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] >= shards
    if shards == 1 or not cuttable:
        parts = store(bytes_of(value), leaf.dtype)
        return ArrayRef(dtype=leaf.dtype, shape=leaf.shape, parts=parts)
    regions = []
    start = 0
    for piece in value.tensor_split(shards, dim=-1):
        offset = (0,) * (value.ndim - 1) + (start,)
        parts = store(bytes_of(piece), leaf.dtype)
        regions.append(Shard(offset=offset, shape=tuple(piece.shape), parts=parts))
        start += piece.shape[-1]
    return ArrayRef(dtype=leaf.dtype, shape=leaf.shape, shards=tuple(regions))


def commit_of(run: Run, seq: int) -> Commit:
    chain = run.chain().refresh()
    return {**dict(chain.commits), **chain.pruned}[seq]


def manifest_of(run: Run, seq: int) -> Manifest:
    commit = commit_of(run, seq)
    return read_manifest(run.packs(), commit.manifest, commit.digest)
