"""User data that runs: from the API's answer to a trained model, on the harness."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

from devstack.s3 import S3Server
from spotfirst.heartbeat import ExitReport
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from spotfirst_airflow.fleets.ec2 import wheelhouse
from spotfirst_airflow.fleets.ec2.userdata import user_data
from tests.fleets.ec2.harness import PYTHON, PYTHON_TAG, REGION, Cloud, nothing_else
from tests.waiting import wait_until


@pytest.fixture
def cloud(tmp_path: Path, s3: S3Server, s3_url: str) -> Iterator[Cloud]:
    with Cloud(tmp_path / "cloud", s3.environment()) as made:
        yield made
        assert made.leftovers() == []


def make_run(url: str, *command: str, **fields: object) -> Run:
    spec = RunSpec(
        run_id="run", created_at=datetime.now(timezone.utc), command=command, heartbeat_s=0.5,
        notice_poll_s=0.2, **fields,
    )  # fmt: skip
    return create_run(open_storage(url), spec)


def launch(cloud: Cloud, run: Run, endpoint_url: str, **changes: object) -> str:
    key = wheelhouse.publish(run.root, python_tag=PYTHON_TAG, fetch=nothing_else)
    settings = {
        "storage_url": run.root.url, "region": REGION, "run_id": run.run_id, "max_life_s": 3600.0,
        "wheelhouse": key, "python": PYTHON, "image": "", "endpoint_url": endpoint_url,
    }  # fmt: skip
    answer = cloud.ec2.run_instances(
        ImageId=cloud.image_id, MinCount=1, MaxCount=1, InstanceType="g6.xlarge",
        UserData=user_data(**(settings | changes)),
        TagSpecifications=[
            {"ResourceType": "instance", "Tags": [{"Key": "spotfirst:attempt", "Value": "1"}]}
        ],
    )  # fmt: skip
    return str(answer["Instances"][0]["InstanceId"])


def report_of(cloud: Cloud, run: Run, instance_id: str) -> ExitReport:
    wait_until(lambda: instance_id in cloud.ended or cloud.trouble, "the instance's end")
    report = run.exit_report(1)
    assert report is not None, cloud.story()
    return report


def test_an_instance_runs_its_attempt_and_powers_off(
    cloud: Cloud, s3: S3Server, s3_url: str
) -> None:
    run = make_run(
        s3_url, "python", "-c", "import spotfirst, sys; print(spotfirst.__file__, sys.prefix)"
    )
    instance_id = launch(cloud, run, s3.endpoint_url)
    report = report_of(cloud, run, instance_id)
    assert report.cause == "completed", cloud.story()
    home = cloud.folder / instance_id / "home"
    assert report.log_tail[-1].split()[0].startswith(str(home / "venv"))
    assert cloud.ended[instance_id] == "Client.InstanceInitiatedShutdown"
    assert cloud.machines[instance_id].shutdowns == ["-P +75", "-P now"]
