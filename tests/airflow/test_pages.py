"""The pages' routes: odd addresses are 4xx, and a storage that hangs takes nothing of Airflow's."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.errors import UntrustedObject
from spotfirst.market import Market, Pool
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.taskrecord import TaskKey, TaskRecord
from spotfirst_ui.app import build_app
from spotfirst_ui.pool import Busy, PagePool, TooSlow
from spotfirst_ui.view import look_at
from tests.waiting import PATIENCE_S, wait_until

PAGE = "/dags/d/runs/r/tasks/t/-1"


def app_of(find: Callable[[TaskKey], TaskRecord | None], pool: PagePool | None = None) -> FastAPI:
    """The application for a reader whom Airflow lets see everything."""
    app = build_app(find=find, pool=pool)
    for route in app.routes:
        assert isinstance(route, APIRoute)
        for depends in route.dependencies:
            if "requires_access" in getattr(depends.dependency, "__qualname__", ""):
                app.dependency_overrides[depends.dependency] = lambda: None  # type: ignore[index]
    return app


def new_run(folder: Path) -> Run:
    run = create_run(
        open_storage(str(folder)), RunSpec(run_id="r", created_at=utc_now(), command=("true",))
    )
    run.journal().append(e.Created(at=utc_now()))
    return run


def with_attempt(run: Run) -> Run:
    journal, at = run.journal(), utc_now()
    journal.refresh()
    pool = Pool(instance_type="g", zone="a")
    journal.append(
        e.Launching(at=at, attempt=1, token="t", market=Market.SPOT, pool=pool, reason="")
    )
    journal.append(
        e.Launched(
            at=at, attempt=1, instance_id="i", started_at=at, price_usd_h="1", price_source="",  # type: ignore[arg-type]
            price_at=at, on_demand_usd_h="1",  # type: ignore[arg-type]
        )
    )  # fmt: skip
    return run


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator[TaskRecord]:
    """A run whose spec is a pipe that nothing comes out of: who reads it hangs."""
    run = new_run(tmp_path)
    spec = Path(run.control.url) / "spec.json"
    spec.unlink()
    os.mkfifo(spec)
    yield TaskRecord(run_id="r", storage=str(tmp_path), conn_id=None)
    # Replaced, so that nothing hangs any more; then those that wait get an end of file.
    other = spec.with_name("other")
    other.write_bytes(b"{}")
    pipe = os.open(spec, os.O_RDWR | os.O_NONBLOCK)
    other.replace(spec)
    os.close(pipe)


def test_a_storage_that_hangs_takes_no_thread_of_airflows(stuck: TaskRecord) -> None:
    looking = itertools.count(1)
    looked = 0

    def find(task: TaskKey) -> TaskRecord:
        nonlocal looked
        looked = next(looking)
        return stuck

    pages = app_of(find, PagePool(threads=4, waiting=8, patience_s=PATIENCE_S))
    airflow = FastAPI()

    @airflow.get("/health")
    def health() -> str:  # in Starlette's threads, as Airflow's own is
        return "healthy"

    airflow.mount("/spotfirst", pages)

    async def look() -> None:
        transport = httpx.ASGITransport(app=airflow)
        async with httpx.AsyncClient(transport=transport, base_url="http://airflow") as client:
            asked = [asyncio.ensure_future(client.get(f"/spotfirst{PAGE}")) for _ in range(60)]
            full = lambda: looked >= 4 and sum(task.done() for task in asked) >= 60 - 12  # noqa: E731
            await asyncio.to_thread(wait_until, full)
            for task in asked:
                if task.done():
                    assert task.result().status_code == 503
                    assert "Too many pages" in task.result().text
                    assert task.result().headers["Retry-After"]
            # All threads of the pages hang, and their queue is full.
            for _ in range(50):
                answer = await client.get("/health")
                assert answer.json() == "healthy"
            assert sum(task.done() for task in asked) == 60 - 12
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    asyncio.run(asyncio.wait_for(look(), PATIENCE_S))


def test_a_page_of_a_storage_that_hangs_says_so_and_the_next_one_is_made(
    stuck: TaskRecord, tmp_path_factory: pytest.TempPathFactory
) -> None:
    healthy = new_run(tmp_path_factory.mktemp("healthy"))
    good = TaskRecord(run_id="r", storage=healthy.root.url, conn_id=None)
    records = {"stuck": stuck, "good": good}
    pool = PagePool(threads=2, patience_s=0.2)
    with TestClient(app_of(lambda task: records[task.dag_id], pool)) as client:
        answer = client.get("/dags/stuck/runs/r/tasks/t/-1")
        assert answer.status_code == 503
        assert "does not answer" in answer.text
        # However slow this machine is, a page is made in the end.
        wait_until(lambda: client.get("/dags/good/runs/r/tasks/t/-1").status_code == 200)


def test_a_pool_gives_results_and_errors_and_ends_its_queue() -> None:
    async def use() -> None:
        pool = PagePool(threads=2, waiting=1, patience_s=PATIENCE_S)
        assert await pool.run(lambda: 3) == 3
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 // 0)
        with pytest.raises(TimeoutError):
            await pool.run(_time_out)
        gate = threading.Event()
        waiting = [asyncio.ensure_future(pool.run(gate.wait)) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Busy):
            await pool.run(lambda: 3)
        gate.set()
        assert await asyncio.gather(*waiting) == [True] * 3
        assert await pool.run(lambda: 3) == 3

    asyncio.run(asyncio.wait_for(use(), PATIENCE_S))


def _time_out() -> None:
    raise TimeoutError("the page's own")


def test_what_waits_for_a_thread_too_long_is_never_begun() -> None:
    async def use() -> None:
        pool = PagePool(threads=1, patience_s=0.1)
        gate, begun = threading.Event(), []
        for _ in range(3):
            with pytest.raises(TooSlow):
                await pool.run(lambda: begun.append(1) or gate.wait())
        gate.set()
        assert await PagePool().run(lambda: 3) == 3
        assert len(begun) == 1

    asyncio.run(use())


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    def find(task: TaskKey) -> None:
        assert -1 <= task.map_index < 2**31, "a database would refuse it"
        assert "\0" not in "".join(task[:3]), "a database would refuse it"

    with TestClient(app_of(find), raise_server_exceptions=False) as client:
        yield client


ODD = [
    "/dags/d/runs/r/tasks/t/99999999999999999999", "/dags/d/runs/r/tasks/t/-2",
    "/dags/d/runs/r/tasks/t/one", "/dags/d/runs/r/tasks/t/1.5", "/dags/d/runs/r/tasks/t/NaN",
    "/dags/d/runs/r/tasks/t/" + "9" * 5000, "/dags/d%00/runs/r/tasks/t/-1",
    "/dags/d/runs/%00/tasks/t/-1", "/dags/d/runs/r/tasks/%0a/-1", "/dags/%ff%fe/runs/r/tasks/%00/-1",
    "/dags/" + "d" * 300 + "/runs/r/tasks/t/-1", "/dags/d/runs/" + "r" * 60000 + "/tasks/t/-1",
    "/dags/../../etc/passwd", "/dags/%2e%2e%2f%2e%2e%2fetc/runs/r/tasks/t/-1", "//", "/",
    "/dags/d/runs/r/tasks/t", "/openapi.json", "/docs", "/dags/d/runs/r/tasks/t/-1/more",
    "/dags/d/runs/r/tasks/%ed%a0%80/%00",
]  # fmt: skip


@pytest.mark.parametrize("address", ODD, ids=range(len(ODD)))
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD"])
def test_an_odd_address_is_4xx(client: TestClient, method: str, address: str) -> None:
    assert 400 <= client.request(method, address).status_code < 500


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.one_of(st.text(min_size=1), st.binary(min_size=1)), min_size=4, max_size=4))
def test_no_address_is_an_error_of_the_server(client: TestClient, parts: list[Any]) -> None:
    dag, run, task, index = (
        quote(part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part, safe="")
        for part in parts
    )
    for last in (index, "-1"):
        answer = client.get(f"/dags/{dag}/runs/{run}/tasks/{task}/{last}", follow_redirects=False)
        assert answer.status_code < 500


BROKEN = {
    "a spec of garbage": ("spec.json", b"\xff"),
    "a journal of garbage": ("journal/00000001.json", b"{}"),
    "a huge journal entry": ("journal/00000002.json", b" " * (5 << 20)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_page_of_a_broken_run_names_what_is_broken(tmp_path: Path, name: str) -> None:
    run = new_run(tmp_path)
    path, data = BROKEN[name]
    run.control.write(path, data)
    record = TaskRecord(run_id="r", storage=str(tmp_path), conn_id=None)
    with TestClient(app_of(lambda task: record), raise_server_exceptions=False) as client:
        answer = client.get(PAGE)
    assert answer.status_code == 503
    assert f"{run.control.url}/{path}" in answer.text


def test_a_heartbeat_or_chain_of_garbage_still_gives_a_page(tmp_path: Path) -> None:
    run = with_attempt(new_run(tmp_path))
    run.storage.write(run.attempt_path(1, "heartbeat.json"), b" " * (5 << 20))
    run.storage.write("checkpoints/00000001.json", b"garbage")
    record = TaskRecord(run_id="r", storage=str(tmp_path), conn_id=None)
    with TestClient(app_of(lambda task: record), raise_server_exceptions=False) as client:
        answer = client.get(PAGE)
    assert answer.status_code == 200
    assert "checkpoints/00000001.json" in answer.text


def test_the_output_of_a_page_costs_the_same_however_large_the_log_is(tmp_path: Path) -> None:
    run = with_attempt(new_run(tmp_path))
    path = Path(run.storage.url) / run.log_path(1, 1)
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(1 << 30)
        file.seek(1 << 30)
        file.write(b"\n" + b"".join(b"\r%d%%" % n for n in range(101)) + b"\nthe end\n")
    tracemalloc.start()
    try:
        view = look_at(run, utc_now())
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert view.output[-2:] == ["100%", "the end"]
    assert peak_bytes < 16 << 20


def test_the_output_is_found_by_what_the_heartbeat_says_or_by_listing(tmp_path: Path) -> None:
    run = with_attempt(new_run(tmp_path))
    for number in range(1, 9):
        run.storage.write(run.log_path(1, number), b"line %d\n" % number)
    assert look_at(run, utc_now()).output[-1] == "line 8"
    for claimed in (8, 10**12, 0):
        beat = '{"v":1,"attempt":1,"beat":1,"at":"2026-01-01T00:00:00Z","phase":"training",'
        run.storage.write(
            run.attempt_path(1, "heartbeat.json"), f'{beat}"log_segments":{claimed}}}'.encode()
        )
        assert look_at(run, utc_now()).output[-1] == "line 8"


def test_the_page_of_a_run_that_is_gone_is_404(tmp_path: Path) -> None:
    record = TaskRecord(run_id="gone", storage=str(tmp_path), conn_id=None)
    with TestClient(app_of(lambda task: record), raise_server_exceptions=False) as client:
        assert client.get(PAGE).status_code == 404


def test_a_record_that_cannot_be_verified_says_what_to_look_at() -> None:
    """Edited by somebody; or, with another key on the API server than on the worker, honest."""

    def find(task: TaskKey) -> TaskRecord:
        raise UntrustedObject("it was signed with another control key <b>")

    answer = TestClient(app_of(find)).get(PAGE)
    assert answer.status_code == 200
    assert "has not attached to a run yet, as far as can be told here" in answer.text
    assert "another control key &lt;b&gt;" in answer.text
