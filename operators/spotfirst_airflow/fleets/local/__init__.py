"""The embedded fleet: every instance is a group of processes on this machine.

``supervisor`` plays one instance (metadata service, agent, market, kill); ``registry`` is what all
processes know about all instances; ``market`` and its kin say what spot capacity there is; and
``fleet`` puts them behind the protocol that every fleet has. Linux only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spotfirst_airflow.fleets.local.fleet import LocalFleet

__all__ = ["LocalFleet"]


def __getattr__(name: str) -> Any:
    # Lazy: the supervisor is a module of this package, and has no use for the fleet.
    if name == "LocalFleet":
        return importlib.import_module("spotfirst_airflow.fleets.local.fleet").LocalFleet
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
