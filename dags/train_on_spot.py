"""Train a small language model on spot instances that are taken away again and again."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Asset, Param

from spotfirst_airflow.operators import SpotTrainingOperator

# Market seconds per second: a second here is a minute of prices, bills and interruptions there, so
# ten seconds of start-up cost ten minutes. The training does not run faster, so the notice, in
# market seconds, is made long enough to leave it twelve real ones.
TIME_SCALE = 60
NOTICE_S = 12 * TIME_SCALE


def script(usd_h: float, *changes: tuple[float, int, bool]) -> list[dict[str, object]]:
    """A zone's spot capacity: from when on (real seconds), how much, and whether it gives notice."""
    return [
        {
            "from_s": after_s * TIME_SCALE,
            "capacity": capacity,
            "notice": notice,
            "price_usd_h": usd_h,
        }
        for after_s, capacity, notice in changes
    ]


MARKET = {
    "kind": "scripted",
    "zones": {
        # A third of the price on demand ($0.80), as is common for GPUs.
        # Taken back with notice at 20 s; there again at 40 s; without notice at 70 s; again at 78 s
        "local-a": script(
            0.25, (0, 4, True), (20, 0, True), (40, 4, True), (70, 0, False), (78, 4, True)
        ),
        # Taken back without notice at 45 s, and gone for good
        "local-b": script(0.27, (0, 4, True), (45, 0, False)),
    },
}

model = Asset("spotfirst://models/gpt-small")

with DAG(
    dag_id="train_on_spot",
    schedule=None,
    catchup=False,
    max_active_runs=4,
    tags=["spotfirst", "example"],
    doc_md="""
### Train on spot, as if it were never interrupted

Trains a byte-level GPT on this machine's *local fleet*: real processes on a simulated spot market
that takes instances back, with notice and without. When spot runs dry, an on-demand
instance goes on, until there is spot again. Each attempt goes on at the step where the last one
stopped, and the weights are the same, bit for bit, as without interruptions.

The dollars are simulated, the rules are those of AWS: spot is billed by the second, and an instance
that is taken back within its first hour is free. A second here is a minute of that market.

Open the task and press **Spotfirst run** to see its attempts, checkpoints, cost and output. To
start from a checkpoint of another run, trigger with *resume_from* = `RUN@STEP`.
""",
    params={
        "resume_from": Param(
            "scratch",
            type="string",
            pattern=r"^(scratch|[A-Za-z0-9][A-Za-z0-9._-]*@(\d+|latest))$",
            title="Start from",
            description_md="`scratch`, or a checkpoint: `RUN@STEP` or `RUN@latest`",
        ),
        "steps": Param(300, type="integer", minimum=1, maximum=1_000_000, title="Steps"),
        "seed": Param(1, type="integer", minimum=0, title="Seed"),
        "pace_s": Param(
            0.25,
            type="number",
            minimum=0,
            title="Seconds a step takes at least",
            description_md="So that the market's script is played out on a fast machine, too",
        ),
    },
) as dag:
    SpotTrainingOperator(
        task_id="train",
        command=[
            "python", "train.py", "--steps", "{{ params.steps }}", "--seed", "{{ params.seed }}",
            # A step takes a quarter of a second at least, as of a larger model: on a fast machine
            # the training would be over before the first interruption.
            "--pace-s", "{{ params.pace_s }}",
        ],
        code="training/gpt",
        fleet="local",
        fleet_options={"time_scale": TIME_SCALE, "notice_s": NOTICE_S, "market": MARKET},
        instance_types=["g6.xlarge"],
        # Spot whatever happens, and on demand as soon as there is none anywhere.
        policy="fallback",
        policy_options={"losses": 10, "no_capacity_s": 2, "return_after_s": 6},
        deadline=timedelta(minutes=20),
        budget_usd=25,
        resume_from="{{ params.resume_from }}",
        checkpoint_period=timedelta(seconds=4),
        tags={
            "model_id": "gpt-small",
            "team": "research",
            "env": "demo",
            "experiment_run": "{{ run_id }}",
        },
        outlets=[model],
    )  # fmt: skip


if __name__ == "__main__":
    # Run this file with Python: the same, without a scheduler, in one process.
    dag.test()
