"""Train, receive more data, and train on what is new, from where the first training ended."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import DAG, Asset, Param, task

from spotfirst_airflow.operators import SpotTrainingOperator

DATASET = "python-library"

corpus = Asset("spotfirst://datasets/python-library")
model = Asset("spotfirst://models/gpt-incremental")


def library_files(count: int) -> list[Path]:
    """The first files of Python's standard library: text that every machine has."""
    import os

    return sorted(Path(os.__file__).parent.glob("*.py"))[:count]


def training(task_id: str, *, steps: str, **arguments: Any) -> SpotTrainingOperator:
    return SpotTrainingOperator(
        task_id=task_id,
        command=["python", "train.py", "--steps", steps, "--seed", "1"],
        code="training/gpt",
        fleet="local",
        # Calm spot capacity: this example is about data. See train_on_spot for interruptions.
        fleet_options={"time_scale": 60},
        instance_types=["g6.xlarge"],
        deadline=timedelta(minutes=20),
        budget_usd=10,
        tags={
            "model_id": "gpt-incremental",
            "team": "research",
            "env": "demo",
            "experiment_run": "{{ run_id }}",
        },
        outlets=[model],
        **arguments,
    )


with DAG(
    dag_id="incremental_training",
    schedule=None,
    catchup=False,
    max_active_runs=1,  # two runs at once would commit their versions in between each other
    tags=["spotfirst", "example"],
    doc_md="""
### Train on what is new

1. `commit_first` makes a dataset version of some files, and `train_first` trains on it.
2. `commit_more` commits a version with more files. Only their bytes are stored.
3. `train_increment` starts from the first training's newest checkpoint, and its instance gets only
   the files that the first version lacked.
""",
    params={
        "first_files": Param(40, type="integer", minimum=1, maximum=100, title="Files at first"),
        "more_files": Param(20, type="integer", minimum=1, maximum=60, title="Files added later"),
        "first_steps": Param(60, type="integer", minimum=1, title="Steps at first"),
        "more_steps": Param(30, type="integer", minimum=1, title="Steps on the new files"),
    },
) as dag:

    @task(outlets=[corpus])
    def commit(count: str, message: str, *, outlet_events: Any = None) -> dict[str, int]:
        """Commit the first `count` files as the newest version of the dataset."""
        import shutil
        import tempfile

        from spotfirst.datasets import commit as commit_dataset
        from spotfirst_airflow.hooks import SpotfirstHook

        storage = SpotfirstHook.find(SpotfirstHook.default_conn_name).open_storage()
        with tempfile.TemporaryDirectory() as folder:
            for file in library_files(int(count)):
                shutil.copy(file, folder)
            version = commit_dataset(storage, DATASET, Path(folder), message)
        told = {"version": version.version, "files": version.files, "bytes": version.bytes}
        outlet_events[corpus].extra = told
        return told

    first = commit.override(task_id="commit_first")("{{ params.first_files }}", "at first")
    more = commit.override(task_id="commit_more")(
        "{{ params.first_files + params.more_files }}", "more files"
    )
    version_of = "{{{{ ti.xcom_pull(task_ids='{}')['version'] }}}}".format

    train_first = training(
        "train_first",
        steps="{{ params.first_steps }}",
        dataset=f"{DATASET}@{version_of('commit_first')}",
    )
    train_increment = training(
        "train_increment",
        steps="{{ params.first_steps + params.more_steps }}",
        dataset=f"{DATASET}@{version_of('commit_more')}",
        dataset_since=version_of("commit_first"),
        resume_from="{{ ti.xcom_pull(task_ids='train_first')['resume_from'] }}",
    )
    first >> train_first >> more >> train_increment


if __name__ == "__main__":
    # Run this file with Python: the same, without a scheduler, in one process.
    dag.test()
