"""Between the flat names of ``torch.distributed.checkpoint`` and the trees of a manifest.

A state dict ``{"model": {"a.weight": …}}`` has the name ``model.a.weight`` there; here it is the
object ``model`` with the key ``a.weight``. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spotfirst.errors import StateMismatch

__all__ = ["Path", "named", "nest"]

Path = tuple[str | int, ...]
"""Keys, and positions in lists."""

_MAPPINGS = ("dict", "ordered", "counter")


def nest(nodes: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, Any]:
    """Trees by object, from the ``nodes`` of names and where those are in the state dict."""
    root: dict[str, Any] = {}
    for name, node in nodes.items():
        path = paths.get(name, (name,))
        inner: dict[Any, Any] = root
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = _Node(node)
    return {str(key): _tree(value) for key, value in root.items()}


class _Node:
    def __init__(self, node: Any) -> None:
        self.node = node


def _tree(value: Any) -> Any:
    if isinstance(value, _Node):
        return value.node
    if all(type(key) is int for key in value) and sorted(value) == list(range(len(value))):
        return [_tree(value[position]) for position in range(len(value))]
    return {"dict": [[str(key), _tree(item)] for key, item in value.items()]}


def named(trees: Mapping[str, Any]) -> dict[str, tuple[Path, Any]]:
    """The names in a manifest's trees, as torch flattens a state dict: path and node of each."""
    found: dict[str, tuple[Path, Any]] = {}
    for key, tree in trees.items():
        for path, node in _walk(tree, (key,)):
            name = ".".join(map(str, path))
            if name in found:
                msg = f"the checkpoint has two values that are called {name!r} when flattened"
                raise StateMismatch(msg)
            found[name] = (path, node)
    return found


def _walk(node: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    pairs = _pairs(node)
    if pairs is not None:
        for key, item in pairs:
            plain = int(key["int"], 16) if isinstance(key, dict) else key
            yield from _walk(item, (*path, str(plain)))
    elif isinstance(node, list) and any(_is_entered(item) for item in node):
        for position, item in enumerate(node):
            yield from _walk(item, (*path, position))
    else:
        yield path, node


def _is_entered(item: Any) -> bool:
    """Whether torch looks into a list because of this item."""
    if isinstance(item, list):
        return any(_is_entered(each) for each in item)
    return isinstance(item, dict) and ("tensor" in item or _pairs(item) is not None)


def _pairs(node: Any) -> list[Any] | None:
    if isinstance(node, dict):
        for tag in _MAPPINGS:
            if tag in node:
                pairs: list[Any] = node[tag]
                return pairs
    return None
