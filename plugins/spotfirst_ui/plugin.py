"""The Airflow plugin: the page of a run, the button that leads to it, and a safety net.

Every Airflow process loads plugins, task processes included, so nothing heavy is imported here:
the web application is built when the first request comes.
"""

from __future__ import annotations

from typing import Any

from airflow.plugins_manager import AirflowPlugin

from spotfirst_airflow.decorators import SpotTrainingDecoratedOperator
from spotfirst_airflow.links import UI_PREFIX, SpotRunLink
from spotfirst_airflow.operators import SpotTrainingOperator
from spotfirst_ui import listener

__all__ = ["SpotfirstPlugin"]


class _LazyApp:
    """An ASGI application that is built at its first use."""

    def __init__(self) -> None:
        self._app: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self._app is None:
            from spotfirst_ui.app import build_app

            self._app = build_app()
        await self._app(scope, receive, send)


class LiveRunLink(SpotRunLink):
    """Airflow asks the plugin for it at each look at a task instance of these operators."""

    operators = [SpotTrainingOperator, SpotTrainingDecoratedOperator]


class SpotfirstPlugin(AirflowPlugin):
    """Registered by the entry point ``airflow.plugins``."""

    name = "spotfirst"
    fastapi_apps = [{"app": _LazyApp(), "url_prefix": UI_PREFIX, "name": "Spotfirst"}]
    operator_extra_links = [LiveRunLink()]
    listeners = [listener]
