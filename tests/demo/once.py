"""A dag run in one process: real Airflow, no scheduler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from devstack.airflow import AirflowStandalone
from spotfirst.signing import KEY_VARIABLE, default_keys, key_file
from spotfirst_airflow.fleets.base import load_fleet
from tests.waiting import PATIENCE_S


def run_dag(
    folder: Path,
    dags: Path,
    dag_id: str,
    *,
    conf: Any = None,
    patience_s: float = PATIENCE_S,
    **variables: str,
) -> None:
    """Run a DAG to its end with all that it writes in ``folder``; fails when the dag run does."""
    airflow = AirflowStandalone(
        folder / "airflow",
        dags,
        {
            "HOME": str(folder),
            "SPOTFIRST_LOCAL_FLEET": str(folder / "fleet"),
            # In another home there would be another key, and this process reads the run as well.
            KEY_VARIABLE: _control_key(),
            **variables,
        },
    )
    airflow.home.mkdir()
    (airflow.home / "airflow.cfg").touch()
    airflow._prepare_database()
    environment = {
        k: v for k, v in airflow.environment().items() if not k.startswith("AWS_") or k in variables
    }
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "airflow", "dags", "test", dag_id),
                *("--conf", json.dumps(conf or {})),
            ],
            env=environment,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=patience_s,
            check=False,
        )
    finally:
        fleet = load_fleet("local", {"root": str(folder / "fleet")}, environment={})
        fleet.terminate([instance.token for instance in fleet.owned()])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def _control_key() -> str:
    """The key of this process, made if there is none."""
    default_keys()
    return os.environ.get(KEY_VARIABLE) or key_file().read_text()
