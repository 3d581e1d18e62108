"""A figure with its target, and how figures are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

__all__ = ["Figure", "console", "figures_table"]

_WIDTH = 150
"""Of tables, where there is no terminal."""


@dataclass(frozen=True)
class Figure:
    """A ratio or an amount with its target; ``at_most`` tells on which side of it is good."""

    name: str
    value: float
    target: float | None
    at_most: bool
    what: str

    @property
    def met(self) -> bool | None:
        """Whether the target is met; ``None`` without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


def console() -> Console:
    """Where tables for people go."""
    found = Console(highlight=False)
    if not found.is_terminal:
        found.width = _WIDTH
    return found


def figures_table(found: Sequence[Figure]) -> Table:
    """One row each, with the target and whether it was met."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("figure", "value", "target", "", "what"):
        table.add_column(name, justify="right" if name in {"value", "target"} else "left")
    for each in found:
        sign = "≤" if each.at_most else "≥"
        table.add_row(
            each.name,
            f"{each.value:.4g}",
            "" if each.target is None else f"{sign} {each.target:g}",
            {None: "", True: "met", False: "missed"}[each.met],
            each.what,
        )
    return table
