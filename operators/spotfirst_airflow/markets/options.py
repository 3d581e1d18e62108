"""Which market a person means: its kind by name, and what that kind lets them say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spotfirst.errors import InvalidSpec
from spotfirst_airflow.fleets.options import parse
from spotfirst_airflow.markets.base import CalmMarket, MarketOptions, ScriptedMarket
from spotfirst_airflow.markets.calibrated import CalibratedMarket
from spotfirst_airflow.markets.recorded import RecordedMarket
from spotfirst_airflow.markets.synthetic import SyntheticMarket

__all__ = ["market_options"]

_MARKETS: dict[str, type[MarketOptions]] = {
    kind.kind: kind
    for kind in (CalmMarket, ScriptedMarket, SyntheticMarket, CalibratedMarket, RecordedMarket)
}


def market_options(options: Mapping[str, Any]) -> MarketOptions:
    """What is said about the market, parsed. Raises :class:`InvalidSpec`."""
    kind = options.get("kind")
    if kind not in _MARKETS:
        msg = f"fleet option market.kind is {kind!r}; it must be one of {', '.join(_MARKETS)}"
        raise InvalidSpec(msg)
    rest = {name: value for name, value in options.items() if name != "kind"}
    market = parse(_MARKETS[kind], rest, where=f"{kind} market")
    market.check()
    return market
