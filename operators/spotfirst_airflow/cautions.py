"""What a fleet wants people to know who look at a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from spotfirst_airflow.fleets import Fleet

__all__ = ["Warns", "cautions"]


@runtime_checkable
class Warns(Protocol):
    """A fleet that has something to say of all its runs. Optional."""

    def warnings(self) -> Sequence[str]:
        """Sentences for people. What comes before ``"; "`` says it once: the rest may differ."""


def cautions(fleet: Fleet, known: Sequence[str]) -> list[str]:
    """What the fleet warns of, without what is among the run's known warnings."""
    if not isinstance(fleet, Warns):
        return []
    return [
        text
        for text in fleet.warnings()
        if not any(told.startswith(text.partition("; ")[0]) for told in known)
    ]
