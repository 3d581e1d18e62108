"""One number for final weights: the SHA-256 of an object's arrays, from a checkpoint or alive."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from spotfirst.checkpoints.blobs import BlobStore, Bytes
from spotfirst.checkpoints.manifest import PartReader, StateManifest, read_manifest
from spotfirst.checkpoints.statetree import Leaf, flatten, walk_leaves
from spotfirst.errors import StateMismatch

__all__ = ["state_digest", "weights_sha256"]


def state_digest(blobs: BlobStore, manifest_digest: str, name: str = "model") -> str:
    """The SHA-256 (hex) of the arrays of the object ``name`` in a stored checkpoint. Torch-free.

    It is taken over the arrays sorted by name: name, element type and shape as one line of text
    each, then the raw bytes. Raises :class:`StateMismatch` when there is no such object, and as
    :func:`read_manifest` does.
    """
    manifest = read_manifest(blobs, manifest_digest)
    if not isinstance(manifest, StateManifest) or name not in manifest.objects:
        msg = f"checkpoint {manifest_digest} has no object {name!r}"
        raise StateMismatch(msg)
    reader = PartReader(blobs, manifest.blobs)
    hasher = hashlib.sha256()
    for path, _, index in sorted(walk_leaves(manifest.objects[name])):
        array = manifest.arrays[index]
        _add(hasher, path, array.dtype, array.shape, reader.pieces(array.parts))
    return hasher.hexdigest()


def weights_sha256(module: Any) -> str:
    """The same number from a live object with ``state_dict``, such as a torch module."""
    from spotfirst.checkpoints.tensors import Buffers, TensorCollector

    state = module.state_dict()
    collector = TensorCollector(Buffers())
    node = flatten(state, collector)
    hasher = hashlib.sha256()
    for path, _, index in sorted(walk_leaves(node)):
        leaf: Leaf = collector.leaves[index]
        _add(hasher, path, leaf.dtype, leaf.shape, (leaf.data,))
    return hasher.hexdigest()


def _add(
    hasher: Any, path: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[Bytes]
) -> None:
    for text in (path, dtype, ",".join(map(str, shape))):
        line = text.encode()
        hasher.update(b"%d:%s\n" % (len(line), line))
    for piece in pieces:
        hasher.update(piece)
