"""Ends runs whose task was marked while no triggerer could hear of it.

A trigger's ``on_kill`` is what normally stops a run: within a second or two, in the triggerer. But
nobody calls it when no triggerer is up at that moment, or when it dies while it stops the run; and
a task that waits in a worker (``deferrable=False``) may lose its worker and have no try left. The
scheduler and the API server know of all of these, so they look again a little later.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from airflow.listeners import hookimpl

if TYPE_CHECKING:
    from spotfirst_airflow.taskrecord import TaskRecord

__all__ = ["GRACE_S", "on_task_instance_failed", "on_task_instance_success"]

GRACE_S = 10.0
"""How long the triggerer has for it. Doing it twice would be harmless."""

_log = logging.getLogger(__name__)
_THREADS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="spotfirst-listener")
_FINAL = {"success", "failed", "skipped", "upstream_failed", "removed"}


class _Task(NamedTuple):
    """What must be known after the session of the event is gone."""

    ti_id: str
    dag_id: str
    run_id: str
    task_id: str
    map_index: int


@hookimpl
def on_task_instance_failed(previous_state: Any, task_instance: Any, error: Any) -> None:  # noqa: ARG001
    """A task was marked as failed, or its worker was lost."""
    _look_again_later(task_instance)


@hookimpl
def on_task_instance_success(previous_state: Any, task_instance: Any) -> None:  # noqa: ARG001
    """A task was marked as successful."""
    _look_again_later(task_instance)


def _look_again_later(task_instance: Any) -> None:
    # Workers call these hooks as well, at the regular end of every task: those are not meant.
    if type(task_instance).__module__ != "airflow.models.taskinstance":
        return
    task = _Task(
        str(task_instance.id), task_instance.dag_id, task_instance.run_id,
        task_instance.task_id, task_instance.map_index,
    )  # fmt: skip
    with contextlib.suppress(RuntimeError):  # the process ends
        _THREADS.submit(_end_run, task)


def _end_run(task: _Task) -> None:
    """Stop the run of a task instance that is still final, and see its instances go."""
    try:
        if _told(task) is None:  # most tasks are not ours, and need no waiting for
            return
        time.sleep(GRACE_S)
        told = _told(task)
        if told is not None and _is_final(task):
            _stop(task, told)
    except Exception:  # noqa: BLE001 - nobody waits for this thread, so it must tell by itself
        _log.exception("Could not look whether the run of %s has ended", task)


def _told(task: _Task) -> TaskRecord | None:
    from airflow.utils.session import create_session

    from spotfirst.errors import UntrustedObject
    from spotfirst_airflow.taskrecord import TaskKey
    from spotfirst_ui.told import told_about_run

    try:
        with create_session() as session:
            return told_about_run(session, TaskKey(*task[1:]))
    except UntrustedObject as error:
        _log.warning("Not looking after the run of %s: %s", task, error)
        return None


def _is_final(task: _Task) -> bool:
    """Whether the task instance has ended for good. A clear gives it another id."""
    from airflow.models.taskinstance import TaskInstance
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        state = session.scalar(
            select(TaskInstance.state).where(TaskInstance.id == UUID(task.ti_id))
        )
    return str(getattr(state, "value", state)) in _FINAL


def _stop(task: _Task, told: TaskRecord) -> None:
    from spotfirst.run import Run
    from spotfirst_airflow.following import Follower
    from spotfirst_airflow.hooks import SpotfirstHook
    from spotfirst_airflow.submission import request_stop

    def open_run() -> tuple[Run, Mapping[str, str]]:
        hook = SpotfirstHook(told.conn_id)
        return Run(hook.open_storage(told.storage), told.run_id), hook.environment()

    run, _ = open_run()
    state = run.journal().refresh()
    if state.is_final and not state.open_attempts:
        return
    if not request_stop(run, reason="its task in Airflow was marked", owner=task.ti_id):
        return
    _log.warning("Nobody looked after run %s of a task that has ended: stopping it", run.run_id)
    follower = Follower(open_run, log=_log, owner=task.ti_id, show_output=False)
    while (wait_s := follower.look()) is not None:
        time.sleep(wait_s)
