"""One run for one id; its files."""

from __future__ import annotations

import multiprocessing
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from spotfirst.errors import CorruptObject, InvalidSpec, UnknownRun
from spotfirst.heartbeat import ExitReport, Handover, Heartbeat
from spotfirst.run import Run, create_run, list_runs
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage, open_storage
from tests.waiting import PATIENCE_S

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)


def _spec(**changes: Any) -> RunSpec:
    fields = {"run_id": "run-1", "created_at": NOW, "command": ("python", "train.py")}
    return RunSpec(**{**fields, **changes})


def _create(url: str, second: int) -> str:
    try:
        return create_run(
            open_storage(url), _spec(created_at=NOW + timedelta(seconds=second))
        ).run_id
    except InvalidSpec as error:
        return str(error)


def test_creating_a_run_twice_gives_the_same_run(storage: Storage) -> None:
    first = create_run(storage, _spec())
    again = create_run(storage, _spec(created_at=NOW + timedelta(hours=1)))
    assert again.spec() == first.spec() == _spec()


def test_free_options_do_not_make_it_other_work(memory: Storage) -> None:
    options = {"zones": ("a", "b"), "price": Decimal("1.50"), "at": NOW, "n": 1}
    spec = _spec(
        fleet_options=options, budget_usd=Decimal("25.0"), deadline=NOW + timedelta(hours=2)
    )
    create_run(memory, spec)
    create_run(memory, spec)
    elsewhere = timezone(timedelta(hours=2))
    create_run(memory, msgspec.structs.replace(
        spec, budget_usd=Decimal(25), deadline=(NOW + timedelta(hours=2)).astimezone(elsewhere)
    ))  # fmt: skip


def test_racing_processes_create_one_run(storage: Storage) -> None:
    if storage.url.startswith("memory"):
        pytest.skip("memory is one process's")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        made = pool.starmap_async(_create, [(storage.url, n) for n in range(6)])
        assert made.get(timeout=PATIENCE_S) == ["run-1"] * 6
    assert list_runs(storage) == ["run-1"]


def test_other_work_under_the_same_id_is_refused(memory: Storage) -> None:
    create_run(memory, _spec())
    with pytest.raises(InvalidSpec, match=r"run-1.*asks for other work.*choose another run id"):
        create_run(memory, _spec(command=("python", "other.py")))


def test_a_run_that_is_not_there_is_unknown(storage: Storage) -> None:
    with pytest.raises(UnknownRun, match=r"no run 'run-1' in .*spotfirst runs"):
        Run(storage, "run-1").spec()
    assert list_runs(storage) == []


def test_runs_are_listed_sorted_and_strangers_left_out(storage: Storage) -> None:
    for run_id in ("b", "a.2", "a"):
        create_run(storage, _spec(run_id=run_id))
    storage.write("control/runs/.hidden", b"x")
    storage.write("control/runs/not a run/x", b"x")
    assert list_runs(storage) == ["a", "a.2", "b"]


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", ".", "-x", "a b", "x" * 201, "a\n"])
def test_ids_that_are_no_folder_are_refused(memory: Storage, run_id: str) -> None:
    with pytest.raises(InvalidSpec, match="must be 1 to 200"):
        Run(memory, run_id)


def test_an_amendment_is_the_spec_from_then_on(storage: Storage) -> None:
    run = create_run(storage, _spec())
    assert run.amend(_spec(script_retries=1)) == 1
    assert run.amend(_spec(script_retries=2)) == 2
    assert run.spec().script_retries == 2
    assert run.original_spec().script_retries == 0


def test_what_an_attempt_says_is_read_back(storage: Storage) -> None:
    run = create_run(storage, _spec())
    assert run.heartbeat(1) is None
    assert run.exit_report(1) is None
    assert run.handover(1) is None
    assert run.log_segment(1, 1) is None
    beat = Heartbeat(attempt=1, beat=1, at=NOW, phase="training")
    run.beat(beat)
    run.beat(msgspec.structs.replace(beat, beat=2))
    assert run.heartbeat(1) == msgspec.structs.replace(beat, beat=2)
    storage.write(f"runs/run-1/{run.log_path(1, 1)}", b"loss \xff")
    assert run.log_segment(1, 1) == "loss \ufffd"


def test_the_first_exit_report_and_handover_stand(storage: Storage) -> None:
    run = create_run(storage, _spec())
    for cause in ("completed", "lost"):
        run.report_exit(ExitReport(attempt=1, at=NOW, cause=cause))
    for to in (2, 3):
        run.request_handover(1, Handover(reason="notice", at=NOW, to=to))
    report, handover = run.exit_report(1), run.handover(1)
    assert report is not None
    assert report.cause == "completed"
    assert handover is not None
    assert handover.to == 2


def test_a_spec_that_was_changed_by_hand_is_corrupt_and_named(memory: Storage) -> None:
    create_run(memory, _spec())
    memory.write("control/runs/run-1/spec.json", b'{"v":1}')
    with pytest.raises(CorruptObject, match=r"runs/run-1/spec.json"):
        Run(memory, "run-1").spec()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"command": ()}, "command"),
        ({"command": ("python", "")}, "empty word"),
        ({"tags": {"colour": "red"}}, "unknown tags"),
        ({"tags": {"team": " "}}, "are empty"),
        ({"deadline": NOW}, "already passed"),
        ({"budget_usd": Decimal(0)}, "more than 0"),
        ({"budget_usd": Decimal("NaN")}, "more than 0"),
        ({"budget_usd": Decimal("Infinity")}, "more than 0"),
        ({"checkpoint_period_s": 0.0}, "checkpoint_period_s"),
        ({"heartbeat_s": float("nan")}, "heartbeat_s"),
        ({"max_life_s": float("inf")}, "max_life_s"),
        ({"script_retries": -1}, "script_retries"),
        ({"fleet_options": {"x": object()}}, "plain numbers"),
        ({"env": {"SEEDS": 3}}, "plain numbers"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_is_written(
    memory: Storage, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidSpec, match=says) as raised:
        create_run(memory, _spec(**changes))
    assert "run-1" in str(raised.value)
    assert list_runs(memory) == []
