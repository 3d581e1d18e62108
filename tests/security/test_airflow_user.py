"""An Airflow user who may edit XComs, DAG-run conf and params, but not DAGs or connections.

``tests/airflow/test_security.py`` does the same to a real Airflow: its page, and its REST API.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, TaskDeferred

from spotfirst import events as e
from spotfirst.run import Run
from spotfirst.signing import KEY_VARIABLE, generate_key
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.hooks import SpotfirstHook
from spotfirst_airflow.operators import SpotTrainingOperator
from spotfirst_airflow.submission import Request, attach
from spotfirst_airflow.taskrecord import TaskKey, TaskRecord, read_record, signed_record
from spotfirst_ui.told import _plain

TASK = TaskKey("dag", "manual", "train")
BASE = TASK.base_run_id


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """Airflow's own key, and two connections: one with a key of its own."""
    key = generate_key()
    monkeypatch.setenv(KEY_VARIABLE, key)
    for name, extra in (("PLAIN", {}), ("KEYED", {"control_secret": generate_key()})):
        value = {"conn_type": "spotfirst", "extra": extra}
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(value))
    return key


def _signed(**changes: Any) -> dict[str, Any]:
    record = TaskRecord(BASE, "/storage", None)._replace(**changes)
    return signed_record(record, TASK, SpotfirstHook(record.conn_id))


@pytest.mark.parametrize("conn_id", [None, "plain", "keyed"])
@pytest.mark.parametrize("run_id", [BASE, f"{BASE}.g2"])
def test_what_a_task_signed_is_read_back(conn_id: str | None, run_id: str) -> None:
    value = json.loads(json.dumps(_signed(conn_id=conn_id, run_id=run_id)))
    assert read_record(value, TASK) == TaskRecord(run_id, "/storage", conn_id)


@pytest.mark.parametrize(
    "change",
    [
        {"storage": "/other"}, {"storage": "s3://evil/x"}, {"conn_id": "plain"},
        {"conn_id": "keyed"}, {"conn_id": "no_such_connection"}, {"run_id": f"{BASE}.g2"},
        {"run_id": "other"}, {"run_id": "../../x"}, {"mac": "0" * 8 + "." + "0" * 64},
        {"mac": ""}, {"mac": None}, {"mac": "x" * 10_000}, {"mac": '","storage":"/other'},
        {"storage": 3}, {"storage": None}, {"conn_id": ["plain"]}, {"run_id": {"a": 1}},
    ],
    ids=str,
)  # fmt: skip
def test_no_field_of_it_can_be_changed(change: dict[str, Any]) -> None:
    assert read_record(_signed() | change, TASK) is None


@pytest.mark.parametrize(
    "value", [None, "", "x", 3, [], {}, [{}], {"run_id": BASE}, {"run_id": BASE, "storage": "/s"}]
)
def test_something_else_counts_as_none(value: object) -> None:
    assert read_record(value, TASK) is None


@pytest.mark.parametrize(
    "other",
    [TASK._replace(dag_id="d2"), TASK._replace(run_id="r2"), TASK._replace(task_id="t2"),
     TASK._replace(map_index=0), TaskKey("dag--manual", "train", "")],
    ids=str,
)  # fmt: skip
def test_another_tasks_record_counts_as_none(other: TaskKey) -> None:
    record = TaskRecord(other.base_run_id, "/storage", None)
    value = signed_record(record, other, SpotfirstHook(None))
    assert read_record(value, other) == record
    assert read_record(value, TASK) is None
    assert read_record(value | {"run_id": BASE}, TASK) is None


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"__classname__": "os.system"}'])
def test_what_people_wrote_into_the_database_becomes_no_object(text: str) -> None:
    assert isinstance(_plain(text), (dict, type(None)))


# -- the operator ---------------------------------------------------------------------------------


def _new_run(url: str, run_id: str) -> Run:
    request = Request(command=("python", "train.py"))
    return attach(open_storage(url), run_id, request, owner="1", environment={})


@pytest.fixture
def places(tmp_path: Path) -> tuple[str, str]:
    """Two storages. In the first the task's own run has succeeded; both have other runs."""
    own, other = (open_storage(str(tmp_path / name)).url for name in ("own", "other"))
    journal = _new_run(own, BASE).journal()
    journal.refresh()
    journal.append(e.Succeeded(at=utc_now(), attempt=1, step=5))
    for url, run_id in ((own, "foreign"), (other, BASE), (other, "foreign")):
        _new_run(url, run_id)
    return own, other


def _resumed(storage: str, xcom: object, *, method: str = "execute_complete", **more: Any) -> Any:
    """What the task goes on with when Airflow resumes it: (storage, run id)."""

    def pull(**_: Any) -> object:
        if isinstance(xcom, Exception):
            raise xcom
        return xcom

    ti = SimpleNamespace(
        id="1", dag_id="dag", run_id="manual", task_id="train", map_index=-1, max_tries=0,
        try_number=1, xcom_pull=pull, xcom_push=lambda *_, **__: None,
    )  # fmt: skip
    operator = SpotTrainingOperator(
        task_id="train", command=["python", "train.py"], storage=storage
    )
    context: Any = {"ti": ti, "outlet_events": {}}
    try:
        if method == "__fail__":
            result = operator.resume_execution("__fail__", {"error": "x"}, context)
        else:
            result = operator.execute_complete(context, {"run_id": "x"}, **more)
    except TaskDeferred as deferred:
        trigger: Any = deferred.trigger
        return trigger.storage, trigger.run_id
    return result["storage"], result["run_id"]


@pytest.mark.parametrize("method", ["execute_complete", "__fail__"])
@pytest.mark.parametrize(
    "forged",
    [None, "text", {"run_id": BASE, "storage": "{other}", "conn_id": None},
     {"run_id": "foreign", "storage": "{own}", "conn_id": None, "mac": "0" * 8 + "." + "0" * 64},
     ImportError("Airflow's decoder refuses a class")],
    ids=str,
)  # fmt: skip
def test_a_resumed_task_goes_on_with_its_own_run(
    places: tuple[str, str], method: str, forged: Any
) -> None:
    own, other = places
    if isinstance(forged, dict):
        forged = forged | {"storage": forged["storage"].format(own=own, other=other)}
    assert _resumed(own, forged, method=method) == (own, BASE)


def test_what_came_with_the_deferral_counts_before_any_xcom(places: tuple[str, str]) -> None:
    own, other = places
    value = signed_record(TaskRecord(BASE, other, None), TASK, SpotfirstHook(None))
    assert _resumed(own, value, record=[BASE, own, None]) == (own, BASE)


def test_a_task_without_a_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(AirflowException, match=rf"no run '{BASE}'"):
        _resumed(str(tmp_path), {"run_id": "x", "storage": "/", "conn_id": None})
