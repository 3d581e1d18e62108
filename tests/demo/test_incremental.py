"""The example of training on what is new moves, and sees, only what is new."""

from __future__ import annotations

from pathlib import Path

import pytest

from spotfirst import datasets
from spotfirst.run import Run, list_runs
from spotfirst.storage import open_storage
from tests.demo.once import run_dag

ROOT = Path(__file__).resolve().parents[2]
FIRST, MORE = 10, 5


@pytest.mark.airflow
@pytest.mark.slow
def test_the_second_training_goes_on_with_only_the_files_that_are_new(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "runs"))
    conf = {"first_files": FIRST, "more_files": MORE, "first_steps": 6, "more_steps": 4}
    run_dag(
        tmp_path, ROOT / "dags", "incremental_training", conf=conf, SPOTFIRST_STORAGE=storage.url
    )
    runs = {run_id: Run(storage, run_id) for run_id in list_runs(storage)}
    [first] = [run for run_id, run in runs.items() if "train_first" in run_id]
    [second] = [run for run_id, run in runs.items() if "train_increment" in run_id]

    seen = second.spec().dataset
    assert seen is not None
    assert (seen.version, seen.since) == (2, 1)
    new = datasets.diff(storage, f"{seen.name}@1", f"{seen.name}@2")
    assert len(new.added) == MORE
    result = second.journal().refresh().result
    assert result is not None
    assert result.metrics["corpus_files"] == MORE
    [attempt] = second.journal().refresh().attempts
    assert attempt.ended is not None
    assert (attempt.ended.start_step, attempt.ended.step) == (6, 10)
    code = second.spec().code
    assert code is not None
    assert new.bytes <= attempt.ended.moved_bytes <= new.bytes + code.size_bytes
    resumed = second.spec().resume_from
    assert resumed is not None
    assert resumed.run_id == first.run_id
