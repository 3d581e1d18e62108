"""``python -m spotfirst_airflow.cli``: the same as ``spotfirst``."""

from __future__ import annotations

from spotfirst_airflow.cli import app

app(prog_name="spotfirst")
