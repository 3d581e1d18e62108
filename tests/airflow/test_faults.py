"""What people and machines do to a task, against a real scheduler, triggerer and API server.

All scenarios that train are started together, as Airflow would run them; each test then does its
harm to one of them. A test waits for facts (journal, task state, processes), never for a time.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from spotfirst import events as e
from spotfirst.state import Phase
from tests.airflow.world import Scenario, World

pytestmark = pytest.mark.airflow

FOR_EVER = 100_000


@pytest.fixture(scope="module")
def started(world: World) -> dict[str, Scenario]:
    """Everything that trains until something happens to it."""
    wanted = {
        "marked failed": ("deferred", {}),
        "marked success": ("deferred", {}),
        "cleared while running": ("deferred", {}),
        "dag run failed": ("deferred", {}),
        "timed out": ("timed_out", {}),
        "over time": ("over_time", {}),
        "killed worker": ("in_worker", {}),
        "fails once": ("deferred", {"steps": 60, "fail_at": 45}),
        "delivered twice": ("retried", {"steps": 10}),
    }
    return {
        name: world.start(dag_id, **{"steps": FOR_EVER, **params})
        for name, (dag_id, params) in wanted.items()
    }


def stop(scenario: Scenario) -> None:
    """End a scenario that would train for ever."""
    scenario.mark("failed")
    scenario.wait_until_quiet()
    scenario.check_consistent()


def test_mark_failed_stops_the_run_and_a_clear_continues_it(started: dict[str, Scenario]) -> None:
    it = started["marked failed"]
    it.wait_for_checkpoint()
    it.mark("failed")
    it.wait_until_quiet()
    assert it.state().phase is Phase.STOPPED
    it.check_consistent()

    it.client.wait_for_run(it.dag_id, it.dag_run)
    it.clear()
    it.wait(lambda: len(it.events(e.Launched)) == 2, "a second attempt")
    it.wait(lambda: len(it.trace()) >= 2, "the script to start again")
    assert int(it.trace()[-1][2]) > 0, "it began at step 0 again"
    stop(it)


def test_mark_success_stops_the_run(started: dict[str, Scenario]) -> None:
    it = started["marked success"]
    it.wait_for_checkpoint()
    it.mark("success")
    it.wait_until_quiet()
    assert it.state().phase is Phase.STOPPED
    assert it.task_state() == "success"
    it.check_consistent()


def test_clear_while_running_goes_on_with_the_same_instance(started: dict[str, Scenario]) -> None:
    it = started["cleared while running"]
    it.wait_for_checkpoint()
    before = it.state().owner
    pid = it.trace()[-1][3]
    it.clear()
    it.wait(lambda: it.state().owner not in {"", before}, "the second try to take over")
    it.wait_for_task("deferred")
    newest = it.run().chain().refresh().newest()
    assert newest is not None
    it.wait_for_checkpoint(newest[1].step + 2)  # long after the first try's kill
    assert len(it.events(e.Launching)) == 1
    assert [line[3] for line in it.trace()] == [pid]
    assert not it.events(e.StopRequested)
    stop(it)


def test_dag_run_failed_stops_the_run(started: dict[str, Scenario]) -> None:
    it = started["dag run failed"]
    it.wait_for_checkpoint()
    it.client.set_run_state(it.dag_id, it.dag_run, "failed")
    it.wait_until_quiet()
    assert it.state().phase is Phase.STOPPED
    it.check_consistent()


def test_trigger_timeout_stops_the_run_and_says_so(started: dict[str, Scenario]) -> None:
    it = started["timed out"]
    it.wait_for_task("failed")
    it.wait_until_quiet()
    assert it.state().phase is Phase.STOPPED
    assert "was stopped (Trigger timeout)" in it.log()
    it.check_consistent()


def test_execution_timeout_stops_the_run_with_a_checkpoint(started: dict[str, Scenario]) -> None:
    it = started["over time"]
    it.wait_for_task("failed")
    it.wait_until_quiet()
    assert it.state().phase is Phase.STOPPED
    assert "execution_timeout" in it.log()
    it.check_consistent()


def test_killed_worker_is_replaced_and_trains_on(started: dict[str, Scenario]) -> None:
    it = started["killed worker"]
    it.wait_for_checkpoint()
    worker = int(it.events(e.Launched)[0].by.rpartition(":")[2])
    before = it.events(e.Attached)[0].owner
    with contextlib.suppress(ProcessLookupError):  # Airflow ended it for a late heartbeat
        os.kill(worker, signal.SIGKILL)
    it.wait(lambda: it.state().owner != before, "the retry to take over")
    assert len(it.events(e.Launching)) == 1
    assert not it.events(e.StopRequested)
    stop(it)  # also: marking a task that runs in a worker stops its run


def test_failed_script_fails_the_task_and_a_clear_goes_on(started: dict[str, Scenario]) -> None:
    it = started["fails once"]
    it.wait_for_task("failed")
    it.client.wait_for_run(it.dag_id, it.dag_run)
    assert it.state().phase is Phase.FAILED
    assert "the script fails on purpose" in it.log()
    it.clear()
    it.wait_for_task("success")
    starts = [int(line[2]) for line in it.trace() if line[0] == "start"]
    assert len(starts) == 2
    assert starts[1] > 0
    it.check_consistent()


def test_retry_after_delivery_gives_the_same_result(started: dict[str, Scenario]) -> None:
    it = started["delivered twice"]
    it.wait_for_task("success", "failed")
    assert it.task_state() == "success"
    assert [line[0] for line in it.trace()] == ["start", "end"]
    assert it.result()["run_id"] == it.base_id
    assert not it.run(2).exists()
    it.check_consistent()


def test_success_gives_a_result_and_a_clear_trains_anew(world: World) -> None:
    it = world.start("deferred", steps=30)
    it.wait_for_task("success")
    result = it.result()
    assert result["run_id"] == it.base_id
    assert result["attempts"] == 1
    assert float(result["cost_usd"]) > 0
    assert "[attempt 1] step 30 done" in it.log()
    extra = it.client.request("GET", "/assets/events", params={"order_by": "-timestamp"})
    assert it.base_id in [event["extra"].get("run_id") for event in extra["asset_events"]]
    it.check_consistent()

    # A clear while the scheduler is ending the dag run leaves the task unscheduled.
    it.client.wait_for_run(it.dag_id, it.dag_run)
    it.clear()
    it.wait(lambda: it.run(2).exists(), "the second generation")
    it.wait_for_task("success")
    assert it.result()["run_id"] == it.base_id + ".g2"
    it.check_consistent(generation=2)


def test_decorated_function_says_what_to_train(world: World) -> None:
    it = world.start("decorated", steps=3)
    it.wait_for_task("success")
    assert it.result()["run_id"] == it.base_id
    it.check_consistent()


def test_template_that_renders_to_nothing_fails_before_anything_is_launched(world: World) -> None:
    it = world.start("unrendered")
    it.wait_for_task("failed")
    assert "resume_from" in it.log()
    assert "rendered to 'None'" in it.log()
    assert not it.run().exists()


@pytest.fixture(scope="module")
def surviving(started: dict[str, Scenario], world: World) -> Iterator[Scenario]:
    """A run that outlives what happens to Airflow's components, one after the other."""
    it = world.start("deferred", steps=FOR_EVER)
    it.wait_for_checkpoint()
    yield it
    stop(it)


def test_killed_triggerer_is_replaced(surviving: Scenario, world: World) -> None:
    world.airflow.kill("triggerer")
    world.airflow.start_component("triggerer")
    world.airflow.wait_healthy()
    assert len(surviving.events(e.Launching)) == 1
    instance = surviving.trace()[-1][3]
    os.kill(int(instance), signal.SIGKILL)  # only a controller that is back notices
    surviving.wait(lambda: bool(surviving.events(e.Ended)), "the new triggerer to see the end")
    surviving.wait(lambda: len(surviving.trace()) == 2, "it to launch a second attempt")


def test_run_that_ends_without_a_scheduler_is_delivered_by_the_next(world: World) -> None:
    it = world.start("deferred", steps=50)
    it.wait_for_checkpoint()
    world.airflow.kill("scheduler")
    it.wait_until_quiet()
    # The triggerer says by itself that the trigger has fired; nobody goes on from there.
    assert it.task_state() in {"deferred", "scheduled"}
    world.airflow.start_component("scheduler")
    it.wait_for_task("success")
    assert [line[0] for line in it.trace()] == ["start", "end"]
    it.check_consistent()


def test_trigger_moved_to_another_triggerer_stops_nothing(
    surviving: Scenario, world: World
) -> None:
    """A triggerer that hangs loses its triggers, and is told to kill them when it is back."""
    launches = len(surviving.events(e.Launching))
    world.airflow.start_component("triggerer-2")
    group = world.airflow.pid("triggerer")
    os.killpg(group, signal.SIGSTOP)
    try:
        log = world.airflow.home / "logs"
        moved = lambda: len(list(log.rglob(f"*{surviving.dag_run}*/**/*.trigger.*.log"))) >= 3  # noqa: E731
        surviving.wait(moved, "the second triggerer to take the trigger")
    finally:
        os.killpg(group, signal.SIGCONT)
    surviving.wait(
        lambda: "invoking on_kill" in surviving.log(), "the first triggerer to kill its trigger"
    )
    newest = surviving.run().chain().refresh().newest()
    assert newest is not None
    surviving.wait_for_checkpoint(newest[1].step + 3)
    assert surviving.state().phase is Phase.ACTIVE
    assert len(surviving.events(e.Launching)) == launches
    world.airflow.stop_component("triggerer-2")


def test_mark_while_no_triggerer_is_up_still_stops_the_run(world: World) -> None:
    it = world.start("deferred", steps=FOR_EVER)
    it.wait_for_checkpoint()
    world.airflow.kill("triggerer")
    try:
        it.mark("failed")
        it.wait_until_quiet()
        assert it.state().phase is Phase.STOPPED
        it.check_consistent()
    finally:
        world.airflow.start_component("triggerer")
        world.airflow.wait_healthy()
