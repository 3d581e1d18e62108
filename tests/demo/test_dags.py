"""The example DAGs: what they offer is used, and they find their code wherever they are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from airflow.sdk import DAG

from spotfirst_airflow.hooks import SpotfirstHook
from spotfirst_airflow.operators import SpotTrainingOperator

DAGS = Path(__file__).resolve().parents[2] / "dags"
FILES = sorted(DAGS.glob("*.py"))


def loaded(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dags_of(file: Path) -> list[DAG]:
    return [each for each in vars(loaded(file)).values() if isinstance(each, DAG)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_param_of_an_example_changes_something(file: Path) -> None:
    source = file.read_text()
    for dag in dags_of(file):
        unused = [n for n in dag.params if not re.search(rf"params(\.|\[['\"]){n}\b", source)]
        assert not unused, f"{file.name}: nothing uses the Params {unused}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_code_of_an_example_is_found_from_any_working_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for dag in dags_of(file):
        for task in dag.tasks:
            if isinstance(task, SpotTrainingOperator):
                assert not Path(str(task.code)).is_absolute()
                rendered: Any = {"command": ["true"], "resume_from": None, "tags": None}
                for name, value in (rendered | {"dataset": None, "dataset_since": None}).items():
                    setattr(task, name, value)
                code = task._request(SpotfirstHook(None)).code
                assert code is not None
                assert (Path(code) / "train.py").is_file()


def test_spot_in_the_example_costs_less_than_half_of_on_demand() -> None:
    from spotfirst_airflow.fleets.local.catalogue import CATALOGUE

    module = loaded(DAGS / "train_on_spot.py")
    dear = float(CATALOGUE["g6.xlarge"].on_demand_usd_h) / 2
    zones = module.MARKET["zones"].values()
    assert all(segment["price_usd_h"] < dear for zone in zones for segment in zone)
