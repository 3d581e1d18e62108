"""docs/ec2.md can be followed: its lines run as they stand, on instances of the harness.

The account is moto's, with the stack of deploy/aws.yaml, the storage SeaweedFS. Of the page only the
placeholders are filled in; what the harness needs (its image, its Python) goes in with the fleet
options. The lines of `aws` are checked against botocore's own model of AWS.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore import xform_name

from devstack.s3 import S3Server
from spotfirst.run import Run, list_runs
from spotfirst.state import Phase
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow.cli import app
from spotfirst_airflow.fleets.ec2 import wheelhouse
from spotfirst_airflow.fleets.ec2.options import Ec2Options
from spotfirst_airflow.results import weights_digest
from tests.demo.once import run_dag
from tests.fleets.ec2.harness import PYTHON, PYTHON_TAG, REGION, Cloud, no_keys, nothing_else
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ec2.md").read_text()
STEPS = 60
# The command line's own operations: what they call is not in botocore's model.
COMMANDS = {("cloudformation", "deploy"), ("ssm", "start-session")}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def lines_of(program: str) -> list[str]:
    """Each command of the page that begins with this program, on one line."""
    scripts = "\n".join(blocks("bash")).replace("\\\n", " ")
    prose = re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    quoted = [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose)]
    found = re.findall(rf"(?:^|\$\()({program} [^\n#)]*)", scripts, re.MULTILINE)
    return found + [text for text in quoted if text.startswith(f"{program} ")]


# -- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", lines_of("aws"))
def test_aws_has_every_operation_and_parameter_of_the_page(line: str) -> None:
    service, operation = line.split()[1:3]
    if (service, operation) in COMMANDS:
        return
    model = botocore.session.get_session().get_service_model(service)
    known = {xform_name(name, "-"): name for name in model.operation_names}
    assert operation in known, line
    shape = model.operation_model(known[operation]).input_shape
    members = {xform_name(name, "-") for name in shape.members} if shape else set()
    named = set(re.findall(r" --([a-z-]+)", line)) - {"query", "output"}
    assert named <= members, line


def test_spotfirst_has_every_command_of_the_page() -> None:
    known = {command.name for command in app.registered_commands}
    known |= {group.name for group in app.registered_groups}
    named = {line.split()[1] for line in lines_of("spotfirst")}
    assert named <= known
    assert {"doctor", "run", "show", "logs", "cost", "prices", "reap"} <= named


def test_the_stacks_outputs_are_fleet_options() -> None:
    told = re.findall(r"^\| `\w+` \| fleet option `(\w+)` \|$", PAGE, re.MULTILINE)
    assert told
    told += re.findall(r"--fleet-option (\w+)=", PAGE)
    assert set(told) <= set(Ec2Options.__struct_fields__)


@pytest.mark.airflow
def test_the_dag_of_the_page_is_one(tmp_path: Path) -> None:
    options = {"region": REGION, "subnets": ["subnet-0a"]}
    (tmp_path / "spotfirst.json").write_text(json.dumps(options))
    [dag] = blocks("python")
    dag = dag.replace("/opt/airflow/", f"{tmp_path}/").replace("    Spot", "    task = Spot")
    told = "print(task.dag_id, task.fleet, sorted(task.fleet_options))"
    done = subprocess.run(
        [sys.executable, "-c", f"{dag}\n{told}"], capture_output=True, text=True, check=False,
        cwd=tmp_path, env=no_keys() | {"AIRFLOW_HOME": str(tmp_path)}, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout.endswith("train_on_ec2 ec2 ['aws_conn_id', 'region', 'subnets']\n"), (
        done.stderr
    )


# -- an account -----------------------------------------------------------------------------------


class Account:
    """What the page's steps 1 to 3 lead to."""

    def __init__(self, cloud: Cloud, s3: S3Server) -> None:
        self.cloud = cloud
        self.environment = s3.environment() | {"AWS_ENDPOINT_URL": cloud.endpoint_url}
        client = partial(
            boto3.client, region_name=REGION, aws_access_key_id="x", aws_secret_access_key="x"
        )
        stacks = client("cloudformation", endpoint_url=cloud.endpoint_url)
        [vpc] = cloud.ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])[
            "Vpcs"
        ]
        values = {"VpcId": vpc["VpcId"], "Subnets": ",".join(cloud.subnets[:2])}
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # moto's, of what it cannot make: no run needs that here
            stacks.create_stack(
                StackName="spotfirst", TemplateBody=(ROOT / "deploy" / "aws.yaml").read_text(),
                Capabilities=["CAPABILITY_IAM"],
                Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in values.items()],
            )  # fmt: skip
        [stack] = stacks.describe_stacks(StackName="spotfirst")["Stacks"]
        outputs = {each["OutputKey"]: each["OutputValue"] for each in stack["Outputs"]}
        self.storage_url = outputs["Storage"]
        keys = s3.environment()
        boto3.client(
            "s3", region_name=REGION, endpoint_url=s3.endpoint_url,
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        ).create_bucket(Bucket=self.storage_url.split("/")[2])  # fmt: skip
        self.options: dict[str, Any] = json.loads(outputs["FleetOptions"]) | {
            "ami": cloud.image_id,
            "python": PYTHON,
            "python_versions": [f"3.{PYTHON_TAG.removeprefix('cp3')}"],
        }
        # As if a run had fetched them before: nothing here reaches an index.
        wheelhouse.publish_all(self.storage, self.options["python_versions"], fetch=nothing_else)

    @property
    def storage(self) -> Storage:
        return open_storage(self.storage_url)

    def bash(self, script: str, folder: Path) -> str:
        """What a person sees who pastes this; `aws` is what that line gives, with the stack."""
        programs = folder / "programs"
        programs.mkdir(exist_ok=True)
        for name, body in {
            "spotfirst": f'exec {sys.executable} -m spotfirst_airflow.cli "$@"',
            "aws": 'printf "%s\\n" "$FLEET_OPTIONS"',
        }.items():
            (programs / name).write_text(f"#!/bin/sh\n{body}\n")
            (programs / name).chmod(0o755)
        done = subprocess.run(
            ["bash", "-ec", script], cwd=folder, capture_output=True, text=True, check=False,
            timeout=PATIENCE_S,
            env={
                **no_keys(), **self.environment,
                "PATH": f"{programs}:{os.environ['PATH']}",
                "FLEET_OPTIONS": json.dumps(self.options),
                "SPOTFIRST_STORAGE": self.storage_url,
            },
        )  # fmt: skip
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}\n{self.cloud.story()}"
        return done.stdout


@pytest.fixture
def account(tmp_path: Path, s3: S3Server, s3_url: str) -> Iterator[Account]:
    with Cloud(tmp_path / "cloud", s3.environment()) as cloud:
        yield Account(cloud, s3)
        assert cloud.leftovers() == []


def test_the_first_run_and_the_looks_at_it_work_as_they_stand(
    account: Account, tmp_path: Path
) -> None:
    folder = tmp_path / "somewhere"
    (folder / "training").mkdir(parents=True)
    (folder / "training" / "train.py").write_text("print('trained')\n")
    [first] = [block for block in blocks("bash") if "spotfirst run " in block]
    assert "trained" in account.bash(first, folder)
    [run_id] = list_runs(account.storage)
    looks = [line for line in lines_of("spotfirst") if line.split()[1] not in {"doctor", "run"}]
    script = "\n".join(
        f"echo '{line}:'\n{line}".replace("RUN", run_id).replace("eu-west-1", REGION)
        if " --fleet-option " in line or "reap" not in line
        else f"{line} --fleet-option region={REGION}"
        for line in dict.fromkeys(looks)
    )
    seen = account.bash(script, folder)
    assert "succeeded" in seen
    assert "[1] trained" in seen
    assert "g6.xlarge" in seen
    assert "no instances are running" in seen


# -- the example ----------------------------------------------------------------------------------


def interrupt(account: Account, over: threading.Event) -> None:
    """Take the first instance back once its training has begun."""
    storage = account.storage
    while not over.wait(0.5):
        for run in [Run(storage, name) for name in list_runs(storage)]:
            segments = [run.log_segment(1, number) or "" for number in (1, 2, 3)]
            if any("step 1/" in text for text in segments):
                account.cloud.interrupt(1, in_s=10)
                return


@pytest.mark.airflow
@pytest.mark.slow
@pytest.mark.torch
def test_the_example_dag_trains_on_ec2_to_the_weights_of_the_local_fleet(
    account: Account, tmp_path: Path
) -> None:
    source = (ROOT / "dags" / "train_on_spot.py").read_text()
    for old, new in {
        r'fleet="local"': 'fleet="ec2"',
        r"fleet_options=\{.*\}": f"fleet_options={account.options!r}",
    }.items():
        source, count = re.subn(old, lambda _, new=new: new, source)
        assert count == 1
    dags = tmp_path / "dags"
    shutil.copytree(ROOT / "dags" / "training", dags / "training")
    (dags / "train_on_spot.py").write_text(source)
    over = threading.Event()
    taker = threading.Thread(target=interrupt, args=(account, over), daemon=True)
    taker.start()
    try:
        run_dag(
            tmp_path, dags, "train_on_spot", conf={"steps": STEPS}, patience_s=PATIENCE_S,
            SPOTFIRST_STORAGE=account.storage_url, **account.environment,
        )  # fmt: skip
    finally:
        over.set()
        taker.join()
    storage = account.storage
    [run_id] = list_runs(storage)
    run = Run(storage, run_id)
    state = run.journal().refresh()
    assert state.phase is Phase.SUCCEEDED, account.cloud.story()
    first, *_, last = state.attempts
    assert first.ended is not None
    assert first.ended.cause == "interrupted", account.cloud.story()
    assert last.ended is not None
    assert last.ended.step == STEPS
    # The same code and command on this machine's fleet, where nothing is taken back.
    local = str(tmp_path / "local")
    words = [
        "--storage",
        local,
        "--code",
        "dags/training/gpt",
        "--run-id",
        "alone",
        "--",
        *run.spec().command,
    ]
    words[words.index("--pace-s") + 1] = "0"
    subprocess.run(
        [sys.executable, "-m", "spotfirst_airflow.cli", "run", "--quiet", *words], check=True,
        cwd=ROOT, env=no_keys() | {"SPOTFIRST_LOCAL_FLEET": str(tmp_path / "fleet")},
        capture_output=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert weights_digest(run) == weights_digest(Run(open_storage(local), "alone"))
