"""Ways to write and read a state without a run around it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from spotfirst.checkpoints.blobs import BlobStore
from spotfirst.checkpoints.manifest import PartReader, StateManifest, read_manifest
from spotfirst.checkpoints.saving import Snapshot, write_state
from spotfirst.checkpoints.statetree import flatten
from spotfirst.checkpoints.tensors import Buffers, TensorCollector, load_tree


def save(blobs: BlobStore, state: Any, *, buffers: Buffers | None = None) -> str:
    collector = TensorCollector(buffers or Buffers())
    node = flatten(state, collector)
    digest, _ = write_state(blobs, Snapshot(3, {"model": node}, None, collector.leaves, {}, 0.0))
    return digest


def load(blobs: BlobStore, digest: str) -> Any:
    manifest = read_manifest(blobs, digest)
    assert isinstance(manifest, StateManifest)
    return load_tree(manifest.objects["model"], manifest, PartReader(blobs, manifest.blobs))


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
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, float):
        return math.copysign(1, left) == math.copysign(1, right) and (
            left == right or (math.isnan(left) and math.isnan(right))
        )
    return bool(left == right)


def _bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
