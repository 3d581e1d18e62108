"""One number for final weights: the SHA-256 of an object's arrays, from a checkpoint or alive."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.manifest import ArrayRef, Part, StateManifest, read_manifest
from spotfirst.checkpoints.packs import read_chunk
from spotfirst.checkpoints.statetree import ITEM_BYTES, Leaf, flatten, walk_leaves
from spotfirst.errors import StateMismatch, UnsupportedState
from spotfirst.storage import Storage

__all__ = ["read_arrays", "state_digest", "weights_sha256"]


def state_digest(packs: Storage, commit: Commit, name: str = "model") -> str:
    """The SHA-256 (hex) of the arrays of the object ``name`` in a stored checkpoint. Torch-free.

    It is taken over the arrays sorted by name: name, element type and shape as one line of text
    each, then the raw bytes. Raises :class:`StateMismatch` when there is no such object, and as
    :func:`read_manifest` does.
    """
    manifest = read_manifest(packs, commit.manifest, commit.digest)
    if not isinstance(manifest, StateManifest) or name not in manifest.objects:
        msg = f"checkpoint {commit.manifest} of {packs.url} has no object {name!r}"
        raise StateMismatch(msg)
    hasher = hashlib.sha256()
    for path, _, index in sorted(walk_leaves(manifest.objects[name])):
        array = manifest.arrays[index]
        _add(hasher, path, array.dtype, array.shape, _pieces(packs, manifest, array))
    return hasher.hexdigest()


def read_arrays(packs: Storage, commit: Commit, name: str = "model") -> dict[str, Any]:
    """The arrays of the object ``name`` in a stored checkpoint, as NumPy arrays by name. Torch-free.

    bfloat16 becomes float32. Raises :class:`StateMismatch` when there is no such object,
    :class:`UnsupportedState` for an element type that NumPy lacks, and as :func:`read_manifest`
    and :func:`spotfirst.checkpoints.packs.fetch` do.
    """
    import numpy as np

    from spotfirst.checkpoints.exporting import state_of, tree_of
    from spotfirst.checkpoints.streaming import read_array

    manifest = state_of(read_manifest(packs, commit.manifest, commit.digest))
    found: dict[str, Any] = {}
    for path, _, index in walk_leaves(tree_of(manifest, name)):
        array = manifest.arrays[index]
        is_brain = array.dtype == "bfloat16"
        if array.dtype.startswith("float8"):
            msg = f"{path} is of type {array.dtype}, which NumPy lacks; export it to a file"
            raise UnsupportedState(msg)
        data = read_array(packs, manifest, array)
        flat = np.frombuffer(data, dtype=np.uint16 if is_brain else np.dtype(array.dtype))
        if is_brain:  # the upper half of a float32
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        found[path or name] = flat.reshape(array.shape)
    return found


def _pieces(packs: Storage, manifest: StateManifest, array: ArrayRef) -> Iterator[bytearray]:
    if array.shards:
        import numpy as np

        yield from _joined(packs, manifest, array, np)
        return
    for part in array.parts:
        yield _read(packs, manifest, part)


def _joined(packs: Storage, manifest: StateManifest, array: ArrayRef, np: Any) -> Iterator[Any]:
    """An array that is kept in shards, put together: its elements as opaque bytes."""
    item = np.dtype(f"V{ITEM_BYTES[array.dtype]}")
    whole = np.empty(array.shape, dtype=item)
    for shard in array.shards:
        data = b"".join(_read(packs, manifest, part) for part in shard.parts)
        place = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.shape, strict=True))
        whole[place] = np.frombuffer(data, dtype=item).reshape(shard.shape)
    yield whole.tobytes()


def _read(packs: Storage, manifest: StateManifest, part: Part) -> bytearray:
    return read_chunk(packs, manifest.packs[part.pack].name, part)


def weights_sha256(module: Any) -> str:
    """The same number from a live object with ``state_dict``, such as a torch module."""
    import torch

    from spotfirst.checkpoints.tensors import TensorCollector, bytes_of
    from spotfirst.checkpoints.wrappers import module_state, unwrapped

    module = unwrapped(module)
    state = module_state(module) if isinstance(module, torch.nn.Module) else module.state_dict()
    collector = TensorCollector()
    node = flatten(state, collector)
    hasher = hashlib.sha256()
    for path, _, index in sorted(walk_leaves(node)):
        leaf: Leaf = collector.leaves[index]
        _add(hasher, path, leaf.dtype, leaf.shape, (bytes_of(leaf.value),))
    return hasher.hexdigest()


def _add(hasher: Any, path: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[Any]) -> None:
    for text in (path, dtype, ",".join(map(str, shape))):
        line = text.encode()
        hasher.update(b"%d:%s\n" % (len(line), line))
    for piece in pieces:
        hasher.update(piece)
