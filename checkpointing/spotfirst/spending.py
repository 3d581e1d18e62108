"""What an attempt costs, by its journal: the rules of billing, for whoever has to keep a budget.

The controllers and the reports use them, and so does the agent on an instance, which has to stop
within the budget when no controller is left to say so.

Billing rules (AWS, "Billing for interrupted Spot Instances"): a spot instance that AWS takes back
within its first hour is free; otherwise the seconds used are paid, on demand as well. A minimum of
a minute, of which only others tell, is not counted.

What crosses from one region to another is paid by the GB (10^9 bytes).
"""

from __future__ import annotations

from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal

from spotfirst.events import Launched
from spotfirst.market import Market
from spotfirst.state import Attempt
from spotfirst.wire import Record

__all__ = [
    "FREE_IF_INTERRUPTED_WITHIN_S",
    "Used",
    "amount_usd",
    "egress_usd",
    "ended_egress_usd",
    "used",
]

FREE_IF_INTERRUPTED_WITHIN_S = 3600.0
_QUANTUM = Decimal("0.0001")
_GB = 10**9


class Used(Record):
    """What an attempt's instance is paid for: billed seconds until ``end``, and why so many."""

    end: datetime
    used_s: float
    cost_usd: Decimal
    rule: str

    @property
    def is_free(self) -> bool:
        """Whether the fleet took it back in time for it to cost nothing."""
        return self.rule.startswith("free")


def used(attempt: Attempt, *, now: datetime) -> Used:
    """The cost of a launched attempt up to ``now``, without what crosses between regions."""
    launched, ended = attempt.launched, attempt.ended
    assert launched is not None
    end = ended.ended_at if ended else max(now, launched.started_at)
    kept = ended.kept_until if ended else None
    if kept is not None:
        end = max(end, min(now, kept))
    used_s = max(0.0, (end - launched.started_at).total_seconds()) * launched.clock_rate
    cost, rule = amount_usd(used_s, launched.price_usd_h), "seconds used"
    if kept is not None:
        rule += f", kept for debugging until {kept:%Y-%m-%d %H:%M} UTC at most"
    if (
        ended
        and ended.by_fleet
        and attempt.market is Market.SPOT
        and used_s < FREE_IF_INTERRUPTED_WITHIN_S
    ):
        cost, rule = Decimal(0), "free: interrupted within the first hour"
    return Used(end=end, used_s=used_s, cost_usd=cost, rule=rule)


def egress_usd(launched: Launched, *, read_bytes: int, written_bytes: int) -> Decimal:
    """What these bytes cost between an instance and the run's storage, to a hundredth of a cent."""
    exact = read_bytes * launched.read_usd_gb + written_bytes * launched.write_usd_gb
    return (exact / _GB).quantize(_QUANTUM, rounding=ROUND_HALF_UP)


def ended_egress_usd(attempt: Attempt) -> Decimal:
    """What an ended attempt's bytes have cost."""
    launched, ended = attempt.launched, attempt.ended
    if launched is None or ended is None:
        return Decimal(0)
    return egress_usd(
        launched,
        read_bytes=ended.moved_bytes + ended.restored_bytes,
        written_bytes=ended.written_bytes,
    )


def amount_usd(seconds: float, price_usd_h: Decimal) -> Decimal:
    """So many seconds at a price by the hour, to a hundredth of a cent."""
    exact = Decimal(repr(seconds)) * price_usd_h / 3600
    return exact.quantize(_QUANTUM, rounding=ROUND_HALF_UP)
