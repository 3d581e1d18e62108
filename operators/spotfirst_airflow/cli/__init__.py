"""The ``spotfirst`` command line: train, look, pay and clean up without Airflow."""

from __future__ import annotations

from spotfirst_airflow.cli._app import app

__all__ = ["app"]
