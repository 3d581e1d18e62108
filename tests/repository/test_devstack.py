"""The servers that tests lean on do what tests lean on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import boto3
import fsspec
import psutil
import pytest

from devstack.airflow import AirflowStandalone
from devstack.processes import Child, DevstackError, carrying
from devstack.s3 import S3Server
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


def test_s3_reaches_the_server_by_environment_alone(s3_url: str) -> None:
    with fsspec.open(f"{s3_url}/hello", "wb") as file:
        file.write(b"world")
    files, (path,) = fsspec.core.url_to_fs(s3_url)[0], [f"{s3_url}/hello"]
    assert files.cat_file(path) == b"world"


def test_s3_prefixes_are_empty(s3_url: str) -> None:
    files, path = fsspec.core.url_to_fs(s3_url)
    assert files.find(path) == []


def test_s3_listens_on_this_machine_only(s3: S3Server) -> None:
    assert s3.pid is not None
    listening = [
        connection.laddr.ip
        for connection in psutil.Process(s3.pid).net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening
    assert set(listening) == {"127.0.0.1"}


def test_s3_keeps_its_data_over_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server(tmp_path) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        with contextlib.closing(boto3.client("s3")) as client:
            client.put_object(Bucket="spotfirst", Key="kept", Body=b"1")
        server.kill()
        server.start()
        with contextlib.closing(boto3.client("s3")) as client:
            found = client.get_object(Bucket="spotfirst", Key="kept")["Body"].read()
        assert found == b"1"


def test_s3_keys_are_readable_by_their_owner_only(s3: S3Server) -> None:
    assert (s3.directory / "s3.json").stat().st_mode & 0o077 == 0


def test_stopping_a_child_ends_its_children_too(tmp_path: Path) -> None:
    mark = f"{os.getpid()}-{tmp_path.name}"
    environment = {**os.environ, "MARK": mark}
    child = Child(
        ["bash", "-c", "sleep 300 & sleep 300"], log=tmp_path / "log", environment=environment
    )
    wait_until(lambda: len(carrying("MARK", mark)) == 3)
    child.stop(grace_s=1)
    assert carrying("MARK", mark) == []


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib; from devstack.processes import Child;"
        "print(Child(['sleep', '300'], log=pathlib.Path(sys.argv[1])).pid, flush=True);"
        "time.sleep(300)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "log")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
    wait_until(lambda: not psutil.pid_exists(pid))


def test_a_component_that_ends_again_and_again_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    airflow = AirflowStandalone(tmp_path / "home", tmp_path)
    started: list[str] = []

    def start(name: str) -> Child:
        started.append(name)
        child = Child(["bash", "-c", "echo no database"], log=tmp_path / "log")
        child.process.wait()
        airflow.children[name] = child
        return child

    monkeypatch.setattr(airflow, "start_component", start)
    start("scheduler")
    with pytest.raises(DevstackError, match=r"scheduler ended by itself:\nno database"):
        airflow.check()  # while Airflow starts, its end is an error at once
    monkeypatch.setattr(airflow, "_is_up", True)
    for _ in range(5):
        airflow.check()
    with pytest.raises(DevstackError, match="scheduler ended by itself"):
        airflow.check()
    assert len(started) == 6


def listening(pids: list[int]) -> set[str]:
    """The addresses at which these processes listen; some may end meanwhile."""
    found = set()
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            connections = psutil.Process(pid).net_connections(kind="inet")
            found |= {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
    return found


@pytest.mark.airflow
@pytest.mark.slow
def test_airflow_survives_the_loss_of_a_component_and_leaves_nothing(tmp_path: Path) -> None:
    dags = tmp_path / "dags"
    dags.mkdir()
    (dags / "one.py").write_text(
        "from airflow.sdk import dag, task\n"
        "@dag(schedule=None)\n"
        "def one():\n"
        "    task(lambda: 41, task_id='answer')()\n"
        "one()\n"
    )
    with AirflowStandalone(tmp_path / "home", dags) as airflow:
        airflow.start_component("triggerer-2")
        airflow.kill("triggerer")
        assert not psutil.pid_exists(airflow.pid("triggerer"))
        client = airflow.client()
        client.wait_for_dag("one")
        os.killpg(airflow.pid("scheduler"), signal.SIGKILL)  # an end that was not requested
        run = client.trigger("one")
        assert client.wait_for_run("one", run) == "success"
        assert client.xcom("one", run, "answer") == 41
        assert not psutil.pid_exists(airflow.pid("triggerer")), "it was ended on purpose"
        airflow.start_component("triggerer")
        assert listening(airflow.survivors()) == {"127.0.0.1"}
    assert airflow.survivors() == []
