"""The EC2 fleet behind its protocol: on the simulated cloud, and with moto on the wire."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import boto3
import pytest
from botocore.exceptions import ReadTimeoutError
from moto import mock_aws

from spotfirst.errors import FleetUnavailable, InvalidSpec, LaunchRejected
from spotfirst.market import Market, Pool
from spotfirst.spec import TAG_NAMES, RunSpec
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow import submission
from spotfirst_airflow.fleets import Fleet, InstanceState
from spotfirst_airflow.fleets.ec2 import Ec2Fleet
from spotfirst_airflow.fleets.ec2.account import Account
from spotfirst_airflow.fleets.ec2.aws import Aws
from spotfirst_airflow.fleets.ec2.ending import Endings
from spotfirst_airflow.fleets.ec2.instances import instance_of
from spotfirst_airflow.fleets.ec2.prices import forget_spot_prices
from spotfirst_airflow.fleets.ec2.watching import Watcher
from spotfirst_airflow.keeping import Keeps
from spotfirst_airflow.reaping import Tidies
from tests.fakes.faults import client_error
from tests.fleets.ec2.launches import G5_A, G5_B, G6_A, G6_B, OPTIONS, World, request

NOW = datetime(2026, 11, 23, 12, tzinfo=timezone.utc)


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    def forget() -> None:
        Aws.forget_all()
        Account.forget_all()
        Endings.forget_all()
        Watcher.forget_all()
        forget_spot_prices()

    forget()
    yield
    forget()


@pytest.fixture
def world() -> World:
    return World()


def spec(**changes: Any) -> RunSpec:
    fields: dict[str, Any] = {
        "run_id": "run-1", "created_at": NOW, "command": ("python", "train.py"), "fleet": "ec2",
        "instance_types": ("g6.xlarge",),
    }  # fmt: skip
    return RunSpec(**(fields | changes))


def silence() -> Any:
    return ReadTimeoutError(endpoint_url="https://ec2", error="timed out")


def refusal(code: str, operation: str) -> Any:
    return client_error(code, "so it is", operation)


def described(**changes: Any) -> dict[str, Any]:
    """An entry of DescribeInstances."""
    return {
        "InstanceId": "i-0a", "InstanceType": "g6.xlarge", "LaunchTime": NOW,
        "State": {"Code": 16, "Name": "running"}, "InstanceLifecycle": "spot",
        "Placement": {"AvailabilityZone": "eu-central-1a"}, "StateTransitionReason": "",
        "Tags": [{"Key": "spotfirst:token", "Value": "token-1"}],
    } | changes  # fmt: skip


def read(entry: dict[str, Any]) -> Any:
    return instance_of(entry, price=lambda *_: (Decimal("0.4"), "a test's", Decimal(1)))


# -- what EC2 says of an instance -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("pending", InstanceState.PENDING),
        ("running", InstanceState.RUNNING),
        ("shutting-down", InstanceState.RUNNING),
        ("stopping", InstanceState.RUNNING),
        ("stopped", InstanceState.TERMINATED),
        ("terminated", InstanceState.TERMINATED),
    ],
)
def test_each_state_is_one_of_ours(name: str, state: InstanceState) -> None:
    assert read(described(State={"Name": name})).state is state


@pytest.mark.parametrize(
    ("code", "transition", "by"),
    [
        ("Server.SpotInstanceTermination", "Server.SpotInstanceTermination", "fleet"),
        ("Client.InstanceInitiatedShutdown", "", "itself"),
        ("Client.UserInitiatedShutdown", "User initiated (2026-11-23 12:30:00 GMT)", "request"),
        ("", "User initiated (2026-11-23 12:30:00 GMT)", "request"),
        ("Server.InternalError", "", "unknown"),
        ("", "", "unknown"),
    ],
)
def test_who_ended_an_instance_is_what_ec2_says(code: str, transition: str, by: str) -> None:
    reason = {"StateReason": {"Code": code, "Message": f"{code}: so it is"}} if code else {}
    entry = described(State={"Name": "terminated"}, StateTransitionReason=transition, **reason)
    assert read(entry).ended_by == by


def test_when_it_ended_is_read_from_the_reason() -> None:
    entry = described(
        State={"Name": "terminated"},
        StateTransitionReason="User initiated (2026-11-23 12:30:00 GMT)",
    )
    assert read(entry).ended_at == NOW + timedelta(minutes=30)
    assert read(described(State={"Name": "terminated"})).ended_at is None


def test_an_instance_that_is_shutting_down_has_not_ended() -> None:
    entry = described(
        State={"Name": "shutting-down"},
        StateReason={"Code": "Server.SpotInstanceTermination", "Message": ""},
    )
    assert read(entry).ended_by is None


def test_an_instance_that_could_not_start_says_why() -> None:
    entry = described(
        State={"Name": "terminated"},
        StateReason={"Code": "Client.InternalError", "Message": "Client error on launch"},
    )
    assert "Client error on launch" in read(entry).ended_why
    assert "KMS" in read(entry).ended_why


def test_a_stopped_instance_says_that_its_volume_still_costs() -> None:
    entry = described(
        State={"Name": "stopped"},
        StateReason={"Code": "Client.UserInitiatedShutdown", "Message": ""},
    )
    assert "volume still costs" in read(entry).ended_why


# -- the protocol ---------------------------------------------------------------------------------


def test_it_is_a_fleet_that_keeps_and_tidies(world: World) -> None:
    fleet = world.fleet()
    assert isinstance(fleet, Fleet)
    assert isinstance(fleet, Keeps)
    assert isinstance(fleet, Tidies)


def test_making_one_asks_aws_nothing() -> None:
    Ec2Fleet({}, environment={})


def test_settled_options_are_the_same_when_they_are_settled_again() -> None:
    settled = Ec2Fleet.settle(OPTIONS, now=NOW)
    assert settled == Ec2Fleet.settle(settled, now=NOW)


# -- check ----------------------------------------------------------------------------------------


def test_a_run_that_can_be_launched_passes(world: World) -> None:
    world.fleet().check(spec())


@pytest.mark.parametrize("option", ["subnets", "instance_profile"])
def test_what_a_launch_needs_is_named(world: World, option: str) -> None:
    with pytest.raises(InvalidSpec, match=f"{option}.*docs/ec2.md"):
        world.fleet(**{option: type(OPTIONS[option])()}).check(spec())


def test_types_or_requirements_must_be_given_and_not_both(world: World) -> None:
    with pytest.raises(InvalidSpec, match="needs instance_types"):
        world.fleet().check(spec(instance_types=()))
    with pytest.raises(InvalidSpec, match="leave one out"):
        world.fleet(requirements={"gpus": 1}).check(spec())
    world.fleet(requirements={"gpus": 1}).check(spec(instance_types=()))


def test_a_type_without_a_price_is_refused_with_the_way_to_get_one(world: World) -> None:
    with pytest.raises(InvalidSpec, match="spotfirst prices refresh"):
        world.fleet().check(spec(instance_types=("p5.48xlarge",)))


def test_a_type_that_none_of_the_zones_has_is_refused(world: World) -> None:
    for pool in (G6_A, G6_B):
        del world.cloud.pools[pool.instance_type, pool.zone]
    with pytest.raises(InvalidSpec, match="subnets in other zones"):
        world.fleet().check(spec())


def test_a_subnet_that_does_not_exist_is_refused(world: World) -> None:
    with pytest.raises(InvalidSpec, match="subnet-0c"):
        world.fleet(subnets=["subnet-0c"]).check(spec())


def test_a_permission_that_is_missing_is_refused_before_anything_is_launched(world: World) -> None:
    world.faults.before("DescribeSubnets", refusal("UnauthorizedOperation", "DescribeSubnets"))
    with pytest.raises(InvalidSpec, match="lacks a permission"):
        world.fleet().check(spec())


def test_an_aws_that_does_not_answer_refuses_nothing(world: World) -> None:
    world.faults.before("DescribeSubnets", silence())
    world.fleet().check(spec())


def test_a_tag_that_is_too_long_is_refused(world: World) -> None:
    with pytest.raises(InvalidSpec, match="the tag team has 300 characters"):
        world.fleet().check(spec(tags={"team": 300 * "x"}))


def test_ec2_can_show_every_tag_to_the_instance(world: World) -> None:
    # While InstanceMetadataTags is enabled, EC2 refuses keys with spaces or "/" ("View tags for your
    # EC2 instances using instance metadata" in the user guide). Other tags than these are refused
    # with the spec.
    world.fleet().launch(request(tags=dict.fromkeys(TAG_NAMES, "x")))
    [instance] = world.cloud.running()
    assert set(TAG_NAMES) < set(instance.tags)
    assert [key for key in instance.tags if not re.fullmatch(r"[\w+=.,:@-]+", key, re.ASCII)] == []


def test_wheels_are_put_into_the_storage_before_there_is_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[tuple[str, Sequence[str]]] = []

    class Offline(Ec2Fleet):
        def __init__(self, options: Any, **more: Any) -> None:
            def publish(storage: Storage, versions: Sequence[str]) -> str:
                told.append((storage.url, versions))
                msg = "no index"
                raise LaunchRejected(msg)

            super().__init__(options, publish=publish, **more)

        def check(self, spec: RunSpec) -> None:
            pass

    monkeypatch.setattr(submission, "fleet_class", lambda _: Offline)
    monkeypatch.setattr(
        submission, "load_fleet", lambda _, options, **more: Offline(options, **more)
    )
    storage = open_storage("memory://prepared")
    asked = submission.Request(command=("true",), fleet="ec2", fleet_options=OPTIONS)
    with pytest.raises(LaunchRejected, match="no index"):
        submission.attach(storage, "r", asked, owner="me", environment={})
    assert told == [("memory://prepared", ("3.12", "3.13"))]
    assert storage.list("runs") == []


# -- offers ---------------------------------------------------------------------------------------


def test_offers_are_the_pools_of_our_zones_on_both_markets(world: World) -> None:
    offers = world.fleet().offers(["g6.xlarge", "g5.xlarge"])
    assert {(o.market, o.pool) for o in offers} == {
        (market, pool) for market in Market for pool in (G6_A, G6_B, G5_A, G5_B)
    }
    for offer in offers:
        pool = world.cloud.pools[offer.pool.instance_type, offer.pool.zone]
        spot = offer.market is Market.SPOT
        truth = pool.spot_usd_h(world.cloud.clock.now) if spot else pool.on_demand_usd_h
        assert offer.price_usd_h == truth


def test_a_pool_that_is_not_there_is_not_offered(world: World) -> None:
    del world.cloud.pools["g6.xlarge", G6_A.zone]
    assert {o.pool for o in world.fleet().offers(["g6.xlarge"])} == {G6_B}


def test_a_type_without_an_on_demand_price_is_left_out(world: World) -> None:
    del world.table.regions["eu-central-1"].usd_h["g5.xlarge"]
    offers = world.fleet().offers(["g6.xlarge", "g5.xlarge"])
    assert {o.pool.instance_type for o in offers} == {"g6.xlarge"}
    with pytest.raises(FleetUnavailable, match="spotfirst prices refresh"):
        world.fleet().offers(["g5.xlarge"])


def test_without_types_the_requirements_choose_them(world: World) -> None:
    offers = world.fleet(requirements={"gpus": 1}).offers([])
    assert {o.pool.instance_type for o in offers} == {"g6.xlarge", "g5.xlarge"}


def test_asking_again_within_a_minute_asks_ec2_nothing(world: World) -> None:
    world.fleet().offers(["g6.xlarge"])
    before = dict(world.calls)
    world.fleet().offers(["g6.xlarge"])
    assert world.calls == before


def test_a_refusal_while_a_run_lives_is_waited_out(world: World) -> None:
    world.faults.before(
        "DescribeSpotPriceHistory", refusal("UnauthorizedOperation", "DescribeSpotPriceHistory")
    )
    with pytest.raises(FleetUnavailable, match="lacks a permission"):
        world.fleet().offers(["g6.xlarge"])


# -- what an instance is told ---------------------------------------------------------------------


def told(world: World) -> str:
    """The user data of the only template."""
    [template] = world.cloud.templates.values()
    return base64.b64decode(template["Data"]["UserData"]).decode()


def test_an_instance_is_told_its_run_and_where_its_files_are(world: World) -> None:
    world.fleet(python="/opt/python", python_versions=["3.11"]).launch(request())
    for what in ("run-1", "memory://bucket", "3.11", "/opt/python", "eu-central-1"):
        assert f'"{what}"' in told(world)


def test_no_credentials_reach_an_instance(world: World) -> None:
    secret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
    environment = {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE", "AWS_SECRET_ACCESS_KEY": secret}
    world.fleet(environment=environment).launch(request())
    [template] = world.cloud.templates.values()
    seen = f"{told(world)} {template} {world.cloud.fleets}"
    assert secret not in seen
    assert "AKIAIOSFODNN7EXAMPLE" not in seen


def test_a_failed_script_keeps_its_instance_only_when_asked_to(world: World) -> None:
    world.fleet().launch(request())
    assert '"keep_h": 0.0' in told(world)
    world.cloud.templates.clear()
    world.fleet(on_failure="keep", keep_h=2).launch(request("token-2"))
    assert '"keep_h": 2.0' in told(world)


def test_a_storage_with_a_password_in_its_url_is_refused(world: World) -> None:
    with pytest.raises(LaunchRejected, match="password"):
        world.fleet().launch(request(storage_url="memory://me:secret@bucket"))


# -- describe -------------------------------------------------------------------------------------


def test_what_was_launched_is_described_at_once_though_ec2_does_not_list_it() -> None:
    world = World(hidden_s=20.0)
    fleet = world.fleet()
    launched = fleet.launch(request())
    assert fleet.describe(["token-1", "unknown"]) == {"token-1": launched}


def test_many_runs_share_one_look(world: World) -> None:
    fleets = [world.fleet() for _ in range(5)]
    for n, fleet in enumerate(fleets):
        fleet.launch(request(f"token-{n}", run_id=f"run-{n}"))
    world.cloud.tick(10)
    before = world.calls["DescribeInstances"]
    for n, fleet in enumerate(fleets):
        assert fleet.describe([f"token-{n}"])
    assert world.calls["DescribeInstances"] == before + 1


def test_an_interruption_is_told_with_its_end(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request())
    [instance] = world.cloud.instances.values()
    world.cloud.tick(60)
    instance.interrupt(notice_s=None)
    world.cloud.tick(60)
    ended = fleet.describe(["token-1"])["token-1"]
    assert ended.state is InstanceState.TERMINATED
    assert ended.ended_by == "fleet"


def test_an_instance_that_is_heard_of_late_costs_what_it_did_at_its_launch() -> None:
    world = World(price_moves_s=200.0)
    world.fleet("a").launch(request())
    world.cloud.tick(1800)
    [truth] = world.cloud.instances.values()
    assert world.cloud.pools[truth.pool].spot_usd_h(world.cloud.clock.now) != truth.price_usd_h
    fleet = world.fleet("b")
    assert fleet.describe(["token-1"])["token-1"].price_usd_h == truth.price_usd_h
    asked = world.calls["DescribeSpotPriceHistory"]
    world.cloud.tick(300)
    assert fleet.describe(["token-1"])["token-1"].price_usd_h == truth.price_usd_h
    assert world.calls["DescribeSpotPriceHistory"] == asked  # it does not change any more


def test_what_many_instances_cost_is_one_call(world: World) -> None:
    fleet = world.fleet()
    for number in range(6):
        fleet.launch(request(f"token-{number}", others=()))
    world.cloud.tick(600)
    before = world.calls["DescribeSpotPriceHistory"]
    assert len(world.fleet("b").owned()) == 6
    assert world.calls["DescribeSpotPriceHistory"] - before == 1


def test_a_price_that_nobody_knows_does_not_hide_an_instance(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request())
    world.cloud.tick(100)
    world.faults.before("DescribeSpotPriceHistory", silence())
    instance = fleet.describe(["token-1"])["token-1"]
    assert instance.price_usd_h == instance.on_demand_usd_h
    assert "spot price is not known" in instance.price_source


def test_owned_is_what_lives_with_the_way_to_its_owner(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request("token-1"))
    fleet.launch(request("token-2", attempt=2))
    fleet.terminate(["token-1"])
    world.cloud.tick(30)
    [left] = world.fleet("reaper").owned()
    assert left.token == "token-2"
    assert left.tags["spotfirst:run"] == "run-1"
    assert left.tags["spotfirst:storage"] == "memory://bucket"


def test_a_stopped_instance_is_still_owned_and_can_be_ended(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request(market=Market.ON_DEMAND))
    [instance] = world.cloud.instances.values()
    world.cloud.tick(10)
    instance.stop()
    world.cloud.tick(60)
    assert [each.token for each in fleet.owned()] == ["token-1"]
    fleet.terminate(["token-1"])
    assert world.calls["TerminateInstances"] == 1


# -- terminate ------------------------------------------------------------------------------------


def test_terminate_ends_the_instances_of_these_tokens_only(world: World) -> None:
    fleet = world.fleet()
    for n in range(3):
        fleet.launch(request(f"token-{n}"))
    fleet.terminate(["token-0", "token-2"])
    assert [i.tags["spotfirst:token"] for i in world.cloud.running()] == ["token-1"]


def test_terminate_finds_what_was_launched_elsewhere_a_moment_ago(world: World) -> None:
    fleet = world.fleet("a")
    assert fleet.owned() == []  # so that its view is fresh, and lacks what follows
    world.fleet("b").launch(request())
    fleet.terminate(["token-1"])
    assert not world.cloud.running()


def test_terminate_can_be_repeated_and_does_not_hammer(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request())
    for _ in range(4):
        fleet.terminate(["token-1", "unknown"])
        world.cloud.tick(0.5)
    assert world.calls["TerminateInstances"] == 1
    assert not world.cloud.running()


def test_a_lost_answer_to_terminate_is_repaired_by_repeating(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request())
    world.faults.before("TerminateInstances", silence())
    with pytest.raises(FleetUnavailable):
        fleet.terminate(["token-1"])
    fleet.terminate(["token-1"])
    assert not world.cloud.running()


def test_one_instance_that_ec2_has_forgotten_does_not_save_the_others(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request("token-1"))
    gone = fleet.launch(request("token-2")).instance_id
    del world.cloud.instances[gone]
    fleet.terminate(["token-1", "token-2"])
    assert not world.cloud.running()


def test_what_turns_up_after_its_token_was_ended_is_ended() -> None:
    world = World(hidden_s=30.0)
    world.fleet("b").launch(request())
    fleet = world.fleet("a")
    fleet.terminate(["token-1"])
    assert world.cloud.running()  # EC2 does not list it yet
    world.cloud.tick(70)
    fleet.describe([])
    assert not world.cloud.running()


@pytest.mark.parametrize("code", ["UnauthorizedOperation", "RequestLimitExceeded"])
def test_what_turned_up_and_cannot_be_ended_does_not_hide_other_instances(code: str) -> None:
    world = World(hidden_s=30.0)
    world.fleet("b").launch(request())
    fleet = world.fleet("a")
    fleet.terminate(["token-1"])
    fleet.launch(request("token-2", run_id="run-2"))
    world.cloud.tick(70)
    world.faults.before("TerminateInstances", refusal(code, "TerminateInstances"))
    assert set(fleet.describe(["token-2"])) == {"token-2"}
    assert len(world.cloud.running()) == 2
    assert len(fleet.owned()) == 2  # by now it is asked again
    assert len(world.cloud.running()) == 1


def test_a_token_that_was_ended_is_not_launched_any_more(world: World) -> None:
    fleet = world.fleet()
    fleet.terminate(["token-1"])
    with pytest.raises(LaunchRejected, match="ended before"):
        fleet.launch(request())
    assert not world.cloud.instances


def test_a_launch_that_was_under_way_when_its_token_was_ended_is_ended(world: World) -> None:
    fleet = world.fleet()
    world.faults.before("CreateFleet", lambda: world.fleet().terminate(["token-1"]))
    fleet.launch(request())
    assert not world.cloud.running()


def test_an_instance_that_may_not_be_terminated_is_no_reason_to_give_up(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request())
    refused = refusal("UnauthorizedOperation", "TerminateInstances")
    world.faults.before("TerminateInstances", refused)
    with pytest.raises(FleetUnavailable, match="cannot be terminated"):
        fleet.terminate(["token-1"])


# -- keep, tidy -----------------------------------------------------------------------------------


def test_an_instance_is_kept_by_a_tag_and_the_way_in_is_told(world: World) -> None:
    fleet = world.fleet(on_failure="keep", keep_h=2)
    instance = fleet.launch(request())
    until = NOW + timedelta(hours=2)
    assert fleet.keep_s == 7200
    shell = fleet.keep("token-1", until=until)
    assert instance.instance_id in shell
    assert shell.startswith("aws ssm start-session")
    [owned] = fleet.owned()
    assert datetime.fromisoformat(owned.tags["spotfirst:keep-until"]) == until


def test_a_lost_answer_to_the_mark_is_repaired_by_repeating(world: World) -> None:
    fleet = world.fleet(on_failure="keep", keep_h=2)
    fleet.launch(request())
    world.faults.after("CreateTags", silence())
    with pytest.raises(FleetUnavailable):
        fleet.keep("token-1", until=NOW)
    fleet.keep("token-1", until=NOW)
    [owned] = fleet.owned()
    assert datetime.fromisoformat(owned.tags["spotfirst:keep-until"]) == NOW


def test_what_is_gone_cannot_be_kept(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request())
    fleet.terminate(["token-1"])
    with pytest.raises(LaunchRejected, match="gone"):
        fleet.keep("token-1", until=NOW)


def test_templates_of_runs_that_are_over_are_tidied_away(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request())
    assert fleet.tidy(lambda tags: tags["spotfirst:run"] == "run-1") == 1
    assert not world.cloud.templates


def test_a_lost_answer_to_the_deletion_of_a_template_is_repaired_by_repeating(world: World) -> None:
    fleet = world.fleet()
    for run in ("run-1", "run-2"):
        fleet.launch(request(run, run_id=run))
    world.faults.after("DeleteLaunchTemplate", silence())
    with pytest.raises(FleetUnavailable):
        fleet.tidy(lambda _: True)
    assert fleet.tidy(lambda _: True) == 1
    assert not world.cloud.templates
    fleet.launch(request("token-3", run_id="run-1"))  # and is made again when it is needed
    assert len(world.cloud.templates) == 1


# -- on the wire ----------------------------------------------------------------------------------


@pytest.fixture
def moto_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Options for moto's region, with its subnets and an image of its own."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        ec2 = boto3.client("ec2", region_name="us-east-1")
        subnets = ec2.describe_subnets()["Subnets"]
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        yield OPTIONS | {
            "region": "us-east-1",
            "subnets": [s["SubnetId"] for s in subnets if s["AvailabilityZone"][-1] in "ab"],
            "security_groups": [ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]],
            "ami": image,
        }


@pytest.mark.parametrize("market", list(Market), ids=str)
def test_every_call_is_one_that_aws_takes(moto_options: dict[str, Any], market: Market) -> None:
    environment = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    fleet = Ec2Fleet(
        moto_options, environment=environment, publish=lambda storage, versions: "wheels-cp312"
    )
    fleet.check(spec(instance_types=("g4dn.xlarge",)))
    pools = {o.pool for o in fleet.offers(["g4dn.xlarge"])}
    assert pools == {Pool(instance_type="g4dn.xlarge", zone=f"us-east-1{z}") for z in "ab"}
    first, *others = sorted(pools, key=str)

    asked = request(market=market, pool=first, others=tuple(others))
    launched = fleet.launch(asked)
    assert launched.pool in pools
    assert launched.market is market
    assert launched.price_usd_h > 0

    ec2 = boto3.client("ec2", region_name="us-east-1")
    [reservation] = ec2.describe_instances()["Reservations"]
    [instance] = reservation["Instances"]
    assert instance["InstanceId"] == launched.instance_id
    tags = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
    assert tags["spotfirst:token"] == "token-1"
    assert tags["spotfirst:attempt"] == "1"
    assert tags["team"] == "search"

    [template] = ec2.describe_launch_templates()["LaunchTemplates"]
    [version] = ec2.describe_launch_template_versions(
        LaunchTemplateId=template["LaunchTemplateId"]
    )["LaunchTemplateVersions"]
    data = version["LaunchTemplateData"]
    assert base64.b64decode(data["UserData"]).startswith(b"#!/bin/bash")
    assert data["MetadataOptions"]["HttpTokens"] == "required"
    assert data["InstanceInitiatedShutdownBehavior"] == "terminate"

    again = Ec2Fleet(moto_options, environment=environment, publish=lambda *_: "wheels-cp312")
    assert again.launch(asked).instance_id == launched.instance_id
    assert again.describe(["token-1"])["token-1"].state is InstanceState.RUNNING
    assert [each.token for each in again.owned()] == ["token-1"]
    assert again.keep("token-1", until=NOW)
    again.terminate(["token-1"])
    ended = again.describe(["token-1"])["token-1"]
    assert (ended.state, ended.ended_by) == (InstanceState.TERMINATED, "request")
    assert again.owned() == []
    assert again.tidy(lambda tags: tags["spotfirst:run"] == "run-1") == 1


def test_a_public_parameter_is_resolved(moto_options: dict[str, Any]) -> None:
    ssm = boto3.client("ssm", region_name="us-east-1")
    ssm.put_parameter(Name="/images/mine", Value=moto_options["ami"], Type="String")
    fleet = Ec2Fleet(moto_options | {"ami": "ssm:/images/mine"}, environment={})
    fleet.check(spec(instance_types=("g4dn.xlarge",)))
    missing = Ec2Fleet(moto_options | {"ami": "ssm:/images/none"}, environment={})
    with pytest.raises(InvalidSpec, match="names no public parameter"):
        missing.check(spec(instance_types=("g4dn.xlarge",)))
