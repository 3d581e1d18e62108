"""What an account has is asked once, and asked again when that helps."""

from __future__ import annotations

from typing import Any

import pytest

from spotfirst.errors import FleetUnavailable, InvalidSpec
from spotfirst.market import Pool
from spotfirst_airflow.fleets.ec2.account import IMAGE_TTL_S, Account
from tests.fakes.faults import client_error
from tests.fleets.ec2.launches import G6_A, REGION, World


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def account(world: World) -> Account:
    aws: Any = world.aws()
    return Account(aws, monotonic=world.cloud.clock.monotonic)


def test_the_zone_of_each_subnet_is_asked_once(world: World, account: Account) -> None:
    for _ in range(2):
        assert account.subnets(["subnet-0a", "subnet-0b"]) == {
            f"{REGION}a": "subnet-0a", f"{REGION}b": "subnet-0b",
        }  # fmt: skip
    assert world.calls == {"DescribeSubnets": 1}


def test_of_two_subnets_in_a_zone_the_first_is_used(world: World, account: Account) -> None:
    world.cloud.subnets["subnet-0c"] = f"{REGION}a"
    assert account.subnets(["subnet-0c", "subnet-0a"]) == {f"{REGION}a": "subnet-0c"}


def test_the_image_behind_a_parameter_is_looked_up_once_a_day(
    world: World, account: Account
) -> None:
    world.cloud.default_image = "ami-00000001"
    assert account.image("ssm:/aws/image").image_id == "ami-00000001"
    world.cloud.default_image = "ami-00000002"
    assert account.image("ssm:/aws/image").image_id == "ami-00000001"
    world.cloud.clock.step(IMAGE_TTL_S + 1)
    assert account.image("ssm:/aws/image").image_id == "ami-00000002"


def test_an_image_tells_its_root_device(account: Account) -> None:
    image = account.image("ami-0a")
    assert (image.image_id, image.root_device, image.root_gb) == ("ami-0a", "/dev/sda1", 75)


def test_a_wrong_option_is_named(world: World, account: Account) -> None:
    missing = client_error("InvalidAMIID.NotFound", "does not exist", "DescribeImages")
    world.faults.before("DescribeImages", missing)
    with pytest.raises(InvalidSpec, match="fleet option ami is 'ami-0b'"):
        account.image("ami-0b")
    with pytest.raises(InvalidSpec, match="fleet option subnets"):
        account.subnets(["subnet-0c"])


def test_a_failure_is_not_remembered(world: World, account: Account) -> None:
    busy = client_error("RequestLimitExceeded", "", "DescribeSubnets")
    world.faults.before("DescribeSubnets", busy)
    with pytest.raises(FleetUnavailable):
        account.subnets(["subnet-0a"])
    assert account.subnets(["subnet-0a"])


def test_only_new_types_are_asked_for(world: World, account: Account) -> None:
    zones = [f"{REGION}a"]
    assert account.offered(["g6.xlarge"], zones) == [G6_A]
    assert account.offered(["g6.xlarge"], zones) == [G6_A]
    assert world.calls == {"DescribeInstanceTypeOfferings": 1}
    g5_a = Pool(instance_type="g5.xlarge", zone=zones[0])
    assert account.offered(["g6.xlarge", "g5.xlarge", "x9.huge"], zones) == [G6_A, g5_a]
    assert world.calls == {"DescribeInstanceTypeOfferings": 2}
