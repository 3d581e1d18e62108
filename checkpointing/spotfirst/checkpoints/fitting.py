"""Restoring what fits of a checkpoint, when the script has changed since: ``strict=False``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from spotfirst.checkpoints.loading import unfit_arrays
from spotfirst.checkpoints.manifest import StateManifest
from spotfirst.checkpoints.statetree import Leaf

__all__ = ["fitting_trees"]


def fitting_trees(
    manifest: StateManifest,
    trees: Mapping[str, Any],
    objects: Mapping[str, Any],
    leaves: Sequence[Leaf],
    modules: Collection[str],
) -> dict[str, Any]:
    """The stored trees of ``objects``; those of modules without the arrays that differ."""
    fitting = {name: tree for name, tree in trees.items() if name in objects}
    for name in fitting.keys() & modules:
        unfit = unfit_arrays(manifest, fitting[name], objects[name], leaves)
        keys = {key for path in unfit for key in _prefixes(path)}
        fitting[name] = {
            tag: [pair for pair in content if str(pair[0]) not in keys]
            if isinstance(content, list)
            else content
            for tag, content in fitting[name].items()
        }
    return fitting


def _prefixes(path: str) -> list[str]:
    names = path.split("/")
    return ["/".join(names[:count]) for count in range(1, len(names) + 1)]
