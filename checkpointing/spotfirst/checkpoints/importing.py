"""A file of weights as the first checkpoint of a run, for others to start from.

From safetensors without torch; from a file of ``torch.save`` with torch's safe reader, which
builds tensors and plain containers and runs nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spotfirst.checkpoints import safetensors
from spotfirst.checkpoints.manifest import (
    ArrayRef,
    StateManifest,
    read_manifest,
    write_manifest,
)
from spotfirst.checkpoints.memory import Block
from spotfirst.checkpoints.packs import (
    PACK_BYTES,
    PackWriter,
    chunk_cuts,
    chunk_digest,
    manifest_name,
    pack_prefix,
)
from spotfirst.checkpoints.statetree import ITEM_BYTES, Leaf, flatten
from spotfirst.errors import InvalidSpec, StateError, StorageError
from spotfirst.run import Run

__all__ = ["Weights", "commit_weights", "read_weights"]


class _Array(NamedTuple):
    """An array to store, and its bytes, some at a time: each piece is used before the next."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[memoryview]]


class Weights(NamedTuple):
    """What files hold: a tree of values, and its arrays."""

    tree: Any
    arrays: list[_Array]

    @property
    def size_bytes(self) -> int:
        """What the arrays take."""
        return sum(math.prod(a.shape) * ITEM_BYTES[a.dtype] for a in self.arrays)


def read_weights(paths: Sequence[Path], *, key: str = "") -> Weights:
    """What ``.safetensors`` files hold together, or one file that ``torch.save`` wrote.

    ``key`` chooses a part of what torch's file holds: ``"state_dict"``, or deeper, with dots.
    The arrays are read when they are stored. Raises :class:`InvalidSpec`, and
    :class:`UnsupportedState` for a value that checkpoints do not store.
    """
    kinds = {path.suffix.lower() == ".safetensors" for path in paths}
    if kinds == {True}:
        if key:
            msg = f"--key {key!r} is for files of torch.save; a safetensors file has no parts"
            raise InvalidSpec(msg)
        return _read_safetensors(paths)
    if kinds != {False} or len(paths) != 1:
        msg = (
            "give .safetensors files, several where a model has several, or one file of torch.save"
        )
        raise InvalidSpec(msg)
    return _read_torch(paths[0], key)


def commit_weights(
    run: Run,
    weights: Weights,
    *,
    name: str = "model",
    step: int = 0,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> int:
    """Make ``weights`` the first checkpoint of ``run``, as its object ``name``; its number.

    Raises :class:`InvalidSpec` when the run has a checkpoint already, and :class:`ClaimLost` when
    somebody else imports into it at the same time.
    """
    chain = run.chain().refresh()
    if chain.commits or chain.pruned:
        msg = f"run {run.run_id!r} has checkpoints already; import into a new run"
        raise InvalidSpec(msg)
    attempt = (chain.holder or 0) + 1
    chain.claim(attempt)
    packs, claim = run.packs(), chain.claims[-1]
    writer = PackWriter(packs, pack_prefix(claim, 1), {})
    try:
        arrays = [_store(array, writer, on_bytes) for array in weights.arrays]
        manifest = StateManifest(
            step=step, packs=writer.finish(), arrays=tuple(arrays), objects={name: weights.tree}
        )
        path = manifest_name(claim, 1)
        digest, size_bytes = write_manifest(packs, path, manifest)
        read_manifest(packs, path, digest)  # nothing is committed that nobody can read
    except BaseException:
        with contextlib.suppress(StorageError):  # else the next collection does
            writer.discard()
        raise
    seq = chain.commit(
        attempt, step=step, manifest=path, digest=digest, content="state",
        size_bytes=manifest.size_bytes + size_bytes, new_bytes=writer.new_bytes + size_bytes,
    )  # fmt: skip
    chain.release(attempt)
    return seq


def _store(array: _Array, writer: PackWriter, on_bytes: Callable[[int], object]) -> ArrayRef:
    parts = []
    for block in array.blocks():
        cuts = chunk_cuts(len(block))
        digests = [chunk_digest(block[start : start + size]) for start, size in cuts]
        parts += writer.add(block, cuts, digests)
        on_bytes(len(block))
    return ArrayRef(dtype=array.dtype, shape=array.shape, parts=tuple(parts))


def _read_safetensors(paths: Sequence[Path]) -> Weights:
    memory = Block(PACK_BYTES)
    arrays: list[_Array] = []
    pairs: list[list[Any]] = []
    owners: dict[str, Path] = {}
    for path in paths:
        entries, tied = safetensors.read_header(path)
        numbers = {}
        for name, entry in entries.items():
            numbers[name] = len(arrays)
            arrays.append(_Array(entry.dtype, entry.shape, _file_blocks(path, entry, memory)))
        for name, number in [*numbers.items(), *((n, numbers[o]) for n, o in tied.items())]:
            if name in owners:
                msg = f"{name!r} is in {owners[name]} and in {path}; give each array once"
                raise InvalidSpec(msg)
            owners[name] = path
            pairs.append([name, {"tensor": number}])
    return Weights({"ordered": pairs}, arrays)


def _file_blocks(
    path: Path, entry: safetensors.Entry, memory: Block
) -> Callable[[], Iterator[memoryview]]:
    def read() -> Iterator[memoryview]:
        with path.open("rb", buffering=0) as file:
            for start in range(0, entry.size_bytes, PACK_BYTES):
                block = memory.view[: min(PACK_BYTES, entry.size_bytes - start)]
                filled = 0
                while filled < len(block):
                    offset = entry.offset + start + filled
                    found = os.preadv(file.fileno(), [block[filled:]], offset)
                    if not found:
                        msg = f"{path} became shorter while it was read; import it again"
                        raise InvalidSpec(msg)
                    filled += found
                yield block

    return read


def _read_torch(path: Path, key: str) -> Weights:
    try:
        import torch
    except ImportError as error:
        msg = (
            f"reading {path} needs torch, which is not installed here: "
            "pip install 'spotfirst[torch]', or give a .safetensors file, which needs none"
        )
        raise InvalidSpec(msg) from error
    from spotfirst.checkpoints.tensors import TensorCollector, bytes_of

    value = _part(_load_torch(torch, path), key, path)
    collector = TensorCollector()
    try:
        tree = flatten(value, collector, key or path.name)
    except StateError as error:
        msg = f"{error}. Choose a part of the file with --key"
        raise type(error)(msg) from error
    if not collector.leaves:
        msg = f"{path} holds no tensors"
        raise InvalidSpec(msg)
    for leaf in collector.leaves:
        if leaf.size_bytes > path.stat().st_size:
            msg = (
                f"{path} has an array {leaf.dtype}{list(leaf.shape)} that is larger than the "
                "file: it repeats its elements, or the file is damaged"
            )
            raise InvalidSpec(msg)

    def blocks(leaf: Leaf) -> Callable[[], Iterator[memoryview]]:
        def read() -> Iterator[memoryview]:
            data = memoryview(bytes_of(leaf.value))
            for start in range(0, len(data), PACK_BYTES):
                yield data[start : start + PACK_BYTES]

        return read

    return Weights(
        tree, [_Array(leaf.dtype, leaf.shape, blocks(leaf)) for leaf in collector.leaves]
    )


def _load_torch(torch: Any, path: Path) -> Any:
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # older files cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror or error}"
        raise InvalidSpec(msg) from error
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        msg = (
            f"{path} cannot be read by torch's safe reader ({type(error).__name__}: {lines[0]}); "
            "save a state_dict of plain tensors, or convert it to safetensors"
        )
        raise InvalidSpec(msg) from error


def _part(value: Any, key: str, path: Path) -> Any:
    for word in key.split(".") if key else ():
        if not isinstance(value, dict) or word not in value:
            there = list(value)[:10] if isinstance(value, dict) else type(value).__name__
            msg = f"{path} has no part {word!r} of --key {key!r}; it has {there}"
            raise InvalidSpec(msg)
        value = value[word]
    return value
