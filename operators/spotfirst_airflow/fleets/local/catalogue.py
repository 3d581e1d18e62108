"""The instance types that the local fleet pretends to have, and what they would cost.

Nothing here is ever charged: the figures make a local run's costs look like those of a real one.

- On demand: AWS's list prices for Linux in us-east-1, the same as in the price table of the EC2
  fleet (``spotfirst prices``), which says of when and from where they are.
- Spot: round figures of the usual size for these types, about a third of the list price or more.
  They are *not* quotes of any day.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from spotfirst.errors import InvalidSpec
from spotfirst.wire import Record

__all__ = ["CATALOGUE", "ON_DEMAND_SOURCE", "InstanceType", "known_types"]

ON_DEMAND_SOURCE = "local fleet: AWS's list price, Linux, us-east-1, 2026-07"
_SMALLEST_PRICE = Decimal("0.0001")


class InstanceType(Record):
    """One type. ``spot_usd_h`` is what spot typically costs; markets vary around it."""

    name: str
    gpus: str
    on_demand_usd_h: Decimal
    spot_usd_h: Decimal

    def spot_price(self, *, price_usd_h: float | None, factor: float) -> Decimal:
        """The spot price in a market that states one, or else a factor on the typical one.

        A factor never lifts it above the on-demand price, as AWS caps it there by default.
        """
        if price_usd_h is not None:
            price = Decimal(str(price_usd_h))
        else:
            price = min(self.spot_usd_h * Decimal(str(factor)), self.on_demand_usd_h)
        return max(price.quantize(_SMALLEST_PRICE), _SMALLEST_PRICE)


CATALOGUE = {
    name: InstanceType(
        name=name, gpus=gpus, on_demand_usd_h=Decimal(on_demand), spot_usd_h=Decimal(spot)
    )
    for name, gpus, on_demand, spot in (
        ("g4dn.xlarge", "1 x T4 16 GB", "0.526", "0.21"),
        ("g4dn.12xlarge", "4 x T4 16 GB", "3.912", "1.60"),
        ("g5.xlarge", "1 x A10G 24 GB", "1.006", "0.44"),
        ("g5.12xlarge", "4 x A10G 24 GB", "5.672", "2.60"),
        ("g6.xlarge", "1 x L4 24 GB", "0.8048", "0.36"),
        ("g6.12xlarge", "4 x L4 24 GB", "4.6016", "2.00"),
        ("g6e.xlarge", "1 x L40S 48 GB", "1.861", "0.85"),
        ("p3.2xlarge", "1 x V100 16 GB", "3.06", "1.00"),
    )
}


def known_types(names: Sequence[str]) -> list[InstanceType]:
    """These types, or all when none is named. Raises :class:`InvalidSpec` for an unknown one."""
    unknown = [name for name in names if name not in CATALOGUE]
    if unknown:
        msg = (
            f"instance_types has {', '.join(map(repr, unknown))}, and the local fleet has no such "
            f"instance type; it has {', '.join(CATALOGUE)}"
        )
        raise InvalidSpec(msg)
    return [CATALOGUE[name] for name in names or CATALOGUE]
