"""``spotfirst doctor``: a table, JSON, an exit code; and what it looks at for each fleet."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from spotfirst.storage import open_storage
from spotfirst_airflow.cli import app
from spotfirst_airflow.fleets.checks import check_storage_clock
from spotfirst_airflow.fleets.ec2 import doctor as ec2_doctor
from tests.fleets.ec2.examined import World, an_account
from tests.fleets.ec2.stacks import Stack


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *words], env={"COLUMNS": "200"})


# -- local ----------------------------------------------------------------------------------------


def test_for_the_local_fleet_it_looks_at_storage_and_clock(tmp_path: Path) -> None:
    done = call("--fleet", "local", "--storage", str(tmp_path), "--json")
    assert done.exit_code == 0, done.output
    checks = json.loads(done.stdout)
    assert [(check["name"], check["verdict"]) for check in checks] == [
        ("storage", "ok"), ("clock", "ok"),
    ]  # fmt: skip
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_storage_in_s3_is_looked_at_over_the_wire(s3_url: str) -> None:
    done = call("--fleet", "local", "--storage", s3_url)
    assert done.exit_code == 0, done.output
    assert "2 ok" in done.stdout


def test_storage_that_does_not_work_ends_with_code_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = call("--fleet", "local", "--storage", str(tmp_path / "file"))
    assert done.exit_code == 1
    assert "failed" in done.stdout
    assert "→" in done.stdout


def test_a_fleet_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    done = call("--fleet", "moon", "--storage", str(tmp_path))
    assert done.exit_code == 2
    assert "unknown fleet" in done.stderr


@pytest.mark.parametrize(("off_s", "verdict"), [(0, "ok"), (60, "warning"), (-900, "failed")])
def test_the_clock_of_a_file_server_counts(tmp_path: Path, off_s: float, verdict: str) -> None:
    storage = open_storage(str(tmp_path))
    [check] = check_storage_clock(storage, clock=lambda: time.time() + off_s)
    assert check.verdict == verdict


def test_memory_has_no_clock() -> None:
    [check] = check_storage_clock(open_storage("memory://doctor"))
    assert check.verdict == "skipped"


def verdicts(done: Result) -> dict[str, str]:
    return {check["name"]: check["verdict"] for check in json.loads(done.stdout)}


def test_a_spec_for_the_local_fleet_is_looked_at_with_its_storage_and_options(
    tmp_path: Path,
) -> None:
    (tmp_path / "training").mkdir()
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "command: [python, train.py]\ncode: ./training\nfleet: local\n"
        f"storage: {tmp_path}/runs\ninstance_types: [g6.xlarge]\n"
        f"fleet_options: {{root: {tmp_path}/fleet}}\n"
    )
    done = call(str(spec), "--json")
    assert done.exit_code == 0, done.output
    assert verdicts(done) == {"spec": "ok", "storage": "ok", "clock": "ok", "fleet": "ok"}
    assert str(tmp_path / "fleet") in done.stdout
    (tmp_path / "training").rmdir()
    done = call(str(spec), "--json")
    assert done.exit_code == 1
    assert verdicts(done)["spec"] == "failed"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--instance-types", "no-such-type"), "no-such-type"),
        (("--fleet-option", "tiem_scale=2"), "tiem_scale"),
        (
            ("--fleet-option", 'market={"kind": "recorded", "zones": {"a": "/none.csv"}}'),
            "none.csv",
        ),
        (("--fleet-options", '{"time_scale": -1}'), "time_scale"),
    ],
)
def test_what_the_local_fleet_cannot_do_is_a_failure(
    tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    done = call("--fleet", "local", "--storage", str(tmp_path), *words)
    assert done.exit_code == 1, done.output
    assert said in done.output


def test_a_folder_of_the_local_fleet_that_cannot_be_written_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    root = f"root={tmp_path}/file/fleet"
    done = call("--fleet", "local", "--storage", str(tmp_path), "--fleet-option", root)
    assert done.exit_code == 1
    assert "cannot be written" in done.output


def test_fleet_options_that_are_no_json_are_bad_input(tmp_path: Path) -> None:
    done = call("--fleet-options", "{'region': 1}", "--storage", str(tmp_path))
    assert done.exit_code == 2
    assert "fleet_options" in done.stderr


# -- ec2 ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def account() -> Iterator[Stack]:
    with an_account() as stack:
        yield stack


@pytest.fixture
def world(account: Stack, monkeypatch: pytest.MonkeyPatch) -> World:
    """The command's doctor in that account: only AWS's clients and the storage are put in."""
    world = World(account)
    made: Any = partial(ec2_doctor.Ec2Doctor, aws=world.aws, opener=world.opener)
    monkeypatch.setattr(ec2_doctor, "Ec2Doctor", made)
    return world


def words(world: World, **changes: Any) -> list[str]:
    pairs = {**world.options, **changes}
    options = [
        f"{name}={','.join(value) if isinstance(value, list) else value}"
        for name, value in pairs.items()
    ]
    given = [word for option in options for word in ("--fleet-option", option)]
    return ["--storage", world.storage_url, "--instance-types", "g6.xlarge,g5.xlarge", *given]


def test_a_healthy_account_ends_with_code_0(world: World) -> None:
    done = call(*words(world))
    assert done.exit_code == 0, done.output
    assert "permission ec2:RunInstances" in done.stdout
    assert "failed" not in done.stdout


def test_the_fleet_options_of_the_stack_are_taken_as_they_are(world: World, tmp_path: Path) -> None:
    (tmp_path / "fleet.json").write_text(json.dumps(world.options))
    given = ["--storage", world.storage_url, "--instance-types", "g6.xlarge,g5.xlarge"]
    for text in (json.dumps(world.options), str(tmp_path / "fleet.json")):
        done = call(*given, "--fleet-options", text)
        assert done.exit_code == 0, done.output
        assert "permission ec2:RunInstances" in done.stdout


def test_a_spec_for_ec2_is_looked_at_with_its_types(world: World, tmp_path: Path) -> None:
    spec = {
        "command": ["python", "train.py"], "fleet": "ec2", "fleet_options": world.options,
        "instance_types": ["g6.xlarge", "g5.xlarge"],
    }  # fmt: skip
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    done = call(str(tmp_path / "spec.json"), "--storage", world.storage_url, "--json")
    assert done.exit_code == 0, done.output
    assert "g6.xlarge" in done.stdout
    assert verdicts(done)["spec"] == "ok"


def test_a_failure_ends_with_code_1_and_its_fix_is_in_the_table(world: World) -> None:
    done = call(*words(world, instance_profile="none-such"))
    assert done.exit_code == 1
    assert "there is no instance profile 'none-such'" in done.stdout
    assert "→ give the fleet option instance_profile" in done.stdout
    assert "1 failed" in done.stdout


def test_warnings_alone_end_with_code_0(world: World) -> None:
    done = call(*words(world, subnets=world.options["subnets"][:1]), "--json")
    assert done.exit_code == 0
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["subnets"]["verdict"] == "warning"
    assert set(checks["subnets"]) == {"name", "verdict", "found", "fix"}


def test_a_wrong_option_is_bad_input(world: World) -> None:
    done = call("--fleet-option", "zone=a")
    assert done.exit_code == 2
    assert "zone" in done.stderr


def test_a_version_given_as_an_option_stays_text(world: World) -> None:
    done = call(*words(world, python_versions=["3.10"]), "--json")
    assert done.exit_code == 0, done.output
