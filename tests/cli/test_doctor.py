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
