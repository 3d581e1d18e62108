"""User data that runs: from the API's answer to a trained model, on the harness."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from devstack.s3 import S3Server
from spotfirst import code
from spotfirst import events as e
from spotfirst.heartbeat import ExitReport
from spotfirst.market import Market, Pool
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.state import Phase, RunState
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.controller import Controller
from spotfirst_airflow.fleets.ec2 import Ec2Fleet, wheelhouse
from spotfirst_airflow.fleets.ec2.userdata import user_data
from spotfirst_airflow.policies import load_policy
from tests.fleets.ec2.harness import PYTHON, PYTHON_TAG, REGION, Cloud, no_keys, nothing_else
from tests.waiting import wait_until

EXAMPLE = Path(__file__).parents[3] / "dags/training/gpt"
PATIENCE_S = 900.0
STEP = r"step (\d+)/100  loss ([\d.]+)"
COUNTER = '''
"""Counts; attempt 1 without an end, the next one until it has done 20 more."""
import os, pathlib, sys, time
place = pathlib.Path(os.environ["SPOTFIRST_CHECKPOINT_DIR"]) / "count"
count = int(place.read_text()) if place.exists() else 0
print("begins at", count, flush=True)
end = count + 20 if os.environ["SPOTFIRST_ATTEMPT"] != "1" else 10**9
while count < end:
    time.sleep(0.1)
    count += 1
    new = place.with_name("new")
    new.write_text(str(count))
    new.rename(place)
print("ends at", count, flush=True)
'''

DOCKER = r"""
# A container that is none: what it would run is run.
[ "$1" = run ] || exit 0
echo $$ >"$HARNESS_FOLDER/container"
while shift; do
  case "$1" in
    -e) case "$2" in *=*) export "$2" ;; esac ;;
    --entrypoint) program=$2; export IMAGE=$3; shift 3; exec "$program" "$@" ;;
  esac
done
"""


@pytest.fixture
def cloud(tmp_path: Path, s3: S3Server, s3_url: str) -> Iterator[Cloud]:
    with Cloud(tmp_path / "cloud", s3.environment()) as made:
        yield made
        assert made.leftovers() == []


# -- one instance ---------------------------------------------------------------------------


def make_run(url: str, *command: str, **fields: Any) -> Run:
    spec = RunSpec(
        run_id="run", created_at=datetime.now(timezone.utc), command=command, heartbeat_s=0.5,
        notice_poll_s=0.2, **fields,
    )  # fmt: skip
    return create_run(open_storage(url), spec)


def start(cloud: Cloud, run: Run, endpoint_url: str, **changes: Any) -> str:
    """Launch attempt 1 without a fleet or a controller; the instance's id."""
    key = wheelhouse.publish(run.root, python_tag=PYTHON_TAG, fetch=nothing_else)
    settings: dict[str, Any] = {
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
    instance_id = start(cloud, run, s3.endpoint_url)
    report = report_of(cloud, run, instance_id)
    assert report.cause == "completed", cloud.story()
    home = cloud.folder / instance_id / "home"
    assert report.log_tail[-1].split()[0].startswith(str(home / "venv"))
    assert cloud.ended[instance_id] == "Client.InstanceInitiatedShutdown"
    assert cloud.machines[instance_id].shutdowns == ["-P +75", "-P now"]


def test_an_instance_that_cannot_be_set_up_says_why_and_powers_off(
    cloud: Cloud, s3: S3Server, s3_url: str
) -> None:
    run = make_run(s3_url, "true")
    instance_id = start(cloud, run, s3.endpoint_url, python="/opt/nothing/python")
    report = report_of(cloud, run, instance_id)
    assert report.cause == "script_failed"
    assert "the fleet option python, '/opt/nothing/python', does not run here" in report.message
    assert any("bootstrap:" in line for line in report.log_tail)
    assert cloud.ended[instance_id] == "Client.InstanceInitiatedShutdown"


def test_an_agent_that_cannot_begin_is_reported_for_with_its_reason(
    cloud: Cloud, s3: S3Server, s3_url: str
) -> None:
    missing = Run(open_storage(s3_url), "missing")
    report = report_of(cloud, missing, start(cloud, missing, s3.endpoint_url))
    assert report.cause == "unfit"
    assert "there is no run 'missing'" in report.message


def test_an_instance_that_nobody_waits_for_any_more_powers_off(
    cloud: Cloud, s3: S3Server, s3_url: str
) -> None:
    run = make_run(s3_url, "true")
    pool = Pool(instance_type="g6.xlarge", zone="us-east-1a")
    journal, at = run.journal(), utc_now()
    journal.append(e.Created(at=at))
    journal.append(
        e.Launching(at=at, attempt=1, token="t", market=Market.SPOT, pool=pool, reason="")
    )
    journal.append(e.NotLaunched(at=at, attempt=1, cause="withdrawn", message=""))
    instance_id = start(cloud, run, s3.endpoint_url)  # the launch came true after all
    wait_until(lambda: instance_id in cloud.ended or cloud.trouble, "the instance's end")
    assert cloud.ended[instance_id] == "Client.InstanceInitiatedShutdown", cloud.story()
    assert run.storage.list("attempts/1") == []


def test_an_instance_whose_script_failed_can_stay(cloud: Cloud, s3: S3Server, s3_url: str) -> None:
    run = make_run(s3_url, "false")
    instance_id = start(cloud, run, s3.endpoint_url, keep_h=2.0)
    wait_until(lambda: len(getattr(cloud.machine(1), "shutdowns", ())) == 2, "another timer")
    machine = cloud.machines[instance_id]
    assert machine.shutdowns == ["-P +75", "-P +120"]
    report = run.exit_report(1)
    assert report is not None
    assert report.cause == "script_failed"
    assert instance_id not in cloud.ended
    assert "staying for 2.0 h" in machine.console
    wait_until(lambda: not machine.processes(), "the end of its script")


def test_an_instance_runs_its_attempt_in_a_container(
    cloud: Cloud, s3: S3Server, s3_url: str
) -> None:
    cloud.program("docker", DOCKER)
    run = make_run(s3_url, "sh", "-c", "echo in $IMAGE")
    instance_id = start(cloud, run, s3.endpoint_url, image="example/train:1")
    report = report_of(cloud, run, instance_id)
    assert (report.cause, report.log_tail[-1]) == ("completed", "in example/train:1")
    assert cloud.ended[instance_id] == "Client.InstanceInitiatedShutdown"


@pytest.mark.torch
def test_a_container_that_is_told_to_end_tells_the_training(
    cloud: Cloud, s3: S3Server, s3_url: str
) -> None:
    cloud.program("docker", DOCKER)
    run = make_run(s3_url, "sh", "-c", "echo begins; exec sleep 600")
    instance_id = start(cloud, run, s3.endpoint_url, image="example/train:1")
    wait_until(lambda: run.log_segment(1, 1) is not None or cloud.trouble, "the training")
    # As docker does at a shutdown: to the container's only child of its first process.
    os.kill(int((cloud.folder / instance_id / "container").read_text()), signal.SIGTERM)
    assert report_of(cloud, run, instance_id).cause == "interrupted", cloud.story()


# -- with the fleet and a controller --------------------------------------------------------


class Drive:
    """A run on EC2 and its controller."""

    def __init__(self, cloud: Cloud, s3: S3Server, url: str, *command: str, **fields: Any) -> None:
        self.cloud = cloud
        options = {
            "region": REGION, "subnets": cloud.subnets[:2], "instance_profile": "spotfirst",
            "ami": cloud.image_id, "python": PYTHON, "endpoint_url": cloud.endpoint_url,
            "python_versions": [f"3.{PYTHON_TAG.removeprefix('cp3')}"],
        }  # fmt: skip
        now = utc_now()
        self.run = make_run(
            url, *command, fleet="ec2", fleet_options=Ec2Fleet.settle(options, now=now),
            instance_types=("g5.xlarge",), tags={"team": "search", "model_id": "counter"},
            **fields,
        )  # fmt: skip
        self.run.journal().append(e.Created(at=now))
        fleet = Ec2Fleet(
            self.run.spec().fleet_options, environment=s3.environment(),
            publish=partial(wheelhouse.publish_all, fetch=nothing_else),
        )  # fmt: skip
        fleet.check(self.run.spec())
        self.fleet = fleet
        self._controller = Controller(self.run, fleet, load_policy("spot_only", {}))
        self.state = RunState()

    def until(self, condition: Any, what: str) -> RunState:
        """Look after the run until this holds."""
        end = time.monotonic() + PATIENCE_S
        while True:
            step = self._controller.step()
            self.state = step.state
            if condition(step):
                return step.state
            assert time.monotonic() < end, f"waited for {what}\n{step.state}\n{self.cloud.story()}"
            assert not step.done, f"over before {what}\n{step.state}\n{self.cloud.story()}"
            time.sleep(min(step.wait_s, 0.2))

    def until_over(self) -> RunState:
        return self.until(lambda step: step.done, "the end")

    def ends(self) -> list[str]:
        """Why each attempt's instance is gone, as EC2 says it."""
        ids = [each.launched.instance_id for each in self.state.attempts if each.launched]
        wait_until(lambda: set(ids) <= set(self.cloud.ended), "the instances' end")
        return [self.cloud.ended[instance_id] for instance_id in ids]

    def log(self, attempt: int) -> list[str]:
        texts = []
        while (text := self.run.log_segment(attempt, len(texts) + 1)) is not None:
            texts.append(text)
        return "".join(texts).splitlines()


def test_a_run_goes_on_through_an_interruption(
    cloud: Cloud, s3: S3Server, s3_url: str, tmp_path: Path
) -> None:
    (tmp_path / "count.py").write_text(COUNTER)
    drive = Drive(
        cloud, s3, s3_url, "python", "count.py",
        code=code.publish(open_storage(s3_url), tmp_path / "count.py"),
        checkpoint_mode="files", checkpoint_period_s=0.5,
    )  # fmt: skip
    drive.until(lambda _: any("begins at 0" in line for line in drive.log(1)), "attempt 1")
    cloud.interrupt(1, in_s=15)
    state = drive.until_over()
    assert state.phase is Phase.SUCCEEDED, cloud.story()
    first, second = state.attempts
    assert (first.ended and first.ended.cause, second.ended and second.ended.cause) == (
        "interrupted",
        "completed",
    )
    # The next one was launched for the notice, and began where the first one stopped.
    assert first.notice is not None
    assert second.launched is not None
    assert first.ended is not None
    assert second.launched.at < first.ended.at
    begins, ends = (int(line.split()[-1]) for line in drive.log(2) if "at" in line.split()[1:2])
    assert begins > 0
    assert ends == begins + 20
    assert len(drive.ends()) == 2


@pytest.mark.slow
@pytest.mark.torch
def test_the_example_trains_through_an_interruption_to_the_same_weights(
    cloud: Cloud, s3: S3Server, s3_url: str
) -> None:
    arguments = ("train.py", "--steps", "100", "--batch", "4", "--layers", "1", "--log-every", "1")
    drive = Drive(
        cloud, s3, s3_url, "python", *arguments, "--pace-s", "0.15",
        code=code.publish(open_storage(s3_url), EXAMPLE), checkpoint_period_s=2.0,
    )  # fmt: skip
    drive.until(lambda _: any(line.startswith("step 3/") for line in drive.log(1)), "step 3")
    cloud.interrupt(1, in_s=10)
    # Meanwhile the same without interruptions, without instances, without Spotfirst's agent.
    alone = subprocess.Popen(
        [sys.executable, *arguments], cwd=EXAMPLE, env=no_keys(), stdout=subprocess.PIPE, text=True
    )
    state = drive.until_over()
    assert [a.ended.cause for a in state.attempts if a.ended] == ["interrupted", "completed"]
    expected = alone.communicate()[0].splitlines()
    text = "\n".join(drive.log(1) + drive.log(2))
    # Steps may have been trained twice, but never otherwise.
    assert set(re.findall(STEP, text)) == set(re.findall(STEP, "\n".join(expected)))
    assert expected[-1] in drive.log(2)
    assert expected[-1].startswith("weights ")
