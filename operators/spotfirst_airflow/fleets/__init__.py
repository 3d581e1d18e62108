"""Where instances come from. A fleet is found by its entry point in group ``spotfirst.fleets``."""

from __future__ import annotations

from spotfirst_airflow.fleets.base import (
    EndedBy,
    Fleet,
    Instance,
    InstanceState,
    LaunchRequest,
    Offer,
    load_fleet,
)

__all__ = [
    "EndedBy",
    "Fleet",
    "Instance",
    "InstanceState",
    "LaunchRequest",
    "Offer",
    "load_fleet",
]
