"""Which run a task instance has, as the task itself wrote it down: signed, since people edit XComs.

The page of a run and the listener have only the database to ask. The XCom that they find there
carries a signature over the task instance and all that it says, so one that was edited, or copied
from another task, counts as none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from airflow.sdk.exceptions import AirflowNotFoundException

from spotfirst.errors import FormatError, InvalidSpec
from spotfirst.signing import Seal, default_keys
from spotfirst_airflow.hooks import SpotfirstHook
from spotfirst_airflow.submission import base_run_id, is_run_of

__all__ = ["RUN_XCOM_KEY", "TaskKey", "TaskRecord", "read_record", "signed_record"]

RUN_XCOM_KEY = "spotfirst_run"
"""Under this key the task says which run is its own, before anything is launched."""


class TaskKey(NamedTuple):
    """A task instance, whatever the try."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1

    @classmethod
    def of(cls, ti: Any) -> TaskKey:
        """That of an Airflow task instance."""
        return cls(ti.dag_id, ti.run_id, ti.task_id, ti.map_index)

    @property
    def base_run_id(self) -> str:
        """The id of the first generation of its run."""
        return base_run_id(*self)


class TaskRecord(NamedTuple):
    """A task's run, and the storage and connection by which it is reached."""

    run_id: str
    storage: str
    conn_id: str | None


def signed_record(record: TaskRecord, task: TaskKey, hook: SpotfirstHook) -> dict[str, Any]:
    """The record as an XCom."""
    data, _ = _seal(hook, record).close(_body(record), path=_place(task))
    return {**record._asdict(), "mac": json.loads(data)["mac"]}


def read_record(value: object, task: TaskKey) -> TaskRecord | None:
    """The record that this very task signed; ``None`` for anything else."""
    if not isinstance(value, Mapping):
        return None
    run_id, storage, conn_id, mac = (
        value.get(name) for name in ("run_id", "storage", "conn_id", "mac")
    )
    if not all(isinstance(text, str) for text in (run_id, storage, mac)):
        return None
    if not isinstance(conn_id, (str, type(None))) or not is_run_of(task.base_run_id, str(run_id)):
        return None
    record = TaskRecord(str(run_id), str(storage), conn_id)
    body = _body(record)
    data = b'%s,"mac":%s}' % (body[:-1], json.dumps(mac).encode())
    try:
        _seal(SpotfirstHook(conn_id), record).open(data, path=_place(task))
    except (FormatError, InvalidSpec, AirflowNotFoundException):
        return None
    return record


def _seal(hook: SpotfirstHook, record: TaskRecord) -> Seal:
    # The key of the connection that the record names: to forge it takes that key.
    return Seal(hook.control_keys() or default_keys(), record.run_id, f"XCom {RUN_XCOM_KEY}")


def _body(record: TaskRecord) -> bytes:
    return json.dumps({"v": 1, **record._asdict()}, sort_keys=True).encode()


def _place(task: TaskKey) -> str:
    return json.dumps(["task record", *task])
