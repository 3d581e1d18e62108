"""The web application below ``/spotfirst``: every route asks Airflow who may see which DAG.

Which run a task instance has, and where it is stored, is read from the XCom that the task signed,
never from the address: neither an address nor an edited XCom can make the server read another
storage, use another connection, or show a run that belongs to another DAG.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Annotated

from airflow.api_fastapi.auth.managers.models.resource_details import DagAccessEntity
from airflow.api_fastapi.core_api.security import requires_access_dag
from airflow.utils.session import create_session
from fastapi import Depends, FastAPI, HTTPException, Path
from fastapi.responses import HTMLResponse

from spotfirst.errors import FormatError, SpotfirstError, UnknownRun, UntrustedObject
from spotfirst.run import Run
from spotfirst.wire import utc_now
from spotfirst_airflow.hooks import SpotfirstHook
from spotfirst_airflow.taskrecord import TaskKey, TaskRecord
from spotfirst_ui.page import render_message, render_run
from spotfirst_ui.pool import Busy, PagePool, TooSlow
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
_LONGEST_ID = 250
"""Airflow's own bound on ids of DAGs, runs and tasks."""
_LAST_MAP_INDEX = 2**31 - 1


def _from_database(task: TaskKey) -> TaskRecord | None:
    with create_session() as session:
        return told_about_run(session, task)


def _check_address(dag_id: str, run_id: str, task_id: str) -> None:
    """Refuse what names nothing before a database is asked, which may not take it at all."""
    for name in (dag_id, run_id, task_id):
        # Control characters (a database refuses NUL), and halves of characters.
        if len(name) > _LONGEST_ID or any(unicodedata.category(c) in {"Cc", "Cs"} for c in name):
            raise HTTPException(404, "There is no such task")


def build_app(
    *,
    find: Callable[[TaskKey], TaskRecord | None] = _from_database,
    pool: PagePool | None = None,
) -> FastAPI:
    """The application that Airflow mounts. It has no schema and no documentation pages.

    ``find`` tells which run a task instance has; ``pool`` is where pages are made.
    """
    app = FastAPI(title="Spotfirst", openapi_url=None, docs_url=None, redoc_url=None)
    pages = pool or PagePool()

    @app.get(
        "/dags/{dag_id}/runs/{run_id}/tasks/{task_id}/{map_index}",
        dependencies=[
            Depends(_check_address),
            Depends(requires_access_dag("GET", DagAccessEntity.TASK_INSTANCE)),
            Depends(requires_access_dag("GET", DagAccessEntity.TASK_LOGS)),
        ],
        response_class=HTMLResponse,
    )
    async def run_page(
        dag_id: str,
        run_id: str,
        task_id: str,
        map_index: Annotated[int, Path(ge=-1, le=_LAST_MAP_INDEX)],
    ) -> HTMLResponse:
        task = TaskKey(dag_id, run_id, task_id, map_index)
        title = f"{dag_id} / {task_id}"
        try:
            return await pages.run(lambda: _run_page(title, task, find))
        except Busy:
            return _later(title, "Too many pages are waiting for their storage.")
        except TooSlow:
            return _later(title, "The storage of this run does not answer now.")

    return app


def _run_page(
    title: str, task: TaskKey, find: Callable[[TaskKey], TaskRecord | None]
) -> HTMLResponse:
    try:
        try:
            told, why = find(task), ""
        except UntrustedObject as error:
            told, why = None, f", as far as can be told here: {error}"
        if told is None:
            text = f"This task has not attached to a run yet{why}."
            return _page(render_message(title, text, refresh_s=15 if why else 3))
        storage = SpotfirstHook(told.conn_id).open_storage(told.storage)
        return _page(render_run(title, look_at(Run(storage, told.run_id), utc_now())))
    except UnknownRun as error:
        raise HTTPException(404, "There is no such run") from error
    except FormatError as error:  # trying again would not help, and the message says what may
        text = f"The run cannot be read: {error}"
        return _page(render_message(title, text, refresh_s=60), status=503)
    except SpotfirstError as error:
        return _later(title, f"The run cannot be read now ({type(error).__name__}).")


def _later(title: str, text: str) -> HTMLResponse:
    body = render_message(title, f"{text} This page tries again.", refresh_s=15)
    answer = _page(body, status=503)
    answer.headers["Retry-After"] = "15"
    return answer


def _page(body: str, *, status: int = 200) -> HTMLResponse:
    return HTMLResponse(body, status_code=status, headers=_HEADERS)
