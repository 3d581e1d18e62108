"""Policies by name, from the entry points in group ``spotfirst.policies``."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

import msgspec

from spotfirst.errors import InvalidSpec
from spotfirst_airflow.policies.base import Policy

__all__ = ["load_policy"]


def load_policy(name: str, options: Mapping[str, Any]) -> Policy:
    """The policy of this name. Raises :class:`InvalidSpec` for an unknown name or option."""
    found = {entry.name: entry for entry in entry_points(group="spotfirst.policies")}
    if name not in found:
        msg = f"unknown policy {name!r}; installed are: {', '.join(sorted(found)) or 'none'}"
        raise InvalidSpec(msg)
    kind: type[Policy] = found[name].load()
    try:
        return msgspec.convert(dict(options), kind)
    except msgspec.ValidationError as error:
        msg = f"policy {name!r} cannot be made from {dict(options)}: {error}"
        raise InvalidSpec(msg) from error
