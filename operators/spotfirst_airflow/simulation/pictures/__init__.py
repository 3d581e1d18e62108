"""A backtest as one HTML page with its pictures."""

from __future__ import annotations

from spotfirst_airflow.simulation.pictures.page import render_page

__all__ = ["render_page"]
