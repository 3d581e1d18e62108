"""The names of zones: which region one is in."""

from __future__ import annotations

import re

__all__ = ["region_of"]

_ZONE = re.compile(r"(.*\d)-?[a-z]$")


def region_of(zone: str) -> str:
    """``us-east-1`` of ``us-east-1a``, ``us-central1`` of ``us-central1-a``; else the name itself."""
    found = _ZONE.fullmatch(zone)
    return found[1] if found else zone
