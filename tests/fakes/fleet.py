"""Production's fleet on a simulated cloud: the one place that knows how it is put together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any

from spotfirst.storage import Storage
from spotfirst_airflow.fleets.ec2.account import Account
from spotfirst_airflow.fleets.ec2.ending import Endings
from spotfirst_airflow.fleets.ec2.fleet import Ec2Fleet
from spotfirst_airflow.fleets.ec2.prices import forget_spot_prices
from spotfirst_airflow.fleets.ec2.pricetable import PriceTable, load_table
from spotfirst_airflow.fleets.ec2.watching import Watcher
from tests.fakes.clients import FakeAws
from tests.fakes.clock import SteppedClock

_table: list[PriceTable] = []


def fleet_of(
    aws: FakeAws, options: Mapping[str, Any], clock: SteppedClock, storage: Storage, *, by: str
) -> Ec2Fleet:
    """The fleet of one process: it shares nothing with those of others. ``storage`` is its view."""
    given: Any = aws
    watcher = Watcher.of(
        given,
        options.get("queue_url", ""),
        environment={},
        clock=clock,
        monotonic=clock.monotonic,
        background=False,
        open_storage=lambda *_: storage,
        by=by,
    )
    return Ec2Fleet(
        options, environment={}, clock=clock, aws=given, watcher=watcher, publish=_publish,
        monotonic=clock.monotonic,
    )  # fmt: skip


def forget_processes() -> None:
    """Drop what the processes of a schedule kept in this one."""
    Watcher.forget_all()
    Account.forget_all()
    Endings.forget_all()
    forget_spot_prices()


def on_demand_usd_h(region: str, types: Collection[str]) -> dict[str, Decimal]:
    """Production's own on-demand prices: the cloud asks for what its price list says."""
    if not _table:
        _table.append(load_table())
    return {name: _table[0].regions[region].usd_h[name] for name in types}


def _publish(_: Storage, __: Collection[str]) -> str:
    """Wheels are for real instances."""
    return "0" * 64
