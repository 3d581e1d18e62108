"""A token makes one instance, whatever is lost between us and AWS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from botocore.exceptions import ConnectTimeoutError, ReadTimeoutError

from spotfirst.errors import FleetUnavailable, LaunchRejected, NoCapacity, QuotaReached
from spotfirst.market import Market, Pool
from spotfirst_airflow.fleets import InstanceState
from spotfirst_airflow.fleets.ec2.account import Account
from spotfirst_airflow.fleets.ec2.ending import Endings
from spotfirst_airflow.fleets.ec2.prices import forget_spot_prices
from spotfirst_airflow.fleets.ec2.watching import Watcher
from tests.fakes.faults import client_error
from tests.fleets.ec2.launches import G5_A, G6_A, G6_B, REGION, World, request


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    def forget() -> None:
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


def silence() -> Any:
    return ReadTimeoutError(endpoint_url="https://ec2", error="timed out")


def error(code: str) -> Any:
    return client_error(code, "so it is", "CreateFleet")


def fleet_call(world: World) -> dict[str, Any]:
    """What the last CreateFleet asked for."""
    import json

    return dict(json.loads(list(world.cloud.fleets.values())[-1][0]))


def lacks(world: World, *pools: Pool) -> None:
    """These pools sell nothing."""
    for pool in pools:
        del world.cloud.pools[pool.instance_type, pool.zone]


# -- a launch -------------------------------------------------------------------------------------


def test_an_instance_is_launched_and_described(world: World) -> None:
    instance = world.fleet().launch(request())
    [launched] = world.cloud.instances.values()
    assert instance.instance_id == launched.instance_id
    assert instance.token == "token-1"
    assert instance.state is InstanceState.PENDING
    assert instance.started_at == launched.launched_at
    assert (instance.pool.instance_type, instance.pool.zone) == launched.pool
    assert instance.price_usd_h == launched.price_usd_h
    assert instance.on_demand_usd_h == world.cloud.types[launched.pool[0]]


def test_all_pools_are_asked_for_in_one_call(world: World) -> None:
    world.fleet().launch(request())
    asked = fleet_call(world)
    [config] = asked["LaunchTemplateConfigs"]
    assert config["Overrides"] == [
        {"InstanceType": "g6.xlarge", "SubnetId": "subnet-0a"},
        {"InstanceType": "g6.xlarge", "SubnetId": "subnet-0b"},
        {"InstanceType": "g5.xlarge", "SubnetId": "subnet-0a"},
    ]
    assert asked["Type"] == "instant"
    assert asked["ClientToken"] == "token-1"
    assert asked["SpotOptions"]["AllocationStrategy"] == "price-capacity-optimized"


def test_on_demand_takes_the_same_path(world: World) -> None:
    instance = world.fleet().launch(request(market=Market.ON_DEMAND))
    asked = fleet_call(world)
    assert instance.market is Market.ON_DEMAND
    assert asked["OnDemandOptions"]["AllocationStrategy"] == "lowest-price"
    assert asked["TargetCapacitySpecification"]["DefaultTargetCapacityType"] == "on-demand"
    assert "SpotOptions" not in asked


def test_the_instance_carries_the_way_back_to_its_owner(world: World) -> None:
    world.fleet().launch(request())
    [launched] = world.cloud.instances.values()
    expected = {
        "spotfirst:run": "run-1",
        "spotfirst:attempt": "1",
        "spotfirst:storage": "memory://bucket",
        "spotfirst:token": "token-1",
        "team": "search",
    }
    assert expected.items() <= launched.tags.items()


def test_a_launch_makes_at_most_four_calls(world: World) -> None:
    fleet = world.fleet()
    fleet.offers(["g6.xlarge", "g5.xlarge"])
    fleet.launch(request("warm"))
    before = sum(world.calls.values())
    fleet.launch(request(run_id="run-2"))
    assert sum(world.calls.values()) - before == 4
    before = sum(world.calls.values())
    fleet.launch(request("token-2", run_id="run-2", attempt=2))
    assert sum(world.calls.values()) - before == 3


def test_attempts_of_a_run_share_a_template(world: World) -> None:
    world.fleet("a").launch(request("token-1", attempt=1))
    world.fleet("b").launch(request("token-2", attempt=2))
    assert len(world.cloud.templates) == 1
    assert world.calls["CreateLaunchTemplate"] == 2  # the second found that it is there


# -- exactly once ---------------------------------------------------------------------------------


def test_a_repeat_returns_the_same_instance(world: World) -> None:
    fleet = world.fleet()
    first = fleet.launch(request())
    assert fleet.launch(request()).instance_id == first.instance_id
    assert world.calls["CreateFleet"] == 1


def test_another_process_finds_the_instance_by_its_token(world: World) -> None:
    first = world.fleet("a").launch(request())
    again = world.fleet("b", ami="ami-0b").launch(request())
    assert again.instance_id == first.instance_id


def test_a_token_whose_instance_has_ended_gives_the_ended_one(world: World) -> None:
    fleet = world.fleet()
    first = fleet.launch(request())
    fleet.terminate(["token-1"])
    world.cloud.tick(30)
    again = world.fleet("b").launch(request())
    assert again.instance_id == first.instance_id
    assert again.state is InstanceState.TERMINATED
    assert again.ended_by == "request"


def test_a_lost_answer_is_found_by_the_tag(world: World) -> None:
    world.faults.after("CreateFleet", silence())
    instance = world.fleet().launch(request())
    assert [instance.instance_id] == list(world.cloud.instances)
    assert world.calls["CreateFleet"] == 1


def test_a_lost_answer_before_the_tag_is_seen_is_asked_for_again(world: World) -> None:
    slow = World(hidden_s=20.0)
    slow.faults.after("CreateFleet", silence())
    instance = slow.fleet().launch(request())
    assert [instance.instance_id] == list(slow.cloud.instances)
    assert slow.calls["CreateFleet"] == 2


def test_a_call_that_never_arrived_is_made_again(world: World) -> None:
    world.faults.before("CreateFleet", ConnectTimeoutError(endpoint_url="https://ec2"))
    assert world.fleet().launch(request()).instance_id in world.cloud.instances


def test_after_two_silences_the_launch_may_have_happened(world: World) -> None:
    world.faults.after("CreateFleet", silence())
    world.faults.after("CreateFleet", silence())
    slow = world.fleet()
    world.faults.before("DescribeInstances", lambda: None)
    world.faults.after("DescribeInstances", silence())
    with pytest.raises(FleetUnavailable):
        slow.launch(request())
    assert len(world.cloud.instances) == 1
    assert slow.launch(request()).instance_id in world.cloud.instances
    assert len(world.cloud.instances) == 1


def test_two_processes_at_once_get_the_same_instance(world: World) -> None:
    world.cloud.weather.hidden_s = 20.0
    other: list[str] = []

    def meanwhile() -> None:
        other.append(world.fleet("b").launch(request()).instance_id)

    world.faults.before("CreateFleet", meanwhile)
    assert world.fleet("a").launch(request()).instance_id == other[0]
    assert len(world.cloud.instances) == 1


def test_other_parameters_with_the_same_token_launch_nothing_more() -> None:
    world = World(hidden_s=20.0)
    world.fleet("a").launch(request())
    later = world.fleet("b", ami="ami-0b")
    with pytest.raises(FleetUnavailable, match="earlier launch"):
        later.launch(request())
    world.cloud.tick(60)
    assert [later.launch(request()).instance_id] == list(world.cloud.instances)


def test_an_earlier_launch_that_came_to_nothing_is_given_up_in_the_end(world: World) -> None:
    pools = dict(world.cloud.pools)
    lacks(world, G6_A, G6_B, G5_A)
    with pytest.raises(NoCapacity):
        world.fleet("a").launch(request())
    world.cloud.pools |= pools
    later = world.fleet("b", ami="ami-0b")
    with pytest.raises(FleetUnavailable):
        later.launch(request())
    world.cloud.tick(130)
    with pytest.raises(NoCapacity):
        later.launch(request())
    assert not world.cloud.instances


def test_an_earlier_launch_is_heard_of_after_a_silence() -> None:
    """Not a refusal: the run would fail, and nobody own what the earlier call has launched."""
    world = World(hidden_s=20.0)
    world.fleet("a").launch(request())
    later = world.fleet("b", ami="ami-0b")
    world.faults.before("CreateFleet", silence())
    with pytest.raises(FleetUnavailable, match="earlier launch"):
        later.launch(request())
    world.cloud.tick(60)
    assert [later.launch(request()).instance_id] == list(world.cloud.instances)


def test_an_earlier_launch_is_heard_of_after_its_template_is_made_anew() -> None:
    world = World(hidden_s=20.0)
    world.fleet("a").launch(request())
    later = world.fleet("b", ami="ami-0b")
    world.faults.before("CreateFleet", error("InvalidLaunchTemplateName.NotFoundException"))
    world.faults.after("CreateLaunchTemplate", world.cloud.templates.clear)
    with pytest.raises(FleetUnavailable, match="earlier launch"):
        later.launch(request())
    assert len(world.cloud.instances) == 1


def test_a_refusal_after_a_silence_proves_nothing() -> None:
    world = World(hidden_s=20.0)
    fleet = world.fleet()
    world.faults.after("CreateFleet", silence())
    world.faults.before("CreateFleet", error("UnauthorizedOperation"))
    with pytest.raises(FleetUnavailable):
        fleet.launch(request())
    world.cloud.tick(60)
    assert [fleet.launch(request()).instance_id] == list(world.cloud.instances)


def test_a_template_that_was_deleted_before_a_silence_is_made_again(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request("token-1"))
    world.cloud.templates.clear()
    world.faults.before("CreateFleet", silence())
    fleet.launch(request("token-2", attempt=2))
    assert len(world.cloud.instances) == 2


def test_an_instance_that_is_not_listed_yet_is_told_as_far_as_it_is_known() -> None:
    world = World(hidden_s=20.0)
    instance = world.fleet().launch(request())
    [launched] = world.cloud.instances.values()
    assert instance.instance_id == launched.instance_id
    assert (instance.pool.instance_type, instance.pool.zone) == launched.pool
    assert instance.started_at == launched.launched_at
    assert instance.token == "token-1"
    assert instance.tags["spotfirst:run"] == "run-1"


# -- errors ---------------------------------------------------------------------------------------


def test_no_capacity_names_the_pools_that_had_none(world: World) -> None:
    lacks(world, G6_A, G6_B, G5_A)
    with pytest.raises(NoCapacity, match="Unsupported") as caught:
        world.fleet().launch(request())
    assert set(caught.value.pools) == {G6_A, G6_B, G5_A}


def test_one_pool_with_capacity_is_enough(world: World) -> None:
    lacks(world, G6_A, G6_B)
    assert world.fleet().launch(request()).pool == G5_A


@pytest.mark.parametrize("has_one", [False, True])
@pytest.mark.parametrize(
    ("code", "quota"),
    [("MaxSpotInstanceCountExceeded", "L-3819A6DF"), ("VcpuLimitExceeded", "L-DB2E81BA")],
)
def test_a_quota_is_no_capacity_and_named_with_the_way_to_raise_it(
    world: World, code: str, quota: str, has_one: bool
) -> None:
    fleet = world.fleet()
    if has_one:
        fleet.launch(request("token-0"))
    world.cloud.launch_error = (code, "exceeded")
    with pytest.raises(QuotaReached, match=f"{quota}.*Service Quotas") as caught:
        fleet.launch(request())
    assert isinstance(caught.value, NoCapacity)
    assert set(caught.value.pools) == {G6_A, G6_B, G5_A}


def test_a_missing_permission_fails_at_once(world: World) -> None:
    world.faults.before("CreateFleet", error("UnauthorizedOperation"))
    with pytest.raises(LaunchRejected, match="lacks a permission"):
        world.fleet().launch(request())


def test_throttling_is_not_answered_with_another_call(world: World) -> None:
    world.faults.before("CreateFleet", error("RequestLimitExceeded"))
    with pytest.raises(FleetUnavailable):
        world.fleet().launch(request())
    assert world.calls["CreateFleet"] == 1


def test_an_answer_without_an_instance_uses_up_the_token(world: World) -> None:
    """EC2 answers the same for it for ever, so it must not be tried again."""
    world.cloud.launch_error = ("RequestLimitExceeded", "Request limit exceeded.")
    with pytest.raises(NoCapacity):
        world.fleet().launch(request())


def test_a_template_that_was_deleted_is_made_again(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request("token-1"))
    world.cloud.templates.clear()
    fleet.launch(request("token-2", attempt=2))
    assert len(world.cloud.instances) == 2


def test_a_public_image_that_was_replaced_is_looked_up_again(world: World) -> None:
    world.cloud.default_image = "ami-00000001"
    fleet = world.fleet(ami="ssm:/aws/image")
    world.cloud.launch_error = ("InvalidAMIID.NotFound", "The image id does not exist")
    with pytest.raises(NoCapacity):
        fleet.launch(request("token-1"))
    world.cloud.launch_error = None
    world.cloud.default_image = "ami-00000002"
    fleet.launch(request("token-2"))
    [launched] = world.cloud.instances.values()
    assert launched.template["ImageId"] == "ami-00000002"


def test_an_image_that_was_given_and_is_gone_fails_at_once(world: World) -> None:
    world.cloud.launch_error = ("InvalidAMIID.NotFound", "The image id does not exist")
    with pytest.raises(LaunchRejected, match="InvalidAMIID"):
        world.fleet().launch(request())


def test_a_pool_in_a_zone_without_a_subnet_is_left_out(world: World) -> None:
    elsewhere = Pool(instance_type="g6.xlarge", zone=f"{REGION}c")
    world.fleet().launch(request(others=(elsewhere,)))
    [config] = fleet_call(world)["LaunchTemplateConfigs"]
    assert [each["SubnetId"] for each in config["Overrides"]] == ["subnet-0a"]
    with pytest.raises(LaunchRejected, match="subnets"):
        world.fleet().launch(request("token-2", pool=elsewhere, others=()))


def test_a_token_that_ec2_would_not_take_is_refused(world: World) -> None:
    for token in ("", "x" * 65, "grün", "a*"):
        with pytest.raises(LaunchRejected, match="token"):
            world.fleet().launch(request(token))
    assert not world.calls
