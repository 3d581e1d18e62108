"""What may not leak, and who may look."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from spotfirst_airflow.links import run_page
from tests.airflow.world import SECRET, Scenario, World
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.airflow


@pytest.fixture(scope="module")
def running(world: World) -> Scenario:
    it = world.start("deferred", steps=100_000)
    it.wait_for_checkpoint()
    return it


@pytest.fixture
def anonymous(world: World) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=world.airflow.url, trust_env=False, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def user(anonymous: httpx.Client, world: World) -> httpx.Client:
    anonymous.headers["Authorization"] = f"Bearer {world.token('admin')}"
    return anonymous


def page(it: Scenario) -> str:
    return run_page(it.dag_id, it.dag_run, "train")


def test_secret_of_the_connection_is_nowhere_on_disk(running: Scenario, world: World) -> None:
    """Not in the database (trigger, XCom), the logs, the storage, or the fleet's own files."""
    folders = [world.airflow.home, world.storage, world.folder / "fleet"]
    files = [f for folder in folders for f in folder.rglob("*") if f.is_file()]
    holding = [file for file in files if SECRET.encode() in _bytes(file)]
    assert len(files) > 20
    assert not holding


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return b""


def test_link_is_there_while_the_task_runs_and_leads_to_the_page(
    running: Scenario, user: httpx.Client
) -> None:
    links = running.client.request(
        "GET", f"/dags/{running.dag_id}/dagRuns/{running.dag_run}/taskInstances/train/links"
    )
    assert links["extra_links"] == {"Spotfirst run": page(running)}
    answer = user.get(links["extra_links"]["Spotfirst run"])
    assert answer.status_code == 200
    assert running.base_id in answer.text
    assert 'http-equiv="refresh"' in answer.text
    assert "g6.xlarge in local-a" in answer.text
    assert "step 10 done" in answer.text
    assert "default-src &#x27;none&#x27;" not in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_page_needs_a_login(running: Scenario, anonymous: httpx.Client) -> None:
    assert anonymous.get(page(running)).status_code == 401


def test_page_needs_the_right_to_read_the_dag(
    running: Scenario, anonymous: httpx.Client, world: World
) -> None:
    anonymous.headers["Authorization"] = f"Bearer {world.token('nobody')}"
    assert anonymous.get(page(running)).status_code == 403


def test_page_of_a_task_without_a_run_says_so(running: Scenario, user: httpx.Client) -> None:
    answer = user.get(run_page(running.dag_id, "no_such_dag_run", "train"))
    assert answer.status_code == 200
    assert "has not attached to a run yet" in answer.text


def test_forged_xcom_cannot_show_the_run_of_another_task(
    running: Scenario, user: httpx.Client, world: World
) -> None:
    other = world.start("unrendered")
    other.wait_for_task("failed")
    value = {"run_id": running.base_id, "storage": str(world.storage), "conn_id": None}
    path = f"/dags/{other.dag_id}/dagRuns/{other.dag_run}/taskInstances/train/xcomEntries"
    other.client.request("POST", path, json={"key": "spotfirst_run", "value": value})
    answer = user.get(page(other))
    assert "has not attached to a run yet" in answer.text
    assert running.base_id not in answer.text


@pytest.mark.parametrize("forgery", ["another storage", "another connection", "another task's"])
def test_an_edited_xcom_shows_nothing(
    running: Scenario, user: httpx.Client, world: World, forgery: str
) -> None:
    """Whoever may edit XComs makes the server read no other storage."""
    mine = f"/dags/{running.dag_id}/dagRuns/{running.dag_run}/taskInstances/train/xcomEntries"
    honest = running.client.request("GET", f"{mine}/spotfirst_run?deserialize=false")["value"]
    honest = json.loads(honest) if isinstance(honest, str) else honest
    other = world.start("unrendered")
    other.wait_for_task("failed")
    own = {"run_id": other.base_id, "storage": "/", "conn_id": None, "mac": honest["mac"]}
    value = {
        "another storage": own,
        "another connection": own | {"conn_id": honest["conn_id"], "storage": honest["storage"]},
        "another task's": honest,
    }[forgery]
    path = f"/dags/{other.dag_id}/dagRuns/{other.dag_run}/taskInstances/train/xcomEntries"
    other.client.request("POST", path, json={"key": "spotfirst_run", "value": value})
    answer = user.get(page(other))
    assert answer.status_code == 200
    assert "has not attached to a run yet" in answer.text


def test_last_of_all_the_run_is_stopped(running: Scenario) -> None:
    running.mark("failed")
    running.wait_until_quiet()
    running.check_consistent()
