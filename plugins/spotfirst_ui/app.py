"""The web application below ``/spotfirst``: every route asks Airflow who may see which DAG.

Which run a task instance has, and where it is stored, is read from the XCom that the task signed,
never from the address: neither an address nor an edited XCom can make the server read another
storage, use another connection, or show a run that belongs to another DAG.
"""

from __future__ import annotations

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from airflow.utils.session import create_session
from fastapi import Depends, FastAPI, HTTPException
from fastapi.responses import HTMLResponse

from spotfirst.errors import SpotfirstError, UnknownRun
from spotfirst.run import Run
from spotfirst.wire import utc_now
from spotfirst_airflow.hooks import SpotfirstHook
from spotfirst_airflow.taskrecord import TaskKey
from spotfirst_ui.page import render_message, render_run
from spotfirst_ui.told import told_about_run
from spotfirst_ui.view import look_at

__all__ = ["build_app"]

_HEADERS = {
    # Nothing on these pages needs a script, another origin, or a frame around it elsewhere.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'self'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def build_app() -> FastAPI:
    """The application that Airflow mounts. It has no schema and no documentation pages."""
    app = FastAPI(title="Spotfirst", openapi_url=None, docs_url=None, redoc_url=None)

    # Not async: Starlette runs it in a thread, as the storage and the database may block.
    @app.get(
        "/dags/{dag_id}/runs/{run_id}/tasks/{task_id}/{map_index}",
        dependencies=[
            Depends(requires_access_dag("GET", DagAccessEntity.TASK_INSTANCE)),
            Depends(requires_access_dag("GET", DagAccessEntity.TASK_LOGS)),
        ],
        response_class=HTMLResponse,
    )
    def run_page(dag_id: str, run_id: str, task_id: str, map_index: int) -> HTMLResponse:
        title = f"{dag_id} / {task_id}"
        with create_session() as session:
            told = told_about_run(session, TaskKey(dag_id, run_id, task_id, map_index))
        if told is None:
            text = "This task has not attached to a run yet."
            return _page(render_message(title, text, refresh_s=3))
        try:
            storage = SpotfirstHook(told.conn_id).open_storage(told.storage)
            view = look_at(Run(storage, told.run_id), utc_now())
        except UnknownRun as error:
            raise HTTPException(404, "There is no such run") from error
        except SpotfirstError as error:
            text = f"The run cannot be read now ({type(error).__name__}). This page tries again."
            return _page(render_message(title, text, refresh_s=15), status=503)
        return _page(render_run(title, view))

    return app


def _page(body: str, *, status: int = 200) -> HTMLResponse:
    return HTMLResponse(body, status_code=status, headers=_HEADERS)
