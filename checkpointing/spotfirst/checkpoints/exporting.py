"""A stored checkpoint as a file that other tools read: safetensors (torch-free), or torch's own.

Either is written beside its place and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spotfirst.checkpoints import safetensors
from spotfirst.checkpoints.manifest import FilesManifest, Manifest, StateManifest
from spotfirst.checkpoints.statetree import unflatten, walk_leaves
from spotfirst.checkpoints.streaming import pieces, stream
from spotfirst.errors import InvalidSpec, StateMismatch, StorageError, UnsupportedState
from spotfirst.storage import Storage

__all__ = ["export_safetensors", "export_torch", "state_of", "tree_of"]

OnBytes = Callable[[int], object]


def state_of(manifest: Manifest) -> StateManifest:
    """The manifest of a training state. Raises :class:`StateMismatch` for one of files."""
    if isinstance(manifest, FilesManifest):
        names = [file.path for file in manifest.files]
        msg = f"this checkpoint holds files of the script, no tensors: {', '.join(names[:5])}" + (
            " …" if len(names) > 5 else ""
        )
        raise StateMismatch(msg)
    return manifest


def tree_of(manifest: StateManifest, name: str = "model", rank: int = 0) -> Any:
    """The tree of the object ``name``; of one that each rank has for itself, that of ``rank``.

    Raises :class:`StateMismatch`, with the objects that there are.
    """
    own = manifest.ranks[rank].objects if 0 <= rank < len(manifest.ranks) else {}
    if name in manifest.objects:
        return manifest.objects[name]
    if name in own:
        return own[name]
    there = {*manifest.objects}.union(*(each.objects for each in manifest.ranks))
    where = f" of rank {rank}" if name in there else ""
    msg = (
        f"the checkpoint of step {manifest.step} has no object {name!r}{where}; it has "
        f"{', '.join(sorted(there)) or 'none'}"
        + (f" (of {len(manifest.ranks)} ranks)" if where else "")
    )
    raise StateMismatch(msg)


def export_safetensors(
    packs: Storage,
    manifest: StateManifest,
    path: Path,
    *,
    name: str = "model",
    rank: int = 0,
    metadata: Mapping[str, str] = {},
    on_total: OnBytes = lambda _: None,
    on_bytes: OnBytes = lambda _: None,
) -> int:
    """Write the arrays of one object; the file's size in bytes. Takes some 64 MiB of memory.

    Nested names are joined with ``/``. Tied arrays are written once, under the name that comes first
    in the module; the metadata has the others, as safetensors itself writes them, for its
    ``load_model``. The format holds arrays only, so an object that holds numbers or texts is refused
    with :class:`UnsupportedState`. ``on_total`` gets the bytes to read, ``on_bytes`` those just
    read. Raises :class:`StateMismatch`, and :class:`StorageError` when the
    file cannot be written.
    """
    tree = tree_of(manifest, name, rank)
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for key, index in _named_arrays(tree, name).items():
        # Arrays without elements are never tied: they have no memory to share.
        if first.setdefault(index, key) != key:
            tied[key] = first[index]
    refs = {key: manifest.arrays[index] for index, key in first.items()}
    forms = {key: (array.dtype, array.shape) for key, array in refs.items()}
    head, places = safetensors.layout(forms, {**tied, "format": "pt", **metadata})
    size_bytes = len(head) + sum(place.size_bytes for place in places.values())
    on_total(sum(array.size_bytes for array in refs.values()))
    with _new_file(path) as partial, partial.open("wb") as file:
        file.truncate(size_bytes)
        _write_at(file.fileno(), 0, memoryview(head))
        wanted = (
            piece
            for index, key in sorted(first.items())
            for piece in pieces(manifest.arrays[index], [places[key].offset])
        )
        stream(
            packs, manifest, wanted,
            lambda offset, data: _write_at(file.fileno(), offset, data), on_bytes=on_bytes,
        )  # fmt: skip
        os.fsync(file.fileno())
    return size_bytes


def export_torch(
    packs: Storage,
    manifest: StateManifest,
    path: Path,
    *,
    names: Sequence[str] = ("model",),
    rank: int = 0,
) -> int:
    """Write what ``torch.load(path, weights_only=True)`` reads; the file's size in bytes.

    One object is written as its state, several as a dict of their states. Tied tensors are tied;
    NumPy arrays and scalars become tensors, because the safe reader knows no others. Takes the
    memory of the objects. Raises :class:`InvalidSpec` where there is no torch, and as
    :func:`export_safetensors` does.
    """
    trees = {name: tree_of(manifest, name, rank) for name in names}
    try:
        import torch
    except ImportError as error:
        msg = (
            "writing torch's format needs torch, which is not installed here: "
            "pip install 'spotfirst[torch]', or export to a .safetensors file, which needs none"
        )
        raise InvalidSpec(msg) from error
    from spotfirst.checkpoints.loading import StateReader

    class Reader(StateReader):
        def _leaf(self, tag: str, index: int) -> Any:  # noqa: ARG002 - every one a tensor
            return self._tensors[index]

    reader = Reader(packs, manifest)
    for tree in trees.values():
        reader.plan(tree)
    reader.fetch()
    states = {name: reader.value(tree) for name, tree in trees.items()}
    with _new_file(path) as partial, partial.open("wb") as file:
        torch.save(states if len(states) > 1 else states[names[0]], file)
        file.flush()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _named_arrays(tree: Any, name: str) -> dict[str, int]:
    """The number of each array of a tree that holds nothing else."""
    other = _first_other(unflatten(tree, lambda _tag, _index: _ARRAY))
    if other is not None:
        msg = (
            f"{name!r} holds more than arrays ({other}), and safetensors holds nothing else; "
            "export it to a .pt file"
        )
        raise UnsupportedState(msg)
    named: dict[str, int] = {}
    for key, _, index in walk_leaves(tree):
        path = key or name
        if path in named:
            msg = (
                f"{name!r} has two arrays that would both be called {path!r}; export to a .pt file"
            )
            raise UnsupportedState(msg)
        named[path] = index
    if not named:
        msg = f"{name!r} holds no arrays; export it to a .pt file"
        raise UnsupportedState(msg)
    return named


_ARRAY = object()


def _first_other(value: Any, path: str = "") -> str | None:
    """The first thing in a value that is no :data:`_ARRAY`, with its place."""
    if value is _ARRAY:
        return None
    if not isinstance(value, (dict, list, tuple)):
        return f"{path} = {value!r:.60}"
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = (_first_other(item, f"{path}/{key}".lstrip("/")) for key, item in items)
    return next((each for each in found if each is not None), None)


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place in the end, and is gone otherwise."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield partial
        partial.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        msg = f"cannot write {path}: {error.strerror or error}"
        raise StorageError(msg, path=str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_at(descriptor: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        offset, data = offset + written, data[written:]
