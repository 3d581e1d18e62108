"""The trigger alone, with real runs, in an event loop as the triggerer has it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from spotfirst import events as e
from spotfirst.journal import Journal
from spotfirst.run import Run
from spotfirst.state import Phase
from spotfirst.storage import open_storage
from spotfirst_airflow import triggers
from spotfirst_airflow.following import Follower
from spotfirst_airflow.submission import Request, attach
from spotfirst_airflow.triggers import SpotRunTrigger
from spotfirst_airflow.waking import ring
from tests.waiting import PATIENCE_S, wait_until

DRY = {
    "market": {"kind": "scripted", "zones": {"a": [{"from_s": 0, "capacity": 0}]}},
}


def waiting_run(folder: Path, name: str) -> Run:
    """A run that waits for spot capacity: every look works, and no process is started."""
    request = Request(
        command=("true",),
        fleet_options={**DRY, "root": str(folder / "fleet")},
        policy="spot_only",
    )
    return attach(open_storage(str(folder / "storage")), name, request, owner="us", environment={})


def trigger_for(run: Run) -> SpotRunTrigger:
    return SpotRunTrigger(storage=run.root.url, run_id=run.run_id, owner="us")


def test_arguments_survive_the_database(tmp_path: Path) -> None:
    run = waiting_run(tmp_path, "r")
    path, arguments = trigger_for(run).serialize()
    again = SpotRunTrigger(**json.loads(json.dumps(arguments)))
    assert path == "spotfirst_airflow.triggers.SpotRunTrigger"
    assert again.serialize() == (path, arguments)


def test_no_look_of_many_runs_is_taken_in_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_in: set[int] = set()
    look = Follower.look

    def noted(self: Follower) -> float | None:
        looked_in.add(threading.get_ident())
        return look(self)

    monkeypatch.setattr(Follower, "look", noted)
    runs = [waiting_run(tmp_path, f"r{number}") for number in range(50)]

    def all_seen() -> bool:
        return all(run.control.exists("journal/00000003.json") for run in runs)

    async def triggerer() -> None:
        tasks = [asyncio.ensure_future(anext(trigger_for(run).run())) for run in runs]
        await asyncio.to_thread(wait_until, all_seen)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(triggerer())
    assert all_seen()
    assert all(isinstance(_last(run.journal()), e.Waiting) for run in runs)
    assert looked_in
    assert threading.get_ident() not in looked_in


def test_news_of_a_run_make_it_look_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    class Following:
        def look(self) -> float | None:
            looks.append(time.monotonic())
            if len(looks) == 1:
                threading.Timer(0.05, ring, ["r"]).start()
            return 2 * PATIENCE_S if len(looks) == 1 else None

    trigger = trigger_for(waiting_run(tmp_path, "r"))
    monkeypatch.setattr(trigger, "_follower", lambda **_: Following())
    asyncio.run(anext(trigger.run()))  # type: ignore[arg-type]
    assert looks[1] - looks[0] < PATIENCE_S


def _last(journal: Journal) -> e.Event:
    journal.refresh()
    return journal.events[-1]


def test_two_triggers_on_one_run_decide_each_thing_once(tmp_path: Path) -> None:
    run = waiting_run(tmp_path, "r")

    async def triggerers() -> None:
        tasks = [asyncio.ensure_future(anext(trigger_for(run).run())) for _ in range(2)]
        await asyncio.wait(tasks, timeout=3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(triggerers())
    journal = run.journal()
    journal.refresh()
    kinds = [type(event) for event in journal.events]
    assert kinds == [e.Created, e.Attached, e.Waiting]


def test_run_that_cannot_be_read_ends_in_an_event_and_not_in_silence(tmp_path: Path) -> None:
    run = waiting_run(tmp_path, "r")
    trigger = SpotRunTrigger(storage=run.root.url, run_id="another", owner="us")
    event = asyncio.run(anext(trigger.run()))
    assert "another" in event.payload["error"]


@pytest.mark.parametrize("argument", ["storage", "run_id", "owner", "conn_id"])
def test_arguments_are_plain_text(tmp_path: Path, argument: str) -> None:
    _, arguments = trigger_for(waiting_run(tmp_path, "r")).serialize()
    assert isinstance(arguments[argument], (str, type(None)))


def killed(run: Run, task_state: str | None, monkeypatch: pytest.MonkeyPatch) -> Phase:
    """The run's phase after a kill of its trigger, with the task in this state."""
    trigger = trigger_for(run)

    async def state() -> str | None:
        return task_state

    monkeypatch.setattr(trigger, "_task_state", state)
    asyncio.run(trigger.on_kill())
    return run.journal().refresh().phase


@pytest.mark.parametrize("task_state", ["failed", "success", "skipped", "gone"])
def test_kill_of_a_task_that_has_ended_stops_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task_state: str
) -> None:
    assert killed(waiting_run(tmp_path, "r"), task_state, monkeypatch) is Phase.STOPPED


def test_kill_by_a_former_owner_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = waiting_run(tmp_path, "r")
    attach(run.root, "r", Request(), owner="another try", environment={})
    assert killed(run, "failed", monkeypatch) is Phase.ACTIVE


def test_kill_of_a_trigger_that_only_moved_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert killed(waiting_run(tmp_path, "r"), "deferred", monkeypatch) is Phase.ACTIVE


def test_cleared_task_that_nobody_takes_up_again_has_its_run_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triggers, "_UNATTENDED", timedelta(seconds=1))
    assert killed(waiting_run(tmp_path, "r"), "scheduled", monkeypatch) is Phase.STOPPED


def test_kill_goes_on_although_airflow_cancels_it_after_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = waiting_run(tmp_path, "r")
    trigger = trigger_for(run)
    asked = asyncio.Event()

    async def slow_state() -> str:
        asked.set()
        await asyncio.sleep(0.5)
        return "failed"

    monkeypatch.setattr(trigger, "_task_state", slow_state)

    async def triggerer() -> None:
        kill = asyncio.ensure_future(trigger.on_kill())
        await asked.wait()
        kill.cancel()
        await asyncio.gather(kill, return_exceptions=True)
        await asyncio.gather(*triggers._BACKGROUND)

    asyncio.run(triggerer())
    assert run.journal().refresh().phase is Phase.STOPPED
