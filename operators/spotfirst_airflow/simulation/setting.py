"""Where simulated runs take place, in words that go from one process to another."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from spotfirst.errors import InvalidSpec
from spotfirst.market import Pool
from spotfirst.wire import Record
from spotfirst_airflow.fleets.zones import region_of
from spotfirst_airflow.markets import market_options
from spotfirst_airflow.simulation.world import Place, World

__all__ = ["Setting", "Terms"]

_FIRST_DAY_S = 24 * 3600.0


class Terms(Record):
    """A pool and its dollars an hour: on demand, and on spot where the market states no price."""

    pool: Pool
    on_demand_usd_h: Decimal
    spot_usd_h: Decimal


class Setting(Record):
    """A market as of the local fleet's option ``market``, and the pools that a run may use.

    ``egress_usd_gb`` is the price of bringing a checkpoint to another region.
    """

    market: dict[str, Any]
    pools: tuple[Terms, ...]
    egress_usd_gb: Decimal = Decimal(0)

    def world(self) -> World:
        """To simulate in. Reads the recordings; raises :class:`InvalidSpec` for what is wrong."""
        options = market_options(self.market)
        return World(
            [
                Place(
                    terms.pool,
                    # Recordings are of zones; what is drawn by chance is, for each pool.
                    options.course(terms.pool.zone if options.zones() else str(terms.pool)),
                    on_demand_usd_h=terms.on_demand_usd_h,
                    spot_usd_h=terms.spot_usd_h,
                    region=region_of(terms.pool.zone),
                )
                for terms in self.pools
            ],
            egress_usd_gb=lambda _from, _to: self.egress_usd_gb,
        )

    def starts_s(self, count: int, *, lasts_s: float) -> tuple[float, ...]:
        """``count`` moments of the market, evenly, for runs that last ``lasts_s`` at most.

        Of a recording all of it is used, and nothing twice by one run. A market that is drawn by
        chance has no end: there the runs follow one another, from its second day on, as all of
        its zones begin with capacity.
        """
        recorded_s = market_options(self.market).lasts_s()
        if recorded_s is None:
            return tuple(_FIRST_DAY_S + number * lasts_s for number in range(count))
        room_s = recorded_s - lasts_s
        if room_s < 0:
            msg = (
                f"the recording has {recorded_s / 3600:.1f} h, but a run may take "
                f"{lasts_s / 3600:.1f} h; give a longer recording or a shorter deadline"
            )
            raise InvalidSpec(msg)
        return tuple(room_s * number / max(1, count - 1) for number in range(count))
