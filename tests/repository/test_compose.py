"""docker-compose.yml: valid, without secrets, and each of its commands is one that exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack.dotenv import generate

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = ROOT / "docker-compose.yml"
SCRIPTS = Path(sys.executable).parent

SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
OUR_IMAGE = "spotfirst:"


def command_lines() -> list[list[str]]:
    """List what the services of our own image run, health checks too."""
    lines = []
    for service in SERVICES.values():
        if service["image"].startswith(OUR_IMAGE):
            lines.append(service["command"])
            check = service.get("healthcheck", {}).get("test", [])
            if check[:1] == ["CMD"]:
                lines.append(check[1:])
            elif check:
                lines.append(check[1].split())
    return lines


def test_it_is_valid_by_the_compose_specification() -> None:
    program = [sys.executable, "-m", "check_jsonschema"]
    subprocess.run(
        [*program, "--builtin-schema", "vendor.compose-spec", str(COMPOSE)],
        check=True,
        capture_output=True,
    )


def test_it_runs_every_component_of_airflow_and_what_they_need() -> None:
    assert set(SERVICES) == {
        "postgres",
        "redis",
        "s3",
        "init",
        "api-server",
        "scheduler",
        "dag-processor",
        "triggerer",
        "worker",
    }


def test_every_lasting_service_has_a_health_check() -> None:
    without = {name for name, service in SERVICES.items() if "healthcheck" not in service}
    assert without == {"init"}


def test_ports_are_published_to_this_machine_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_every_secret_comes_from_outside() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            names_a_secret = re.search(r"(PASSWORD|SECRET|_KEY|_KEY_ID|AUTH)$", name)
            if names_a_secret or re.search(r"://[^/]*@", value):
                assert "${" in value, name


def test_the_generator_makes_every_variable_that_is_required() -> None:
    required = set(re.findall(r"\$\{([A-Z0-9_]+):\?", COMPOSE.read_text()))
    assert required == set(generate())


def test_the_generated_secrets_differ_each_time() -> None:
    first, second = generate(), generate()
    assert all(first[name] != second[name] for name in first)


def test_airflow_understands_every_command(tmp_path: Path) -> None:
    program = (
        "import json, sys; from airflow.cli import cli_parser; parser = cli_parser.get_parser();"
        "[parser.parse_args(line) for line in json.load(sys.stdin)]"
    )
    lines = [line[1:] for line in command_lines() if line[0] == "airflow"]
    assert len(lines) >= 8
    environment = {"AIRFLOW_HOME": str(tmp_path), "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(lines),
        env={"PATH": str(SCRIPTS), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_our_image_has_every_other_program() -> None:
    programs = {line[0] for line in command_lines()}
    assert {name for name in programs if not shutil.which(name, path=str(SCRIPTS))} == set()


def test_the_s3_server_knows_every_flag() -> None:
    mode, *flags = SERVICES["s3"]["command"]
    weed = shutil.which("weed", path=str(SCRIPTS))
    assert weed is not None
    done = subprocess.run([weed, mode, "-h"], capture_output=True, text=True, check=False)
    known = set(re.findall(r"^  (-[A-Za-z0-9.]+)", done.stdout + done.stderr, re.MULTILINE))
    assert {flag.partition("=")[0] for flag in flags} <= known


def test_no_service_reports_to_its_makers() -> None:
    assert "-master.telemetry=false" in SERVICES["s3"]["command"]


@pytest.mark.skipif(not shutil.which("docker"), reason="there is no docker program here")
def test_compose_itself_reads_the_file(tmp_path: Path) -> None:
    probe = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("docker has no compose plugin here")
    env_file = tmp_path / "env"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in generate().items()))
    command = ["docker", "compose", "--env-file", str(env_file), "-f", str(COMPOSE), "config", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
