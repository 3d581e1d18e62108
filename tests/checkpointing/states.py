"""Ways to write and read a state without a run around it."""

from __future__ import annotations

import io
import itertools
import math
from collections import deque
from typing import Any

import numpy as np
import torch

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.loading import StateReader
from spotfirst.checkpoints.manifest import (
    ArrayRef,
    RankState,
    StateManifest,
    read_manifest,
    write_manifest,
)
from spotfirst.checkpoints.memory import Arena
from spotfirst.checkpoints.packs import Location, PackWriter, chunk_digest, known_parts, pack_prefix
from spotfirst.checkpoints.snapshot import Planner, Snapshot
from spotfirst.checkpoints.statetree import flatten
from spotfirst.checkpoints.tensors import TensorCollector
from spotfirst.storage import Storage
from tests.checkpointing.conftest import LONG_AGO

_numbers = itertools.count()


def snapshot(
    state: Any,
    *,
    settled: frozenset[int] = frozenset(),
    arena: Arena | None = None,
    memory_bytes: int | None = None,
    in_place: bool = False,
    **options: Any,
) -> Snapshot:
    """A copy of ``state`` as the object ``model``, lazy for what is ``settled``."""
    collector = TensorCollector()
    node = flatten(state, collector)
    return Snapshot(
        step=3, objects={"model": node}, ranked={}, rng=None, leaves=collector.leaves, metrics={},
        taken_at=0.0, arena=arena or Arena(), memory_bytes=memory_bytes,
        plan=Planner().plan(collector.leaves, lambda: settled, in_place=in_place), **options,
    )  # fmt: skip


def save(packs: Storage, state: Any, *, before: Commit | None = None, **options: Any) -> Commit:
    """Save without threads; what ``before`` has is not written again."""
    return store(packs, snapshot(state, **options), before=before)


def store(
    packs: Storage,
    taken: Snapshot,
    *,
    before: Commit | None = None,
    known: dict[str, Location] | None = None,
    claim: int = 1,
    save: int | None = None,
) -> Commit:
    """What :class:`Saver` does before the commit, without threads."""
    known = known_of(packs, before) if known is None else known
    number = next(_numbers) if save is None else save
    writer = PackWriter(packs, pack_prefix(claim, number), known)
    parts: list[list[Any]] = [[] for _ in taken.leaves]
    for block in taken.blocks():
        digests = [chunk_digest(block.memory[start : start + size]) for start, size in block.cuts]
        added = writer.add(block.memory, block.cuts, digests)
        for leaf, part in zip(block.leaves, added, strict=True):
            parts[leaf].append(part)
        block.free()
    refs = writer.finish()
    manifest = StateManifest(
        step=taken.step, packs=refs, objects=taken.objects,
        arrays=tuple(
            ArrayRef(dtype=leaf.dtype, shape=leaf.shape, parts=tuple(parts[index]))
            for index, leaf in enumerate(taken.leaves)
        ),
        ranks=(RankState(objects=taken.ranked, rng=taken.rng),),
    )  # fmt: skip
    name = f"{claim:08d}/{number:06d}.json"
    digest, size = write_manifest(packs, name, manifest)
    return Commit(
        attempt=1, at=LONG_AGO, nonce="n", step=taken.step, manifest=name, digest=digest,
        content="state", size_bytes=manifest.size_bytes + size, new_bytes=writer.new_bytes,
    )  # fmt: skip


def known_of(packs: Storage, commit: Commit | None) -> dict[str, Location]:
    """What a checkpoint after ``commit`` need not write."""
    if commit is None:
        return {}
    old = manifest_of(packs, commit)
    return known_parts(old.packs, (part for array in old.arrays for part in array.parts))


def manifest_of(packs: Storage, commit: Commit) -> StateManifest:
    manifest = read_manifest(packs, commit.manifest, commit.digest)
    assert isinstance(manifest, StateManifest)
    return manifest


def load(packs: Storage, commit: Commit) -> Any:
    manifest = manifest_of(packs, commit)
    reader = StateReader(packs, manifest)
    node = manifest.objects["model"]
    reader.plan(node)
    reader.fetch()
    return reader.value(node)


def same(left: Any, right: Any) -> bool:
    """Equality of type, structure and every bit."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and _bytes(left) == _bytes(right)
        )
    if isinstance(left, (np.ndarray, np.generic)):
        return bool(
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.tobytes() == right.tobytes()
        )
    if isinstance(left, io.BytesIO):
        return left.getvalue() == right.getvalue() and left.tell() == right.tell()
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, deque) and left.maxlen != right.maxlen:
        return False
    if isinstance(left, (list, tuple, deque)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return math.copysign(1, left) == math.copysign(1, right) and (
            left == right or (math.isnan(left) and math.isnan(right))
        )
    return bool(left == right)


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
