"""Spot markets over time: calm, scripted, drawn by chance, or recorded.

The local fleet plays them to real processes, and simulations play them to policies.
"""

from __future__ import annotations

from spotfirst_airflow.markets.base import (
    MANY,
    CalmMarket,
    Course,
    Market,
    MarketOptions,
    ScriptedMarket,
    Steps,
    ZoneState,
)
from spotfirst_airflow.markets.calibrated import CalibratedMarket
from spotfirst_airflow.markets.options import market_options
from spotfirst_airflow.markets.recorded import RecordedMarket
from spotfirst_airflow.markets.synthetic import SyntheticMarket

__all__ = [
    "MANY",
    "CalibratedMarket",
    "CalmMarket",
    "Course",
    "Market",
    "MarketOptions",
    "RecordedMarket",
    "ScriptedMarket",
    "Steps",
    "SyntheticMarket",
    "ZoneState",
    "market_options",
]
