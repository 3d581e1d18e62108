"""Which run a task instance has, as it said so itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from spotfirst.errors import UntrustedObject
from spotfirst_airflow.taskrecord import RUN_XCOM_KEY, TaskKey, TaskRecord, read_record

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["told_about_run"]


def told_about_run(session: Session, task: TaskKey) -> TaskRecord | None:
    """The XCom that the task pushed before anything was launched; ``None`` before that.

    People can edit XComs: raises :class:`UntrustedObject` for one that this very task did not sign,
    or signed with a key that this process does not have.
    """
    from airflow.models.xcom import XComModel

    query = XComModel.get_many(
        run_id=task.run_id,
        key=RUN_XCOM_KEY,
        task_ids=task.task_id,
        dag_ids=task.dag_id,
        map_indexes=task.map_index,
        limit=1,
    )
    # Annotated, because get_many() is declared as one of tuples.
    found: Any = session.scalars(query).first()
    if found is None:
        return None
    record = read_record(_plain(found.value), task)
    if record is None:
        msg = (
            f"the XCom {RUN_XCOM_KEY!r} of this task was edited, or signed with another control key "
            "than the one here; give all hosts of Airflow the same one"
        )
        raise UntrustedObject(msg)
    return record


def _plain(value: object) -> object:
    """The value as plain JSON. Airflow's own decoder would make objects of what people wrote."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
