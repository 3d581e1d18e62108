"""Policies by name: of an entry point in group ``spotfirst.policies``, or ``MODULE:CLASS``.

A policy crosses from a DAG to whoever controls the run as words, in the spec: the name of its class
and its options. Nothing is pickled.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import msgspec

from spotfirst.errors import InvalidSpec
from spotfirst.wire import prepared
from spotfirst_airflow.policies.base import Policy

__all__ = ["in_words", "installed_policies", "load_policy"]

_GROUP = "spotfirst.policies"


def installed_policies() -> list[str]:
    """The names that :func:`load_policy` knows."""
    return sorted(_entries())


@functools.cache
def _entries() -> dict[str, EntryPoint]:
    """By name. Looking them up reads the metadata of every installed package, so only once."""
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def load_policy(name: str, options: Mapping[str, Any]) -> Policy:
    """The policy of this name. Raises :class:`InvalidSpec` for an unknown name or option."""
    kind = _imported(name) if ":" in name else _installed(name)
    try:
        policy: Policy = msgspec.convert(dict(options), prepared(kind))
    except msgspec.ValidationError as error:
        msg = f"policy {name!r} cannot be made from {dict(options)}: {error}"
        raise InvalidSpec(msg) from error
    return policy


def in_words(policy: str | Policy, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A policy as its name and its options. Raises :class:`InvalidSpec` if no words make it again."""
    if isinstance(policy, str):
        return policy, dict(options)
    kind = type(policy)
    name = f"{kind.__module__}:{kind.__qualname__}"
    if options:
        msg = f"policy_options {dict(options)} are for a policy by name; {name} brings its own"
        raise InvalidSpec(msg)
    try:
        words: dict[str, Any] = msgspec.to_builtins(policy)
        again = load_policy(name, words)
    except (InvalidSpec, TypeError) as error:
        msg = (
            f"policy {policy!r} cannot be handed to those who control the run: {error}. Make its "
            "class a msgspec.Struct of plain options, in a module that Airflow's triggerer can "
            "import (a package, or Airflow's plugins folder), not in the DAG file"
        )
        raise InvalidSpec(msg) from error
    if again != policy:
        msg = f"policy {policy!r} is not the same when it is made again from {words}"
        raise InvalidSpec(msg)
    return name, words


def _installed(name: str) -> Any:
    found = _entries()
    if name not in found:
        msg = (
            f"unknown policy {name!r}; installed are: {', '.join(sorted(found)) or 'none'}. "
            "One of your own is MODULE:CLASS"
        )
        raise InvalidSpec(msg)
    return found[name].load()


def _imported(name: str) -> Any:
    module_name, _, class_name = name.partition(":")
    if module_name == "__main__" or module_name.startswith("unusual_prefix_"):
        msg = f"policy {name!r} is in a script, or a DAG file, which nobody else can import"
        raise InvalidSpec(msg)
    try:
        module = sys.modules.get(module_name) or importlib.import_module(module_name)
        kind = getattr(module, class_name)
    except (ImportError, AttributeError, ValueError) as error:
        msg = f"policy {name!r} cannot be imported: {error}"
        raise InvalidSpec(msg) from error
    is_policy = isinstance(kind, type) and issubclass(kind, msgspec.Struct)
    if not is_policy or not callable(getattr(kind, "decide", None)):
        msg = f"policy {name!r} is no msgspec.Struct with a method decide(view)"
        raise InvalidSpec(msg)
    return kind
