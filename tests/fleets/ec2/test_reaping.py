"""Orphans and kept instances as EC2 has them: in tags, some seconds late, and with lost answers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from botocore.exceptions import ReadTimeoutError

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable, LaunchRejected
from spotfirst.market import Market
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow.fleets import LaunchRequest
from spotfirst_airflow.fleets.base import KEEP_TAG
from spotfirst_airflow.keeping import Keeps
from spotfirst_airflow.reaping import Reaped, Tidies, reap
from tests.fakes.fleet import forget_processes
from tests.fleets.ec2.launches import G6_A, World

HOUR = timedelta(hours=1)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    forget_processes()
    yield
    forget_processes()


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def storage(request: pytest.FixtureRequest) -> Storage:
    return open_storage(f"memory://{request.node.name}")


def launch(world: World, storage: Storage, run_id: str = "run", *, over: bool = True) -> str:
    """An instance of a run, which has failed since or not; the token."""
    now, token = world.cloud.clock.now, f"{run_id}-1"
    journal = create_run(
        storage, RunSpec(run_id=run_id, created_at=now, command=("true",))
    ).journal()
    journal.append(e.Created(at=now))
    journal.append(
        e.Launching(at=now, attempt=1, token=token, market=Market.SPOT, pool=G6_A, reason="r")
    )
    world.fleet("controller").launch(
        LaunchRequest(
            token=token, run_id=run_id, attempt=1, market=Market.SPOT, pool=G6_A,
            storage_url=storage.url, max_life_s=7 * 86400.0,
        )
    )  # fmt: skip
    world.cloud.clock.step(60)
    if over:
        at = world.cloud.clock.now
        journal.append(e.Ended(at=at, attempt=1, cause="script_failed", ended_at=at))
        journal.append(e.Failed(at=at, message="gave up"))
    return token


def a_round(world: World, storage: Storage) -> Reaped:
    """What a reaper in a process of its own does."""
    clock = world.cloud.clock
    fleet = world.fleet(f"reaper at {clock.now}")
    return reap(fleet, storage, grace_s=60, clock=lambda: clock.now, sleep=clock.step)


def alive(world: World) -> int:
    return len(world.fleet(f"observer at {world.cloud.clock.now}").owned())


def test_an_orphan_is_ended_and_a_living_one_is_not(world: World, storage: Storage) -> None:
    launch(world, storage, "alive", over=False)
    token = launch(world, storage, "over")
    world.cloud.clock.step(120)
    done = a_round(world, storage)
    assert (done.ended, done.left) == ((token,), ())
    assert {v.run_id: v.standing for v in done.verdicts} == {"alive": "live", "over": "orphan"}
    world.cloud.clock.step(120)
    assert alive(world) == 1


def test_a_kept_instance_wears_its_time_as_a_tag_until_a_reaper_ends_it(
    world: World, storage: Storage
) -> None:
    token = launch(world, storage)
    until = world.cloud.clock.now + 4 * HOUR
    shell = world.fleet("controller").keep(token, until=until)
    [instance] = world.fleet("observer").owned()
    assert instance.tags[KEEP_TAG] == until.isoformat()
    assert shell == f"aws ssm start-session --region eu-central-1 --target {instance.instance_id}"
    world.cloud.clock.step(3 * 3600)
    assert [v.standing for v in a_round(world, storage).verdicts] == ["kept"]
    world.cloud.clock.step(3600)
    assert a_round(world, storage).ended == (token,)


def test_keeping_may_be_repeated_after_a_lost_answer(world: World, storage: Storage) -> None:
    token = launch(world, storage)
    until = world.cloud.clock.now + HOUR
    fleet = world.fleet("controller")
    no_answer = ReadTimeoutError(endpoint_url="https://ec2", error="timed out")
    world.faults.after("CreateTags", no_answer)
    with pytest.raises(FleetUnavailable):
        fleet.keep(token, until=until)
    fleet.keep(token, until=until)
    [instance] = world.fleet("observer").owned()
    assert instance.tags[KEEP_TAG] == until.isoformat()


def test_an_instance_that_is_gone_cannot_be_kept(world: World, storage: Storage) -> None:
    token = launch(world, storage)
    fleet = world.fleet("controller")
    fleet.terminate([token])
    world.cloud.clock.step(300)
    with pytest.raises(LaunchRejected, match="gone"):
        world.fleet("another").keep(token, until=world.cloud.clock.now + HOUR)


def test_only_who_asks_for_it_keeps(world: World) -> None:
    plain, keeping = world.fleet(), world.fleet(on_failure="keep", keep_h=2)
    assert isinstance(plain, Keeps)
    assert isinstance(keeping, Keeps)
    assert (plain.keep_s, keeping.keep_s) == (0.0, 7200.0)


def test_launch_templates_of_runs_that_are_over_are_removed(world: World, storage: Storage) -> None:
    launch(world, storage, "alive", over=False)
    launch(world, storage, "over")
    assert isinstance(world.fleet(), Tidies)
    assert a_round(world, storage).tidied == 1
    assert a_round(world, storage).tidied == 0
