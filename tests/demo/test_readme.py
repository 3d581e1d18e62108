"""The DAG in README.md runs as it stands, pasted where README.md says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from spotfirst.run import Run, list_runs
from spotfirst.state import Phase
from spotfirst.storage import open_storage
from tests.demo.once import run_dag

ROOT = Path(__file__).resolve().parents[2]


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )


@pytest.mark.airflow
def test_the_dag_in_the_readme_trains_when_it_is_pasted(tmp_path: Path) -> None:
    [dag] = [block for block in blocks("python") if "with DAG(" in block]
    assert len(dag.splitlines()) <= 12
    dags = tmp_path / "dags"
    shutil.copytree(ROOT / "dags" / "training", dags / "training")
    (dags / "my_training.py").write_text(dag)
    run_dag(tmp_path, dags, "my_training")
    storage = open_storage(str(tmp_path / "spotfirst-runs"))
    [run_id] = list_runs(storage)
    state = Run(storage, run_id).journal().refresh()
    assert state.phase is Phase.SUCCEEDED
    assert state.result is not None
    assert state.result.step == 60


def test_the_spec_in_the_readme_is_one(tmp_path: Path) -> None:
    from spotfirst_airflow.arguments import to_request
    from spotfirst_airflow.cli._specfile import read_spec_file

    [spec] = blocks("yaml")
    (tmp_path / "spec.yaml").write_text(spec)
    assert to_request(read_spec_file(tmp_path / "spec.yaml")).budget_usd == 25


def test_every_command_in_the_readme_exists() -> None:
    from spotfirst_airflow.cli import app

    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"spotfirst ([a-z]+)\b", "\n".join(re.findall(r"`([^`\n]+)`", text))))
    known = {command.name for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    assert named - {"import"} <= known
    assert {"run", "runs", "cost", "replay", "stop", "datasets"} <= named
