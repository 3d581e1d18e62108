"""Restoring what fits of a checkpoint, when the script has changed since: ``strict=False``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch  # noqa: TID253 - it loads modules and optimizers; only the Checkpointer imports it

from spotfirst.checkpoints.loading import unfit_arrays
from spotfirst.checkpoints.manifest import StateManifest
from spotfirst.checkpoints.statetree import Leaf

__all__ = ["fitting_trees", "load_fitting"]


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


def load_fitting(value: Any, state: Any) -> list[str]:
    """Load ``state`` into an object as far as it fits; what was left out of it.

    Raises what its ``load_state_dict`` raises.
    """
    if isinstance(value, torch.nn.Module):
        value.load_state_dict(state, strict=False)
        return []
    skipped: list[str] = []
    if isinstance(value, torch.optim.Optimizer):
        state, skipped = _of_same_shapes(value, state)
    value.load_state_dict(state)
    return skipped


def _of_same_shapes(
    optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """An optimizer checks how many parameters there are, but not whether its tensors fit them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fitting, skipped = {}, []
    for key, kept in state["state"].items():
        shape = parameters[key].shape if key in range(len(parameters)) else None
        tensors = [v for v in kept.values() if isinstance(v, torch.Tensor)] if shape else []
        # Of other dimensions are step counts and factored moments.
        if any(len(v.shape) == len(shape or ()) and v.shape != shape for v in tensors):
            skipped.append(f"the state of parameter {key}, which has another shape")
        else:
            fitting[key] = kept
    return {**state, "state": fitting}, skipped
