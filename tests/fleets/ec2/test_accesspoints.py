"""The access point of a run: made once, whatever gets lost, and open to its instances alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from botocore.exceptions import ReadTimeoutError
from moto import mock_aws

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable, InvalidSpec, LaunchRejected, QuotaReached
from spotfirst.run import Run, create_run
from spotfirst.spec import CodeRef, RunSpec
from spotfirst.storage import Storage
from spotfirst_airflow.fleets.base import RUN_TAG, STORAGE_TAG
from spotfirst_airflow.fleets.ec2.accesspoints import LOOK_AGAIN_S, AccessPoints
from spotfirst_airflow.fleets.ec2.aws import Aws, Identity
from spotfirst_airflow.fleets.ec2.fleet import Ec2Fleet
from spotfirst_airflow.fleets.ec2.options import Ec2Options
from spotfirst_airflow.reaping import reap
from spotfirst_airflow.separating import Separates
from tests.fakes.cloud import ACCOUNT
from tests.fakes.faults import Died, client_error
from tests.fakes.fleet import forget_processes
from tests.fakes.memory import QuickMemory
from tests.fleets.ec2.apart import BUCKET, URL, admitted, may, stack_of, way_of
from tests.fleets.ec2.launches import G6_A, REGION, World, request
from tests.fleets.ec2.tworegions import HERE, HERE_A, THERE, THERE_A, Regions

APART = stack_of(REGION)
NO_ANSWER = ReadTimeoutError(endpoint_url="https://s3-control", error="timed out")
CALLS = ("GetAccessPoint", "CreateAccessPoint", "GetAccessPointPolicy", "PutAccessPointPolicy")


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    forget_processes()
    yield
    forget_processes()


@pytest.fixture
def world() -> World:
    return World()


def launch(fleet: Ec2Fleet, token: str = "token-1", **changes: Any) -> str:
    """The id of the instance."""
    return fleet.launch(request(token, storage_url=URL, **changes)).instance_id


def spec(run_id: str = "run-1", **changes: Any) -> RunSpec:
    at = datetime.fromisoformat("2026-01-01T00:00:00+00:00")
    return RunSpec(run_id=run_id, created_at=at, command=("train",), **changes)


def storage_of(world: World, name: str, url: str = URL) -> Storage:
    """In memory, with the URL of one in S3."""
    return QuickMemory(url, f"apart/{world.name}/{name}", world.cloud.clock, {})


class Stand:
    """A run, of which a fleet needs to know where it is and what it is called."""

    def __init__(self, world: World, run_id: str = "run-1") -> None:
        self.run = Run(storage_of(world, "stand"), run_id)


def let_in(fleet: Ec2Fleet, world: World, *instances: str, **more: Any) -> None:
    run = Stand(world).run
    fleet.admit(run, spec(**more), [(each, G6_A) for each in instances])


def the_point(world: World) -> dict[str, Any]:
    [point] = world.cloud.access_points.values()
    return point


def calls(world: World) -> int:
    return sum(n for name, n in world.calls.items() if "AccessPoint" in name)


# -- at a launch ----------------------------------------------------------------------------------


def test_an_instance_gets_a_way_of_its_runs_own_and_keeps_its_owner_in_its_tags(
    world: World,
) -> None:
    launch(world.fleet(**APART))
    [instance] = world.cloud.instances.values()
    point = the_point(world)
    assert way_of(instance) == f"s3://{point['Alias']}/spotfirst"
    assert point["Bucket"] == BUCKET
    assert point["Name"].startswith("spotfirst-0a1b2c3d-")
    assert 3 <= len(point["Name"]) <= 50
    assert instance.tags[STORAGE_TAG] == URL


def test_all_attempts_of_a_run_share_one_and_other_runs_have_others(world: World) -> None:
    launch(world.fleet("one", **APART), "token-1")
    launch(world.fleet("two", **APART), "token-2", attempt=2)
    launch(world.fleet("one", **APART), "token-3", run_id="run-2")
    ways = [way_of(each) for each in world.cloud.instances.values()]
    assert ways[0] == ways[1] != ways[2]
    assert len(world.cloud.access_points) == 2


def test_a_run_of_the_same_id_in_another_storage_has_another(world: World) -> None:
    fleet = world.fleet(**APART)
    for number, url in enumerate((URL, f"{URL}/team", "s3://bucket2/spotfirst")):
        fleet.launch(request(f"token-{number}", storage_url=url))
    assert len(world.cloud.access_points) == 3


def test_nobody_is_let_in_before_a_controller_says_so(world: World) -> None:
    launch(world.fleet(**APART))
    [instance] = world.cloud.instances.values()
    assert admitted(world.cloud, the_point(world)["Alias"]) == set()
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"):
        assert not may(world.cloud, instance, action, "runs/run-1/packs/1/x")


def test_without_the_option_nobody_asks_for_access_points(world: World) -> None:
    fleet = world.fleet()
    launch(fleet)
    let_in(fleet, world, "i-1")
    fleet.dismiss(Stand(world).run)
    fleet.tidy(lambda _: True)
    [instance] = world.cloud.instances.values()
    assert way_of(instance) == URL
    assert calls(world) == 0


@pytest.mark.parametrize(
    ("call", "after"),
    [*((call, False) for call in CALLS), *((call, True) for call in CALLS if "Get" not in call)],
)
@pytest.mark.parametrize("died", [False, True], ids=["no answer", "died"])
def test_a_call_that_is_cut_off_is_made_up_for(
    world: World, call: str, after: bool, died: bool
) -> None:
    def die() -> None:
        raise Died

    plan = world.faults.after if after else world.faults.before
    plan(call, die if died else NO_ANSWER)
    with pytest.raises((FleetUnavailable, Died)):
        launch(world.fleet("first", **APART))
    assert world.faults.plan == []
    assert world.cloud.instances == {}, "not before there is a way to the storage"
    launch(world.fleet("second", **APART))
    launch(world.fleet("first", **APART))
    [instance] = world.cloud.instances.values()
    assert way_of(instance) == f"s3://{the_point(world)['Alias']}/spotfirst"
    assert admitted(world.cloud, the_point(world)["Alias"]) == set()


def test_two_who_make_it_at_once_give_the_same_way(world: World) -> None:
    def other() -> None:
        launch(world.fleet("other", **APART), "token-2", attempt=2)

    world.faults.before("CreateAccessPoint", other)
    launch(world.fleet("one", **APART), "token-1")
    assert len({way_of(each) for each in world.cloud.instances.values()}) == 1
    assert len(world.cloud.access_points) == 1


def test_one_that_is_removed_as_it_is_made_is_made_again(world: World) -> None:
    """A reaper may take what was just made for the remains of somebody who died."""
    world.faults.before("PutAccessPointPolicy", world.cloud.access_points.clear)
    fleet = world.fleet(**APART)
    with pytest.raises(FleetUnavailable, match="not known everywhere yet"):
        launch(fleet)
    launch(fleet)
    [instance] = world.cloud.instances.values()
    assert way_of(instance) == f"s3://{the_point(world)['Alias']}/spotfirst"


@pytest.mark.parametrize("call", CALLS)
def test_a_permission_that_is_missing_is_named_before_anything_is_launched(
    world: World, call: str
) -> None:
    message = f"User: arn:aws:iam::{ACCOUNT}:user/x is not authorized to perform: s3:{call}"
    world.faults.before(call, client_error("AccessDenied", message, call, status=403))
    with pytest.raises(LaunchRejected, match=f"separate_runs.*perform: s3:{call}.*deploy/aws.yaml"):
        launch(world.fleet(**APART))
    assert world.cloud.instances == {}


def test_an_account_that_is_full_of_them_has_reached_a_quota(world: World) -> None:
    world.cloud.access_point_error = ("TooManyAccessPoints", "You have too many.")
    with pytest.raises(QuotaReached, match="as many access points in eu-central-1 as it may"):
        launch(world.fleet(**APART))
    assert world.cloud.instances == {}


def test_an_access_point_to_another_bucket_is_not_used(world: World) -> None:
    launch(world.fleet(**APART))
    the_point(world)["Bucket"] = "theirs"
    with pytest.raises(LaunchRejected, match="leads to bucket theirs, not to bucket"):
        launch(world.fleet(**APART), "token-2")


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("memory://bucket/x", "needs a storage in S3"),
        ("/tmp/storage", "needs a storage in S3"),
        ("s3://bucket/team*", "has a character in its prefix"),
        ("s3://bucket/${aws:userid}", "has a character in its prefix"),
    ],
)
def test_a_storage_that_no_access_point_can_lead_to_is_refused(
    world: World, url: str, why: str
) -> None:
    with pytest.raises(LaunchRejected, match=why):
        world.fleet(**APART).launch(request(storage_url=url))


@pytest.mark.parametrize(
    "changes",
    [
        {"access_points": "spotfirst"},
        {"access_points": f"arn:aws:s3:{REGION}:{ACCOUNT}:accesspoint/UPPER"},
        {"access_points": f"arn:aws:s3:{REGION}:{ACCOUNT}:accesspoint/{'x' * 40}"},
        {"role": "spotfirst-InstanceRole-0"},
    ],
)
def test_options_that_are_none_of_a_stacks_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(InvalidSpec, match=r"separate_runs\.\w+ is .* output FleetOptions"):
        Ec2Options.of({"separate_runs": APART["separate_runs"] | changes})


def test_what_was_settled_reads_the_same_again() -> None:
    now = datetime.fromisoformat("2026-01-01T00:00:00+00:00")
    settled = Ec2Fleet.settle(APART, now=now)
    assert settled["separate_runs"] == APART["separate_runs"]
    assert Ec2Fleet.settle(settled, now=now) == settled


# -- who is let in --------------------------------------------------------------------------------


def test_the_list_is_that_of_the_last_who_asked(world: World) -> None:
    fleet = world.fleet(**APART)
    launch(fleet)
    for living in (["i-1"], ["i-1", "i-2"], ["i-2"]):
        let_in(fleet, world, *living)
        assert admitted(world.cloud, the_point(world)["Alias"]) == set(living)


def test_while_nothing_changes_nothing_is_asked(world: World) -> None:
    fleet = world.fleet(**APART)
    launch(fleet)
    let_in(fleet, world, "i-1")
    before = calls(world)
    for _ in range(5):
        let_in(fleet, world, "i-1")
    assert calls(world) == before
    world.cloud.clock.step(LOOK_AGAIN_S + 1)
    let_in(fleet, world, "i-1")
    assert calls(world) == before + 1, "a look, now and then"


def test_a_new_process_looks_before_it_writes(world: World) -> None:
    launch(world.fleet(**APART))
    let_in(world.fleet("one", **APART), world, "i-1")
    puts = world.calls["PutAccessPointPolicy"]
    let_in(world.fleet("two", **APART), world, "i-1")
    assert world.calls["PutAccessPointPolicy"] == puts


def test_the_order_of_instances_does_not_matter(world: World) -> None:
    fleet = world.fleet(**APART)
    launch(fleet)
    let_in(fleet, world, "i-1", "i-2")
    before = calls(world)
    let_in(fleet, world, "i-2", "i-1")
    assert calls(world) == before


def test_an_older_list_that_comes_late_does_not_stay(world: World) -> None:
    """A controller is held up in its call, and another lets the next instance in meanwhile."""
    slow, other = world.fleet("slow", **APART), world.fleet("other", **APART)
    launch(slow)
    world.faults.before("PutAccessPointPolicy", lambda: let_in(other, world, "i-1", "i-2"))
    let_in(slow, world, "i-1")
    alias = the_point(world)["Alias"]
    assert admitted(world.cloud, alias) == {"i-1"}, "the slow one's came last"
    world.cloud.clock.step(LOOK_AGAIN_S + 1)
    let_in(other, world, "i-1", "i-2")
    assert admitted(world.cloud, alias) == {"i-1", "i-2"}


@pytest.mark.parametrize("after", [False, True], ids=["not applied", "applied"])
def test_a_list_whose_answer_was_lost_is_put_again(world: World, after: bool) -> None:
    fleet = world.fleet(**APART)
    launch(fleet)
    plan = world.faults.after if after else world.faults.before
    plan("PutAccessPointPolicy", NO_ANSWER)
    with pytest.raises(FleetUnavailable):
        let_in(fleet, world, "i-1")
    let_in(fleet, world, "i-1")
    assert admitted(world.cloud, the_point(world)["Alias"]) == {"i-1"}


def test_other_code_of_a_reopened_run_may_be_read(world: World) -> None:
    fleet = world.fleet(**APART)
    instance = launch(fleet)
    for digest in ("a" * 64, "b" * 64):
        let_in(fleet, world, instance, code=CodeRef(digest=digest, size_bytes=1))
        found = [
            may(world.cloud, world.cloud.instances[instance], "s3:GetObject", f"code/{each}.tar.gz")
            for each in ("a" * 64, "b" * 64)
        ]
        assert found == [digest == "a" * 64, digest == "b" * 64]


def test_instances_of_all_regions_are_let_in() -> None:
    aws = Regions()
    fleet = aws.fleet(**stack_of(HERE))
    for token, pool in (("token-1", HERE_A), ("token-2", THERE_A)):
        fleet.launch(request(token, storage_url=URL, pool=pool, others=()))
    ways = {way_of(i) for cloud in aws.clouds.values() for i in cloud.instances.values()}
    assert len(ways) == 1
    storage = QuickMemory(URL, "apart/regions", aws.clock, {})
    assert isinstance(fleet, Separates)
    fleet.admit(Run(storage, "run-1"), spec(), [("i-1", HERE_A), ("i-2", THERE_A)])
    [point] = aws.clouds[HERE].access_points.values()
    arns = json.loads(point["Policy"])["Statement"][0]["Condition"]["ArnNotEquals"]
    assert arns == {
        "ec2:SourceInstanceARN": [
            f"arn:aws:ec2:{HERE}:{ACCOUNT}:instance/i-1", f"arn:aws:ec2:{THERE}:{ACCOUNT}:instance/i-2",
        ]
    }  # fmt: skip


# -- what is left ---------------------------------------------------------------------------------


def a_run(world: World, run_id: str, *happened: e.Event, url: str = URL) -> Storage:
    """A run with an access point, and what its journal says."""
    storage = storage_of(world, "left", url)
    journal = create_run(storage, spec(run_id)).journal()
    journal.append(e.Created(at=world.cloud.clock.now))
    for event in happened:
        journal.append(event)
    world.fleet(**APART).launch(request(f"token-{run_id}", run_id=run_id, storage_url=url))
    return storage


def failed(world: World) -> e.Event:
    return e.Failed(at=world.cloud.clock.now, message="gave up")


def runs_left(world: World, storage: Storage) -> set[str]:
    """The runs whose access points a round of the reaper leaves."""
    clock = world.cloud.clock
    fleet = world.fleet(f"reaper at {clock.now}", **APART)
    reap(fleet, storage, grace_s=1e9, clock=lambda: clock.now, sleep=clock.step)
    aliases = {point["Alias"] for point in world.cloud.access_points.values()}
    found = world.cloud.instances.values()
    return {i.tags[RUN_TAG] for i in found if way_of(i).split("/")[2] in aliases}


def test_the_reaper_removes_those_of_runs_that_are_over(world: World) -> None:
    a_run(world, "over", failed(world))
    storage = a_run(world, "alive")
    assert runs_left(world, storage) == {"alive"}


def test_the_reaper_leaves_those_of_other_storages(world: World) -> None:
    storage = a_run(world, "over", failed(world))
    world.fleet(**APART).launch(request("t", run_id="theirs", storage_url=f"{URL}/team"))
    assert runs_left(world, storage) == {"theirs"}


def test_the_reaper_removes_that_of_a_run_whose_files_are_gone(world: World) -> None:
    storage = a_run(world, "alive")
    world.fleet(**APART).launch(request("t", run_id="gone", storage_url=URL))
    assert runs_left(world, storage) == {"alive"}


def test_one_that_a_kept_instance_uses_is_left_until_then(world: World) -> None:
    now = world.cloud.clock.now
    ended = e.Ended(at=now, attempt=1, cause="script_failed", ended_at=now,
                    kept_until=now + timedelta(hours=2))  # fmt: skip
    launching = e.Launching(at=now, attempt=1, token="t", market="spot", pool=G6_A, reason="r")
    storage = a_run(world, "kept", launching, ended, failed(world))
    assert runs_left(world, storage) == {"kept"}
    world.cloud.clock.step(2 * 3600 + 1)
    assert runs_left(world, storage) == set()


def test_what_is_not_the_stacks_is_left(world: World) -> None:
    storage = a_run(world, "over", failed(world))
    [(name, point)] = world.cloud.access_points.items()
    other = {**point, "Name": f"x-{name}"}
    world.cloud.access_points[f"x-{name}"] = other
    fleet = world.fleet("reaper", **APART)
    clock = world.cloud.clock
    reap(fleet, storage, grace_s=1e9, clock=lambda: clock.now, sleep=clock.step)
    assert list(world.cloud.access_points.values()) == [other]


def test_one_that_was_never_finished_is_removed_after_a_while(world: World) -> None:
    storage = a_run(world, "alive")
    the_point(world).pop("Policy")
    assert runs_left(world, storage) == {"alive"}, "somebody may be about to give it its policy"
    world.cloud.clock.step(3601)
    assert runs_left(world, storage) == set()


def test_a_policy_that_somebody_else_put_is_left(world: World) -> None:
    storage = a_run(world, "over", failed(world))
    world.cloud.clock.step(3601)
    for text in ("{}", '{"Statement":[{"Sid":"NoWritesElsewhere","NotResource":["arn:x"]}]}'):
        the_point(world)["Policy"] = text
        assert runs_left(world, storage) == {"over"}


def test_a_reaper_that_may_not_remove_them_says_so_and_ends_instances_all_the_same(
    world: World,
) -> None:
    storage = a_run(world, "over", failed(world))
    denied = client_error("AccessDenied", "no", "DeleteAccessPoint", status=403)
    world.faults.before("DeleteAccessPoint", denied)
    world.cloud.clock.step(120)
    clock = world.cloud.clock
    done = reap(
        world.fleet("reaper", **APART), storage, grace_s=60, clock=lambda: clock.now,
        sleep=clock.step,
    )  # fmt: skip
    assert len(done.orphans) == 1
    assert "separate_runs" in done.untidy


def test_a_run_that_is_over_is_dismissed_and_may_be_again(world: World) -> None:
    fleet = world.fleet(**APART)
    launch(fleet)
    fleet.dismiss(Stand(world).run)
    assert world.cloud.access_points == {}
    fleet.dismiss(Stand(world).run)
    launch(fleet, "token-2")
    let_in(fleet, world, "i-1")
    assert admitted(world.cloud, the_point(world)["Alias"]) == {"i-1"}


# -- the wire -------------------------------------------------------------------------------------


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    with mock_aws():
        yield Aws(Identity(region=REGION, environment=keys))


def test_the_calls_are_those_of_aws(wire: Aws) -> None:
    stack = Ec2Options.of(APART).separate_runs
    assert stack is not None
    ahead = [timedelta(0)]

    def clock() -> datetime:
        return datetime.now().astimezone() + ahead[0]

    points = AccessPoints(wire, stack, clock=clock)
    way = points.way(URL, "run-1")
    assert way == points.way(URL, "run-1")
    assert way.endswith("-s3alias/spotfirst")
    points.admit(URL, "run-1", spec(), [("i-1", REGION)])
    points.admit(URL, "run-1", spec(), [("i-1", REGION)])
    control = wire.client("s3control", REGION)
    [listed] = control.list_access_points(AccountId=ACCOUNT)["AccessPointList"]
    policy = control.get_access_point_policy(AccountId=ACCOUNT, Name=listed["Name"])["Policy"]
    assert "instance/i-1" in policy
    control.create_access_point(AccountId=ACCOUNT, Name="theirs", Bucket=BUCKET)
    control.create_access_point(
        AccountId=ACCOUNT, Name="spotfirst-0a1b2c3d-unfinished", Bucket=BUCKET
    )
    seen: list[dict[str, str]] = []
    assert points.tidy(lambda tags: bool(seen.append(dict(tags)))) == 0
    assert seen == [{RUN_TAG: "run-1", STORAGE_TAG: URL}]
    ahead[0] = timedelta(hours=2)
    assert points.tidy(lambda _: True) == 2
    points.dismiss(URL, "run-1")
    left = control.list_access_points(AccountId=ACCOUNT)["AccessPointList"]
    assert [each["Name"] for each in left] == ["theirs"]


def test_the_fake_and_moto_tell_the_same(wire: Aws, world: World) -> None:
    """But for one that is made twice: moto makes another, and AWS does not."""

    def story(control: Any) -> list[object]:
        def tell(method: Callable[..., Any], **more: Any) -> object:
            try:
                answer = method(AccountId=ACCOUNT, Name="x-1", **more)
            except Exception as error:  # noqa: BLE001 - its code is the story
                response: Any = getattr(error, "response", {})
                return response["Error"]["Code"]
            known = {"Alias", "Bucket", "Name", "CreationDate", "Policy"}
            return sorted(set(answer) & known)

        return [
            tell(control.get_access_point),
            tell(control.get_access_point_policy),
            tell(control.put_access_point_policy, Policy="{}"),
            tell(control.create_access_point, Bucket=BUCKET),
            tell(control.get_access_point),
            tell(control.get_access_point_policy),
            tell(control.put_access_point_policy, Policy="{}"),
            tell(control.get_access_point_policy),
            tell(control.delete_access_point),
            tell(control.get_access_point),
        ]

    assert story(wire.client("s3control", REGION)) == story(world.aws().client("s3control"))
