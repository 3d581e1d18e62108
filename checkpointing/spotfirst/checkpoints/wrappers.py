"""Modules under their own names, without what compilers and parallel training wrap around them.

``torch.compile`` adds ``_orig_mod.`` to the names of a module's tensors, DistributedDataParallel
``module.``, FSDP and activation checkpointing names of their own. A checkpoint has none of them, so
it can be restored with or without each.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch  # noqa: TID253 - it is about torch's modules; only the Checkpointer imports it

__all__ = [
    "load_module",
    "loads_itself",
    "matched",
    "module_state",
    "own_tree",
    "parameter_names",
    "unwrapped",
]

_ORIGINAL = "_orig_mod"
_RESERVED = frozenset({_ORIGINAL, "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What torch calls a wrapped module; torch.distributed leaves these out of names as well."""
_REPLICATED = (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)


def unwrapped(value: Any) -> Any:
    """A module without ``torch.compile``, DistributedDataParallel and DataParallel around it."""
    while isinstance(value, torch.nn.Module):
        if isinstance(value, _REPLICATED):
            value = value.module
        elif [name for name, _ in value.named_children()] == [_ORIGINAL]:
            value = value.get_submodule(_ORIGINAL)  # OptimizedModule, which is slow to import
        else:
            break
    return value


def module_state(module: torch.nn.Module) -> Any:
    """``module.state_dict()`` with the names that the unwrapped module has."""
    state = module.state_dict()
    own = _namer(module)
    if own is None or not isinstance(state, Mapping):
        return state
    renamed = OrderedDict((own(key), value) for key, value in state.items())
    if len(renamed) != len(state):  # two wrappers of one name; keep them apart
        return state
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        named = OrderedDict((own(path), each) for path, each in metadata.items())
        renamed._metadata = named  # type: ignore[attr-defined]  # noqa: SLF001 - where torch keeps it
    return renamed


def load_module(module: torch.nn.Module, state: Any, *, strict: bool) -> None:
    """Load what :func:`module_state` returned. Raises what ``load_state_dict`` raises."""
    own = _namer(module)
    if own is not None and isinstance(state, Mapping):
        present = {own(key): key for key in module.state_dict()}
        metadata = getattr(state, "_metadata", None)
        state = OrderedDict((present.get(key, key), value) for key, value in state.items())
        if metadata is not None:
            paths = [path for path, _ in module.named_modules(remove_duplicate=False)]
            found = {path: metadata[own(path)] for path in paths if own(path) in metadata}
            state._metadata = OrderedDict(found)  # noqa: SLF001
    module.load_state_dict(state, strict=strict)


def loads_itself(module: torch.nn.Module, path: str) -> bool:
    """Whether the user's code has a part in how the tensor at ``path`` is loaded.

    Then only ``load_state_dict`` knows what fits: a buffer may have grown, or have another name.
    """
    *parents, _ = path.split(".")
    for each in (module, *_along(module, parents)):
        hooks = [getattr(h, "hook", h) for h in each._load_state_dict_pre_hooks.values()]  # noqa: SLF001
        methods = [type(each).load_state_dict, type(each)._load_from_state_dict]  # noqa: SLF001
        for code in (*hooks, *methods):
            made = code.func if isinstance(code, functools.partial) else code
            if not getattr(made, "__module__", "").startswith("torch."):
                return True
    return False


def _along(module: torch.nn.Module, names: Iterable[str]) -> Iterable[torch.nn.Module]:
    """The submodules along a path, as far as it goes, looking through wrappers."""
    for name in names:
        children = dict(module.named_children())
        while name not in children and (inner := sorted(_RESERVED & children.keys())):
            module = children[inner[0]]
            yield module
            children = dict(module.named_children())
        if name not in children:
            return
        module = children[name]
        yield module


def parameter_names(objects: Mapping[str, Any]) -> dict[int, list[str]]:
    """The names of all parameters of the modules among ``objects``, by the parameter's ``id``.

    A tied parameter has several. The object's name comes first: ``model.0.weight``.
    """
    found: dict[int, list[str]] = {}
    for name, value in objects.items():
        if not isinstance(value, torch.nn.Module):
            continue
        own = _namer(value)
        for key, parameter in value.named_parameters(remove_duplicate=False):
            found.setdefault(id(parameter), []).append(f"{name}.{own(key) if own else key}")
    return found


def own_tree(stored: Any, here: Any) -> Any:
    """The tree of a stored module with the names of the tree at hand, looking through wrappers."""
    ours, theirs = _keys(here), _keys(stored)
    if ours is None or theirs is None:
        return stored
    found = matched(theirs, ours)
    return {
        tag: own_tree(content, here.get("metadata"))
        if tag == "metadata"
        else [[found.get(key, key) if isinstance(key, str) else key, node] for key, node in content]
        for tag, content in stored.items()
    }


def _keys(tree: Any) -> list[str] | None:
    """The keys of a mapping's tree that are text; ``None`` for another tree."""
    content = tree.get("ordered", tree.get("dict")) if isinstance(tree, dict) else None
    return None if content is None else [key for key, _ in content if isinstance(key, str)]


def matched(stored: Iterable[str], here: Iterable[str]) -> dict[str, str]:
    """Which stored name is which name here: the same, or the same but for wrappers.

    A name that could be several is left out.
    """
    there, present = dict.fromkeys(stored), dict.fromkeys(here)
    found = {name: name for name in there if name in present}
    ours = _unique(name for name in present if name not in found)
    theirs = _unique(name for name in there if name not in found)
    return found | {theirs[bare]: ours[bare] for bare in theirs.keys() & ours.keys()}


def _unique(names: Iterable[str]) -> dict[str, str]:
    """Names by what is left of them without wrappers, where that is one name only."""
    by_bare: dict[str, list[str]] = {}
    for name in names:
        by_bare.setdefault(_without(name, {*_RESERVED, "module"}), []).append(name)
    return {bare: names[0] for bare, names in by_bare.items() if len(names) == 1}


def _without(name: str, parts: Iterable[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in parts)


def _namer(module: torch.nn.Module) -> Callable[[Any], Any] | None:
    """What gives a tensor its own name; ``None`` when nothing in the module is wrapped."""
    replicas = set()
    is_wrapped = False
    for path, each in module.named_modules(remove_duplicate=False):
        if isinstance(each, _REPLICATED):
            replicas.add(f"{path}.module" if path else "module")
        is_wrapped = is_wrapped or any(name in _RESERVED for name, _ in each.named_children())
    if not replicas and not is_wrapped:
        return None

    def own(key: Any) -> Any:
        if not isinstance(key, str):
            return key
        parts, kept = key.split("."), []
        for count, part in enumerate(parts, 1):
            if part not in _RESERVED and ".".join(parts[:count]) not in replicas:
                kept.append(part)
        return ".".join(kept)

    return own
