"""From a manifest back to a training state: compared, read in parallel, verified, then loaded.

Bytes go from the storage straight to where they belong: the memory of a module's own tensors, or
that of new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import psutil
import torch  # noqa: TID253 - it makes tensors; only the Checkpointer's side imports it

from spotfirst.checkpoints.manifest import ArrayRef, StateManifest
from spotfirst.checkpoints.packs import fetch
from spotfirst.checkpoints.prefetching import Prefetch
from spotfirst.checkpoints.regions import RegionPlan
from spotfirst.checkpoints.statetree import Leaf, unflatten, walk_leaves
from spotfirst.checkpoints.tensors import Room, is_plain
from spotfirst.errors import CorruptObject, StateMismatch
from spotfirst.storage import Storage

__all__ = ["StateReader", "differences", "misfit", "stored_trees", "unfit_arrays"]

_SHOWN_PROBLEMS = 20


class StateReader:
    """Reads trees of a manifest: :meth:`plan` them all, :meth:`fetch` once, then :meth:`value`."""

    def __init__(
        self, packs: Storage, manifest: StateManifest, prefetch: Prefetch | None = None
    ) -> None:
        self._prefetch = prefetch
        self._packs = packs
        self._manifest = manifest
        self._tensors: dict[int, torch.Tensor] = {}
        self._regions = RegionPlan(manifest.packs)
        self._room = Room()
        self._new_bytes = 0
        self._available_bytes = psutil.virtual_memory().available

    def plan(
        self,
        node: Any,
        targets: Mapping[str, torch.Tensor] = {},
        regions: Mapping[str, Any] = {},
    ) -> None:
        """Ask for the arrays of one of the manifest's trees.

        ``targets`` are live tensors by the names of :func:`walk_leaves`, whose memory is filled
        where type and shape are those that are stored. ``regions`` are sharded ones, of which this
        rank's region is read (:class:`spotfirst.distributed.collecting.Region`).
        """
        for name, tag, index in walk_leaves(node):
            if index in self._tensors:
                continue
            array = self._manifest.arrays[index]
            region = regions.get(name)
            if region is not None and tag == "tensor":
                self._tensors[index] = region.tensor
                self._regions.add(array, region.offset, region.local)
                continue
            target = targets.get(name)
            if (
                target is None
                or tag != "tensor"
                or not is_plain(target)
                or not _fits(target, array)
            ):
                self._reserve(array.size_bytes)
                target = self._room.empty(array)
            self._tensors[index] = target.detach()
            self._regions.add(array, (0,) * len(array.shape), target.detach())

    def fetch(self) -> int:
        """Read everything that was asked for; the bytes that were not there. Raises as :func:`fetch` does."""
        wanted = self._regions.wanted
        if self._prefetch is not None:
            wanted = self._prefetch.take(wanted)
        read = fetch(self._packs, wanted)
        self._regions.finish()
        return read

    def value(self, node: Any) -> Any:
        """The value of a tree that was planned and fetched. Tensors that were tied are tied."""
        return unflatten(node, self._leaf)

    def _leaf(self, tag: str, index: int) -> Any:
        value = self._tensors[index]
        if tag == "tensor":
            return value
        array = value.numpy()
        return array[()] if tag == "scalar" else array

    def _reserve(self, size_bytes: int) -> None:
        self._new_bytes += size_bytes
        if self._new_bytes > self._available_bytes:
            msg = (
                f"the checkpoint needs {self._new_bytes / 1e9:.1f} GB of memory or more, and this "
                f"machine has {self._available_bytes / 1e9:.1f} GB left: the checkpoint is "
                "damaged, or of a larger machine"
            )
            raise CorruptObject(msg)


def differences(
    manifest: StateManifest,
    stored: Mapping[str, Any],
    objects: Mapping[str, Any],
    leaves: Sequence[Leaf],
    modules: Collection[str],
    *,
    decided: Callable[[str, str], bool] = lambda _name, _path: False,
) -> list[str]:
    """How a checkpoint's trees differ from those at hand; arrays are compared for ``modules``.

    ``decided(name, path)`` says whether the module ``name`` has a method of its own that knows what
    fits at ``path``. An optimizer has no arrays yet before its first step: see :mod:`.optimizers`.
    """
    problems = [f"{name} is not in the checkpoint" for name in objects.keys() - stored]
    problems += [
        f"{name} is in the checkpoint, and was not given to the Checkpointer"
        for name in stored.keys() - objects
    ]
    for name in sorted(set(modules) & stored.keys()):
        here = {path: leaves[index] for path, _, index in walk_leaves(objects[name])}
        there = {path for path, _, _ in walk_leaves(stored[name])}
        unfit = {path: "is not in the checkpoint" for path in here if path not in there}
        unfit |= unfit_arrays(manifest, stored[name], objects[name], leaves)
        problems += [
            f"{name}: {path} {why}" for path, why in unfit.items() if not decided(name, path)
        ]
    return sorted(problems)


def misfit(step: int, problems: Sequence[str]) -> StateMismatch:
    """The error that lists why the checkpoint of ``step`` does not fit."""
    shown = "".join(f"\n  - {problem}" for problem in problems[:_SHOWN_PROBLEMS])
    left = len(problems) - _SHOWN_PROBLEMS
    more = f"\n  … and {left} more" if left > 0 else ""
    return StateMismatch(
        f"the checkpoint of step {step} does not fit these objects:{shown}{more}\n"
        "Build them as they were, start a new run, or load what fits with strict=False"
    )


def unfit_arrays(
    manifest: StateManifest, stored: Any, tree: Any, leaves: Sequence[Leaf]
) -> dict[str, str]:
    """The arrays of a stored tree that the tree at hand does not have so, and why, in words."""
    here = {path: index for path, _, index in walk_leaves(tree)}
    unfit: dict[str, str] = {}
    tied: dict[int, tuple[str, ArrayRef]] = {}
    for path, _, index in walk_leaves(stored):
        array = manifest.arrays[index]
        if path not in here:
            unfit[path] = "is not in the model"
            continue
        ours = _form(leaves[here[path]])
        other, first = tied.setdefault(here[path], (path, array))
        if ours != _form(array):
            unfit[path] = f"is {ours} here and {_form(array)} in the checkpoint"
        elif _content(array) != _content(first):
            unfit[path] = f"is tied to {other} here, and has other values in the checkpoint"
    return unfit


def _content(array: ArrayRef) -> list[Any]:
    return [(r.offset, r.shape, [part.digest for part in r.parts]) for r in array.regions]


def stored_trees(manifest: StateManifest, rank: int = 0) -> dict[str, Any]:
    """The trees by object: those of all ranks and those of ``rank``."""
    own = manifest.ranks[rank % len(manifest.ranks)].objects if manifest.ranks else {}
    return {**own, **manifest.objects}


def _fits(target: torch.Tensor, array: ArrayRef) -> bool:
    return tuple(target.shape) == array.shape and str(target.dtype) == f"torch.{array.dtype}"


def _form(array: Leaf | ArrayRef) -> str:
    whole = array.whole if isinstance(array, Leaf) else None
    return f"{array.dtype}{list(whole[0] if whole else array.shape)}"
