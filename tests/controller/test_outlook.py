"""The work that is left: what is likely, and what it is at most, from whatever is known."""

from __future__ import annotations

import random
from datetime import timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from spotfirst import events as e
from spotfirst.checkpointer import Checkpointer
from spotfirst.heartbeat import Heartbeat, Progress
from spotfirst.lessons import Lessons
from spotfirst.market import Market, Pool
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.state import RunState, fold
from spotfirst.steptimes import StepTimes, StepWatch
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow.lessons import RUNS, learn
from spotfirst_airflow.outlook import Outlook, passed, past_limits, work_left
from tests.controller.world import START

POOL = Pool(instance_type="g5.xlarge", zone="zone-a")


def spec(run_id: str = "run", **more: Any) -> RunSpec:
    return RunSpec(run_id=run_id, created_at=START, command=("train",), **more)


def history(*ends: dict[str, Any], pool: Pool = POOL, minutes: float = 60.0) -> list[e.Event]:
    """Attempts one after the other, each an hour long, and what their ends say."""
    events: list[e.Event] = [e.Created(at=START)]
    for number, end in enumerate(ends, start=1):
        begun = START + timedelta(minutes=(number - 1) * minutes)
        ended = begun + timedelta(minutes=minutes / 2)
        events += [
            e.Launching(at=begun, attempt=number, token=str(number), market=Market.SPOT, pool=pool,
                        reason=""),
            e.Launched(at=begun, attempt=number, instance_id="i", started_at=begun,
                       price_usd_h=Decimal(1), price_source="t", price_at=begun,
                       on_demand_usd_h=Decimal(3)),
            e.Ended(at=ended, attempt=number, ended_at=ended, by_fleet=True,
                    **{"cause": "interrupted", **end}),
        ]  # fmt: skip
    return events


def beat(**progress: Any) -> Heartbeat:
    return Heartbeat(attempt=1, beat=1, at=START, phase="training", progress=Progress(**progress))


NOBODY_KNOWS = RunState(created_at=START)
TIMES = StepTimes(count=100, mean_s=2.0, spread_s=0.5)


def test_while_steps_are_measured_they_tell_and_most_is_more_than_likely() -> None:
    work = work_left(spec(), NOBODY_KNOWS, beat(step=100, total_steps=500, step_times=TIMES))
    assert work is not None
    assert work.likely_s == 800
    assert 800 < work.most_s < 900


def test_most_holds_in_about_39_of_40_trainings() -> None:
    rng, held = random.Random(7), 0
    for _ in range(1000):
        watch, now_s = StepWatch(), 0.0
        for step in range(60):
            watch.lap(step, now_s)
            now_s += rng.gammavariate(4.0, 0.5)
        times = watch.times()
        assert times is not None
        truth_s = sum(rng.gammavariate(4.0, 0.5) for _ in range(300))
        held += truth_s <= times.most_s(300)
    assert 0.955 <= held / 1000 <= 0.99


def test_the_first_steps_of_a_process_do_not_count() -> None:
    watch = StepWatch()
    for step, now_s in ((0, 0.0), (1, 90.0), (2, 91.0), (3, 92.0)):
        watch.lap(step, now_s)
    assert watch.times() == StepTimes(count=2, mean_s=1.0, spread_s=0.0)


def test_between_attempts_the_last_one_of_the_same_type_tells() -> None:
    other = Pool(instance_type="g6.xlarge", zone="zone-a")
    events = history({"step": 50, "checkpoint_step": 40, "total_steps": 140, "step_times": TIMES})
    slower = msgspec.structs.replace(TIMES, mean_s=5.0)
    end = {"start_step": 40, "step": 60, "checkpoint_step": 60, "total_steps": 140}
    more = history({}, {**end, "step_times": slower}, pool=other)[4:]
    again = history({}, {}, {})[7:8]
    work = work_left(spec(), fold([*events, *more, *again]), None)
    assert work is not None
    assert work.likely_s == 80 * 2.0


def test_before_the_first_step_earlier_runs_of_the_model_tell_and_else_people() -> None:
    taught = Lessons(step_times={"g5.xlarge": TIMES}, total_steps=1000)
    known = work_left(spec(lessons=taught, training_time_s=60.0), NOBODY_KNOWS, None)
    assert known is not None
    assert known.likely_s == 2000
    expected = work_left(spec(training_time_s=3600.0), NOBODY_KNOWS, None)
    assert expected is not None
    assert expected.likely_s == 3600.0
    assert expected.most_s == pytest.approx(3960.0)
    assert work_left(spec(), NOBODY_KNOWS, None) is None


def test_a_change_of_instance_takes_what_it_took_in_this_run_or_in_earlier_ones() -> None:
    taught = spec(lessons=Lessons(startup_s=33.0))
    assert Outlook.of(taught, NOBODY_KNOWS).changeover_s == 33.0
    assert Outlook.of(taught, fold(history({"startup_s": 12.0}))).changeover_s == 12.0


def test_the_checkpointer_tells_how_long_steps_take(tmp_path: Any) -> None:
    torch = pytest.importorskip("torch")
    clock = iter(range(10**6))
    checkpointer = Checkpointer(
        model=torch.nn.Linear(1, 1), storage=str(tmp_path), monotonic=lambda: float(next(clock))
    )
    for _ in checkpointer.steps(8):
        pass
    times = checkpointer._reporter.progress.step_times
    assert times is not None
    assert times.count == 6
    assert times.mean_s > 0


# -- lessons ------------------------------------------------------------------------------------


def written(
    storage: Storage, run_id: str, *ends: dict[str, Any], model: str = "m", **more: Any
) -> None:
    run = create_run(storage, spec(run_id, tags={"model_id": model}, **more))
    journal = run.journal()
    for event in history(*ends):
        journal.append(event)


@pytest.fixture
def storage(tmp_path: Any) -> Storage:
    return open_storage(str(tmp_path / "store"))


def test_runs_of_the_same_model_teach_its_steps_and_all_teach_their_pools(storage: Storage) -> None:
    end = {"step": 50, "total_steps": 140, "startup_s": 40.0}
    written(storage, "dag--1", {**end, "step_times": TIMES})
    slow = msgspec.structs.replace(TIMES, mean_s=9.0)
    written(storage, "dag--2", {**end, "step_times": slow, "total_steps": 7}, model="other")
    lessons = learn(storage, "dag--3", "m")
    assert lessons.step_times == {"g5.xlarge": TIMES}
    assert (lessons.total_steps, lessons.startup_s) == (140, 40.0)
    [pool] = lessons.pools
    assert (pool.pool, pool.losses) == (POOL, 2)
    assert pool.up_s > 0


def test_without_a_model_nothing_is_learnt_about_the_training(storage: Storage) -> None:
    written(storage, "dag--1", {"step": 50, "total_steps": 140, "step_times": TIMES}, model="other")
    lessons = learn(storage, "dag--2", "")
    assert (lessons.step_times, lessons.total_steps) == ({}, None)


def test_a_run_that_cannot_be_read_teaches_nothing_and_stops_nobody(storage: Storage) -> None:
    written(storage, "dag--1", {"startup_s": 5.0})
    written(storage, "dag--2", {"startup_s": 5.0})
    storage.write("control/runs/dag--2/spec.json", b"{broken")
    assert learn(storage, "dag--3", "m").runs == ("dag--1",)


def test_so_many_runs_are_read_those_of_the_same_task_first(storage: Storage) -> None:
    for number in range(RUNS + 5):
        written(storage, f"dag--{number:03}")
    written(storage, "zebra--1")
    runs = learn(storage, "dag--999", "m").runs
    assert len(runs) == RUNS
    assert set(runs) == {f"dag--{number:03}" for number in range(5, RUNS + 5)}


# -- limits that have passed --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "minutes", "expected"),
    [
        ({}, 600, set()),
        ({"deadline": START + timedelta(minutes=60)}, 59, set()),
        ({"deadline": START + timedelta(minutes=60)}, 60, {"deadline"}),
        ({"budget_usd": Decimal("1.00")}, 59, set()),
        ({"budget_usd": Decimal("1.00")}, 61, {"budget"}),
        (
            {"budget_usd": Decimal("1.00"), "deadline": START + timedelta(minutes=60)},
            61,
            {"budget", "deadline"},
        ),
    ],
)
def test_what_has_passed_is_said_while_an_instance_runs_on(
    limits: dict[str, Any], minutes: float, expected: set[str]
) -> None:
    state = fold(history({})[:-1])  # at $1 an hour, and it has not ended
    now = START + timedelta(minutes=minutes)
    assert set(passed(spec(**limits), state, now=now)) == expected
    texts = past_limits(spec(**limits), state, now=now)
    assert len(texts) == (len(expected) + 1 if expected else 0)


def test_a_run_that_ended_in_time_has_not_passed_its_deadline_since() -> None:
    ended = [
        *history({"cause": "completed"}),
        e.Succeeded(at=START + timedelta(hours=5), attempt=1),
    ]
    limits = {"deadline": START + timedelta(hours=1), "budget_usd": Decimal("0.60")}
    assert passed(spec(**limits), fold(ended), now=START + timedelta(hours=9)) == {}
