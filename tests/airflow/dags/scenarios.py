"""What the fault tests run. Each scenario has a dag run of its own, several at once."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from airflow.sdk import DAG, Asset, Param, task
from airflow.sdk.exceptions import AirflowException

from spotfirst_airflow.operators import SpotTrainingOperator

CODE = str(Path(__file__).parent / "code")
TRACE = os.environ.get("SCENARIO_TRACE", "")
PARAMS = {
    "steps": Param(1000, type="integer"),
    "fail_at": Param(-1, type="integer"),
}
COMMAND = [
    "python", "train.py", "--trace", TRACE, "--steps", "{{ params.steps }}",
    "--fail-at", "{{ params.fail_at }}",
]  # fmt: skip
COMMON = {
    "command": COMMAND,
    "code": CODE,
    "instance_types": ["g6.xlarge"],
    "checkpoint_mode": "files",
    "checkpoint_period": timedelta(seconds=1),
    "max_life": timedelta(minutes=20),  # should the tests be interrupted
}


class OverTime(SpotTrainingOperator):
    """Its execution_timeout passes while it is deferred; never before, however slow the machine."""

    def _defer(self, *args: Any, **kwargs: Any) -> NoReturn:
        self.execution_timeout = timedelta(seconds=6)
        super()._defer(*args, **kwargs)


class Impatient(OverTime):
    """Its trigger times out before the run is stopped."""

    grace = timedelta(seconds=-3)


class Forgetful(SpotTrainingOperator):
    """Its worker dies after the result was delivered, before Airflow has heard of it."""

    def execute_complete(self, context: Any, event: Any) -> NoReturn:
        super().execute_complete(context, event)
        raise AirflowException("the worker is gone")


def dag(dag_id: str) -> DAG:
    return DAG(dag_id, schedule=None, params=PARAMS, max_active_runs=20, max_active_tasks=20)


with dag("deferred"):
    SpotTrainingOperator(task_id="train", outlets=[Asset("model")], **COMMON)

with dag("in_worker"):
    SpotTrainingOperator(
        task_id="train", deferrable=False, retries=1, retry_delay=timedelta(0), **COMMON
    )

with dag("retried"):
    Forgetful(task_id="train", retries=1, retry_delay=timedelta(0), **COMMON)

with dag("timed_out"):
    Impatient(task_id="train", execution_timeout=timedelta(hours=1), **COMMON)

with dag("over_time"):
    OverTime(task_id="train", execution_timeout=timedelta(hours=1), **COMMON)

with dag("decorated"):

    @task.spot_training(**{name: value for name, value in COMMON.items() if name != "command"})
    def train(params: dict | None = None) -> list[str]:
        return ["python", "train.py", "--trace", TRACE, "--steps", str(params["steps"])]

    train()

with dag("unrendered"):
    SpotTrainingOperator(task_id="train", resume_from="{{ params.get('nothing') }}", **COMMON)
