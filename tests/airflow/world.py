"""A real Airflow with its scenarios, and what the tests ask of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from devstack.airflow import AirflowStandalone
from spotfirst import events as e
from spotfirst.run import Run
from spotfirst.state import RunState
from spotfirst.storage import open_storage
from spotfirst_airflow.submission import base_run_id
from tests.waiting import PATIENCE_S

SECRET = "s3cr3t-0f-the-c0nnecti0n"
DAGS = Path(__file__).parent / "dags"


class Scenario:
    """One dag run of one scenario, and the training run behind it."""

    def __init__(self, world: World, dag_id: str, run_id: str) -> None:
        self.world, self.dag_id, self.dag_run = world, dag_id, run_id
        self.base_id = base_run_id(dag_id, run_id, "train")
        self.client = world.airflow.client()

    def run(self, generation: int = 1) -> Run:
        suffix = "" if generation == 1 else f".g{generation}"
        return Run(open_storage(str(self.world.storage)), self.base_id + suffix)

    def state(self, generation: int = 1) -> RunState:
        return self.run(generation).journal().refresh()

    def events(self, kind: type[e.Event], generation: int = 1) -> list[Any]:
        journal = self.run(generation).journal()
        journal.refresh()
        return [event for event in journal.events if isinstance(event, kind)]

    def task_state(self) -> str | None:
        return self.client.task_state(self.dag_id, self.dag_run, "train")

    def wait(self, condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            self.world.airflow.check()
            if time.monotonic() > end:
                story = "\n".join(map(str, self.events(e.Event)))
                pytest.fail(
                    f"{self.dag_run}: waited in vain for {what}; the task is {self.task_state()}\n"
                    f"{story}\n{self.log(short=True)}"
                )
            time.sleep(0.4)

    def wait_for_task(self, *states: str, timeout_s: float = PATIENCE_S) -> None:
        self.wait(lambda: self.task_state() in states, f"task {states}", timeout_s)

    def wait_for_checkpoint(self, step: int = 1, generation: int = 1) -> None:
        def reached() -> bool:
            newest = self.run(generation).chain().refresh().newest()
            return newest is not None and newest[1].step >= step

        self.wait(reached, f"checkpoint {step}")

    def wait_until_quiet(self, generation: int = 1) -> None:
        """Until the run is final and nothing of it is left on this machine."""

        def quiet() -> bool:
            state = self.state(generation)
            return state.is_final and not state.open_attempts and not self.processes()

        self.wait(quiet, "a final run without processes")

    def processes(self) -> list[int]:
        """Processes of this run, agents and commands alike."""
        mark = f"SPOTFIRST_RUN={self.base_id}".encode()
        found = []
        for process in psutil.process_iter():
            try:
                variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if any(v == mark or v.startswith(mark + b".g") for v in variables):
                found.append(process.pid)
        return found

    def trace(self, generation: int = 1) -> list[list[str]]:
        """What the script itself noted: starts, ends, and whether two ran at once."""
        file = self.world.trace / self.run(generation).run_id
        return [line.split() for line in file.read_text().splitlines()] if file.exists() else []

    def check_consistent(self, generation: int = 1) -> None:
        """What holds at the end of every scenario, whatever happened in it."""
        state = self.state(generation)
        assert state.is_final
        assert not state.open_attempts
        assert not self.processes(), "an instance outlived its run"
        assert not [line for line in self.trace(generation) if line[0] == "DOUBLE"]
        tokens = [event.token for event in self.events(e.Launching, generation)]
        assert len(tokens) == len(set(tokens))
        launched = [event.attempt for event in self.events(e.Launched, generation)]
        ended = [event.attempt for event in self.events(e.Ended, generation)]
        assert sorted(launched) == sorted(ended), "an attempt has no end, or two"

    def log(self, try_number: int = 1, *, short: bool = False) -> str:
        """The task's log as the API gives it, exceptions included."""
        path = f"/dags/{self.dag_id}/dagRuns/{self.dag_run}/taskInstances/train/logs/{try_number}"
        content = self.client.request("GET", path, params={"full_content": True})["content"]
        lines = []
        for line in content:
            text = str(line.get("event", line))
            details = line.get("error_detail") or []
            text += "".join(f"\n{d.get('exc_type')}: {d.get('exc_value')}" for d in details)
            if not (short and text.startswith("[attempt")):
                lines.append(text)
        return "\n".join(lines)

    def clear(self) -> None:
        self.client.clear(self.dag_id, self.dag_run, ["train"])

    def mark(self, state: str) -> None:
        self.client.set_task_state(self.dag_id, self.dag_run, "train", state)

    def result(self) -> dict[str, Any]:
        value = self.client.xcom(self.dag_id, self.dag_run, "train")
        return dict(json.loads(value) if isinstance(value, str) else value)


class World:
    """A running Airflow, its storage, and where the scripts leave their traces."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage, self.trace = folder / "storage", folder / "trace"
        connection = {
            "conn_type": "spotfirst",
            "login": "AKIAXXXXXXXXXXXXTEST",
            "password": SECRET,
            "extra": {"storage": str(self.storage)},
        }
        passwords = folder / "passwords.json"
        passwords.write_text(json.dumps({"admin": "admin", "nobody": "nobody"}))
        self.airflow = AirflowStandalone(
            folder / "home",
            DAGS,
            {
                "AIRFLOW_CONN_SPOTFIRST_DEFAULT": json.dumps(connection),
                "SPOTFIRST_LOCAL_FLEET": str(folder / "fleet"),
                "SCENARIO_TRACE": str(self.trace),
                # The death of a component is to be noticed within seconds.
                "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
                "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "6",
                "AIRFLOW__SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": "2",
                "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "60",
                "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
                "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_SEC": "2",
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False",
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_USERS": "admin:admin,nobody:",
                "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(passwords),
                "AIRFLOW__CORE__PARALLELISM": "8",
                # The tests share two cores with everything that they start.
                "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
            },
        )

    def token(self, user: str) -> str:
        answer = httpx.post(
            f"{self.airflow.url}/auth/token",
            json={"username": user, "password": user},
            trust_env=False,
            timeout=PATIENCE_S,
        )
        return str(answer.raise_for_status().json()["access_token"])

    def log_in(self) -> None:
        """Make the devstack's client an administrator: anonymous users may do nothing here."""
        self.airflow.client().http.headers["Authorization"] = f"Bearer {self.token('admin')}"

    def start(self, dag_id: str, **params: Any) -> Scenario:
        run_id = self.airflow.client().trigger(
            dag_id, run_id=f"run{time.monotonic_ns()}", conf=params
        )
        return Scenario(self, dag_id, run_id)


def belongs(world: World, pid: int) -> bool:
    """Whether a process is one of Airflow's own, or below one."""
    own = {child.pid for child in world.airflow.children.values()}
    try:
        process = psutil.Process(pid)
        return pid in own or bool(own & {parent.pid for parent in process.parents()})
    except psutil.NoSuchProcess:
        return True
