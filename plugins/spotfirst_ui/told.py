"""Which run a task instance has, as it said so itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spotfirst_airflow.operators import RUN_XCOM_KEY
from spotfirst_airflow.submission import base_run_id, is_run_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

__all__ = ["told_about_run"]


def told_about_run(
    session: Session, dag_id: str, run_id: str, task_id: str, map_index: int
) -> dict[str, Any] | None:
    """The XCom that the task pushed before anything was launched; ``None`` before that.

    People can edit XComs, so one that names the run of another task instance counts as none.
    """
    from airflow.models.xcom import XComModel

    query = XComModel.get_many(
        run_id=run_id,
        key=RUN_XCOM_KEY,
        task_ids=task_id,
        dag_ids=dag_id,
        map_indexes=map_index,
        limit=1,
    )
    found = session.scalars(query).first()
    value = XComModel.deserialize_value(found) if found is not None else None
    if not isinstance(value, dict) or not value.keys() >= {"run_id", "storage"}:
        return None
    base_id, own_id = base_run_id(dag_id, run_id, task_id, map_index), str(value["run_id"])
    if not is_run_of(base_id, own_id):
        return None
    return value
