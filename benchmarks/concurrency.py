"""Many runs under one triggerer, in a real Airflow: all of them, and no worker slot while they train.

`python -m benchmarks.concurrency [--quick]` starts Airflow with four worker slots, and one mapped
task per run of a small script without torch. The scripts end once all of them are training at the
same time. The last line is one JSON object:

- ``runs``, ``succeeded``: how many there were, and how many ended well;
- ``slots_while_training``: the most worker slots that tasks held while every run trained (target: 0);
- ``start_s``, ``finish_s``: from the trigger until all trained, and from then until all had ended;
- ``look_ms``: what one run costs the triggerer's process each second, in milliseconds of CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from devstack.airflow import AirflowStandalone
from devstack.airflow_client import AirflowClient

_SETTLED_S = 10.0
_DAG = """
from datetime import timedelta
from airflow.sdk import DAG
from spotfirst_airflow.operators import SpotTrainingOperator

with DAG("crowd", schedule=None, max_active_tasks={runs}):
    SpotTrainingOperator.partial(
        task_id="train", code={code!r}, storage={storage!r}, fleet_options={fleet!r},
        checkpoint_mode="files", max_life=timedelta(minutes=20), deadline="20m",
    ).expand(command=[["python", "wait.py", {gate!r}, str(n)] for n in range({runs})])
"""
_SCRIPT = """
import sys, time
from pathlib import Path

gate = Path(sys.argv[1])
(gate / sys.argv[2]).touch()
while not (gate / "open").exists():
    time.sleep(0.5)
"""


def measure(folder: Path, runs: int, *, patience_s: float) -> dict[str, float]:
    """Start them, see all of them train at once, let them end."""
    dags, code, gate = (folder / name for name in ("dags", "code", "gate"))
    for place in (dags, code, gate):
        place.mkdir()
    fleet = {"root": str(folder / "fleet"), "market": {"kind": "calm", "capacity": runs}}
    (code / "wait.py").write_text(_SCRIPT)
    (dags / "crowd.py").write_text(
        _DAG.format(
            runs=runs, code=str(code), storage=str(folder / "storage"), fleet=fleet, gate=str(gate)
        )
    )
    try:
        with AirflowStandalone(folder / "airflow", dags) as airflow:
            client = airflow.client()
            client.wait_for_dag("crowd")
            began = time.monotonic()
            dag_run = client.trigger("crowd")
            say("waiting until all of them train")

            def training() -> bool:
                return len(list(gate.iterdir())) == runs and states(client, dag_run) == {"deferred"}

            until(training, patience_s)
            start_s = time.monotonic() - began
            triggerer = psutil.Process(airflow.pid("triggerer"))
            slots, used_s = watch(client, dag_run, triggerer)
            (gate / "open").touch()
            say("all of them trained at once; now they end")
            opened = time.monotonic()
            until(lambda: client.run_state("crowd", dag_run) in {"success", "failed"}, patience_s)
            ended = [task["state"] for task in tasks(client, dag_run)]
            return {
                "runs": runs,
                "succeeded": ended.count("success"),
                "slots_while_training": slots,
                "start_s": round(start_s, 1),
                "finish_s": round(time.monotonic() - opened, 1),
                "look_ms": round(1000 * used_s / _SETTLED_S / runs, 2),
            }
    finally:
        (gate / "open").touch()


def watch(client: AirflowClient, dag_run: str, triggerer: psutil.Process) -> tuple[int, float]:
    """The most slots held at once, and the triggerer's seconds of CPU, over ``_SETTLED_S``."""

    def used_s() -> float:
        family = [triggerer, *triggerer.children(recursive=True)]
        return sum(t.user + t.system for t in (p.cpu_times() for p in family))

    before, most, end = used_s(), 0, time.monotonic() + _SETTLED_S
    while time.monotonic() < end:
        busy = [task for task in tasks(client, dag_run) if task["state"] in {"running", "queued"}]
        most = max(most, len(busy))
        time.sleep(1)
    return most, used_s() - before


def tasks(client: AirflowClient, dag_run: str) -> list[dict[str, str]]:
    """The mapped task instances of the dag run."""
    path = f"/dags/crowd/dagRuns/{dag_run}/taskInstances?limit=200"
    found: list[dict[str, str]] = client.request("GET", path)["task_instances"]
    return found


def states(client: AirflowClient, dag_run: str) -> set[str]:
    """The states that its tasks are in."""
    return {task["state"] for task in tasks(client, dag_run)}


def until(condition: Callable[[], bool], patience_s: float) -> None:
    """Look each second; raises :class:`TimeoutError`."""
    end = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > end:
            message = f"waited {patience_s:.0f} s in vain; is the machine busy?"
            raise TimeoutError(message)
        time.sleep(1)


def say(text: str) -> None:
    """Progress, away from the result."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure and print; exit code 1 when a run did not end well."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.concurrency", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 runs, within 50 s")
    parser.add_argument("--runs", type=int, help="how many (50)")
    options = parser.parse_args()
    runs = options.runs or (4 if options.quick else 50)
    folder = Path(tempfile.mkdtemp(prefix="spotfirst-concurrency-"))
    try:
        found = measure(folder, runs, patience_s=40 if options.quick else 600)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    table = Table("measure", "value", box=None, pad_edge=False, header_style="bold")
    for name, value in found.items():
        table.add_row(name, f"{value:g}")
    Console(highlight=False).print(table)
    print(json.dumps({**found, "cores": os.cpu_count()}))
    sys.exit(found["succeeded"] < runs or found["slots_while_training"] > 0)


if __name__ == "__main__":
    main()
