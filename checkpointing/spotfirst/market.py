"""The words that both sides use for where an attempt runs, and what announces its end."""

from __future__ import annotations

import enum
from datetime import datetime
from typing import Literal

from spotfirst.wire import Record

__all__ = ["INTERRUPTION_MEAN_VARIABLE", "Market", "Notice", "Pool"]

INTERRUPTION_MEAN_VARIABLE = "SPOTFIRST_INTERRUPTION_MEAN_S"
"""The mean time between interruptions of an instance's pool; set by a fleet that knows it."""


class Market(str, enum.Enum):
    """How an instance is bought."""

    SPOT = "spot"
    ON_DEMAND = "on-demand"

    def __str__(self) -> str:
        return self.value


class Pool(Record):
    """A capacity pool: one instance type in one zone. Prices and interruptions are per pool."""

    instance_type: str
    zone: str

    def __str__(self) -> str:
        return f"{self.instance_type} in {self.zone}"


class Notice(Record):
    """The fleet has said that an instance will go. ``time`` is when, for an interruption."""

    kind: Literal["interruption", "rebalance"]
    seen_at: datetime
    time: datetime | None = None
