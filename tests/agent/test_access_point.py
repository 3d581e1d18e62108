"""The agent and its trainer, with an access point between them and the storage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst.run import Run
from spotfirst.spec import ResumeFrom
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow.fleets.ec2.accesspolicy import Place, policy_of
from tests.waiting import wait_until

from .conftest import Instance, Lab
from .gateway import ACCOUNT, ROLE, Gateway

BUCKET, PREFIX = "spotfirst-runs", "team/spotfirst"


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    with Gateway() as gateway:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "controller")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", gateway.url)
        monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
        gateway.bucket = BUCKET
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield gateway


@pytest.fixture
def storage(gateway: Gateway) -> Storage:
    return open_storage(f"s3://{BUCKET}/{PREFIX}")


def admit(gateway: Gateway, run: Run, *instances: str) -> None:
    """What a controller does."""
    alias = f"{run.run_id}-s3alias"
    policy = policy_of(
        gateway.point_arn(alias), ROLE, Place(bucket=BUCKET, prefix=PREFIX), run.run_id,
        spec=run.spec(),
        instances=[f"arn:aws:ec2:us-east-1:{ACCOUNT}:instance/{each}" for each in instances],
    )  # fmt: skip
    gateway.policies[alias] = policy.text


def start(lab: Lab, run: Run, instance: str, attempt: int = 1, **variables: str) -> Instance:
    """As the fleet starts an instance: with the way that its run has."""
    variables.setdefault("SPOTFIRST_STORAGE", f"s3://{run.run_id}-s3alias/{PREFIX}")
    digest = run.spec_and_digest()[1]
    return lab.start(
        run, attempt, SPOTFIRST_SPEC_SHA256=digest, AWS_ACCESS_KEY_ID=instance, **variables
    )


@pytest.mark.parametrize("mode", ["trainer", "files"])
def test_an_attempt_trains_and_hands_over_through_its_access_point(
    lab: Lab, gateway: Gateway, storage: Storage, mode: str
) -> None:
    if mode == "files":
        script = 'echo data >"$SPOTFIRST_CHECKPOINT_DIR/file"; sleep 600'
        run = lab.create("sh", "-c", script, storage=storage, checkpoint_mode=mode,
                         checkpoint_period_s=1.0)  # fmt: skip
    else:
        run = lab.create(storage=storage, env={"STEPS": "5000"})
    admit(gateway, run, "i-1", "i-2")
    first = start(lab, run, "i-1")
    chain: CheckpointChain = run.chain()
    wait_until(lambda: chain.refresh().newest() is not None, "a checkpoint")
    second = start(lab, run, "i-2", attempt=2)
    assert first.exit().cause == "handed_over"
    wait_until(lambda: chain.refresh().holder == 2, "the next attempt's claim")
    second.hand_over()
    second.exit()
    assert gateway.denied == []


def test_a_replay_starts_from_its_parent_through_its_own_access_point(
    lab: Lab, gateway: Gateway, storage: Storage
) -> None:
    files: dict[str, Any] = {"storage": storage, "checkpoint_mode": "files"}
    parent = lab.create("sh", "-c", 'echo kept >"$SPOTFIRST_CHECKPOINT_DIR/file"', **files)
    admit(gateway, parent, "i-1")
    assert start(lab, parent, "i-1").exit().cause == "completed"
    newest = parent.chain().refresh().newest()
    assert newest is not None
    source = ResumeFrom(run_id=parent.run_id, step=newest[1].step, seq=newest[0])
    run = lab.create(
        "sh", "-c", 'cat "$SPOTFIRST_CHECKPOINT_DIR/file"', resume_from=source, **files
    )
    admit(gateway, run, "i-2")
    assert start(lab, run, "i-2").exit().log_tail[-1] == "kept"
    assert gateway.denied == []


def test_an_instance_that_is_let_in_late_waits_for_it(
    lab: Lab, gateway: Gateway, storage: Storage
) -> None:
    run = lab.create(storage=storage, env={"STEPS": "10"})
    admit(gateway, run)
    instance = start(lab, run, "i-1")
    wait_until(lambda: len(gateway.denied) > 2, "requests that are refused")
    assert run.storage.list("attempts") == []
    admit(gateway, run, "i-1")
    assert instance.exit().cause == "completed"


def test_a_script_of_another_run_gets_nowhere(lab: Lab, gateway: Gateway, storage: Storage) -> None:
    victim = lab.create(storage=storage, env={"STEPS": "10"})
    admit(gateway, victim, "i-1")
    assert start(lab, victim, "i-1").exit().cause == "completed"
    script = f"""
import os
from spotfirst.storage import open_storage
for way in ("{victim.run_id}", os.environ["SPOTFIRST_RUN"]):
    storage = open_storage(f"s3://{{way}}-s3alias/{PREFIX}/runs/{victim.run_id}")
    storage.patience_s = 0
    for name, action in {{
        "read": lambda: storage.read("checkpoints/00000001.json"),
        "write": lambda: storage.write("attempts/1/heartbeat.json", b"forged"),
        "create": lambda: storage.create("checkpoints/00000009.json", b"forged"),
        "delete": lambda: storage.delete("checkpoints/00000001.json"),
        "delete many": lambda: storage.delete_many(["checkpoints/00000001.json"]),
        "list": lambda: storage.list("packs"),
    }}.items():
        try:
            action()
        except Exception as error:
            print(name, type(error).__name__)
        else:
            print(name, "DONE")
"""
    before = dict(storage.walk(f"runs/{victim.run_id}"))
    run = lab.create("python", "-c", script, storage=storage)
    admit(gateway, run, "i-2")
    lines = start(lab, run, "i-2").exit().log_tail
    assert lines.count("read StorageDenied") == 2, lines
    assert not [line for line in lines if line.endswith("DONE")]
    assert dict(storage.walk(f"runs/{victim.run_id}")) == before
