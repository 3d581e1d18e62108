"""One fleet in several regions: each call goes where it belongs, and one outage is not everyone's."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pytest

from spotfirst.errors import FleetUnavailable, InvalidSpec, LaunchRejected, NoCapacity
from spotfirst_airflow.fleets import InstanceState
from spotfirst_airflow.fleets.base import KEEP_TAG, fleet_class
from spotfirst_airflow.fleets.ec2 import Ec2Regions
from spotfirst_airflow.fleets.ec2.egress import UNKNOWN_USD_GB, egress_usd_gb
from spotfirst_airflow.fleets.ec2.options import Ec2Options
from tests.fakes.faults import lost_by_aws
from tests.fakes.fleet import forget_processes
from tests.fleets.ec2.launches import request
from tests.fleets.ec2.tworegions import (
    HERE,
    HERE_A,
    HERE_B,
    OPTIONS,
    THERE,
    THERE_A,
    THERE_B,
    TYPE,
    Regions,
)


@pytest.fixture
def aws() -> Iterator[Regions]:
    forget_processes()
    yield Regions()
    forget_processes()


def down(aws: Regions, region: str, *operations: str) -> None:
    """From now on these calls of a region are not answered."""
    planned = aws.faults[region].around

    def around(what: str, apply: Any, **more: Any) -> Any:
        if not operations or what in operations:
            raise FleetUnavailable(f"{region} does not answer")
        return planned(what, apply, **more)

    aws.faults[region].around = around  # type: ignore[method-assign]


def lost(operation: str) -> Exception:
    error: Exception = lost_by_aws(operation, random.Random(0))
    return error


def elsewhere(**changes: Any) -> dict[str, Any]:
    [there] = OPTIONS["elsewhere"]
    return OPTIONS | {"elsewhere": [there | changes]}


# -- offers -------------------------------------------------------------------------------------


def test_offers_are_those_of_all_regions_with_the_way_to_the_storage(aws: Regions) -> None:
    offers = aws.fleet().offers([TYPE])
    way = {(o.pool, o.market): (o.read_usd_gb, o.write_usd_gb) for o in offers}
    assert {pool for pool, _ in way} == {HERE_A, HERE_B, THERE_A, THERE_B}
    for (pool, _), prices in way.items():
        assert prices == ((0, 0) if HERE in pool.zone else (Decimal("0.02"), Decimal("0.02")))


def test_the_storage_may_be_in_any_region(aws: Regions) -> None:
    offers = aws.fleet(storage_region=THERE, egress_usd_gb=0.5).offers([TYPE])
    way = {offer.pool.zone[:-1]: offer.read_usd_gb for offer in offers}
    assert way == {HERE: Decimal("0.5"), THERE: 0}


def test_a_region_without_an_answer_leaves_the_offers_of_the_others(aws: Regions) -> None:
    fleet = aws.fleet()
    down(aws, THERE)
    assert {offer.pool for offer in fleet.offers([TYPE])} == {HERE_A, HERE_B}
    asked = sum(aws.clouds[THERE].calls.values())
    aws.tick(30)
    fleet.offers([TYPE])
    assert sum(aws.clouds[THERE].calls.values()) == asked, "it is left alone for a while"
    down(aws, HERE)
    forget_processes()
    with pytest.raises(FleetUnavailable, match=f"{HERE}: .*; {THERE}: "):
        aws.fleet("other").offers([TYPE])


def test_a_region_that_answers_again_is_back(aws: Regions) -> None:
    fleet = aws.fleet()
    aws.faults[THERE].before("DescribeSubnets", FleetUnavailable("not now"))
    assert len(fleet.offers([TYPE])) == 4
    aws.tick(61)
    assert len(fleet.offers([TYPE])) == 8


# -- launches -----------------------------------------------------------------------------------


def test_a_launch_goes_to_the_region_of_its_pool_and_no_other(aws: Regions) -> None:
    fleet = aws.fleet()
    instance = fleet.launch(request(pool=THERE_A, others=(HERE_A, THERE_B)))
    running = aws.running()
    assert [len(running[HERE]), len(running[THERE])] == [0, 1]
    assert (instance.read_usd_gb, instance.write_usd_gb) == (Decimal("0.02"), Decimal("0.02"))
    assert "CreateFleet" not in aws.clouds[HERE].calls


def test_an_instance_elsewhere_is_told_where_its_storage_is(aws: Regions) -> None:
    aws.fleet().launch(request(pool=THERE_A, others=()))
    [template] = aws.clouds[THERE].templates.values()
    script = base64.b64decode(template["Data"]["UserData"]).decode()
    assert f'"region": "{HERE}"' in script
    assert template["Data"]["SecurityGroupIds"] == ["sg-0b"]


def test_who_has_no_capacity_speaks_for_the_pools_of_its_region_alone(aws: Regions) -> None:
    aws.close(THERE)
    with pytest.raises(NoCapacity) as refused:
        aws.fleet().launch(request(pool=THERE_A, others=(HERE_A, THERE_B)))
    assert set(refused.value.pools) == {THERE_A, THERE_B}


def test_a_lost_answer_of_a_launch_is_settled_where_it_was_made(aws: Regions) -> None:
    wanted = request(pool=THERE_A, others=(HERE_A,))
    for _ in range(2):
        aws.faults[THERE].after("CreateFleet", lost("CreateFleet"))
    aws.faults[THERE].after("DescribeInstances", lost("DescribeInstances"))
    launched = None
    for process in ("first", "second", "third"):
        try:
            launched = aws.fleet(process).launch(wanted)
        except FleetUnavailable:
            aws.tick(5)
    assert launched is not None
    assert [len(each) for each in aws.running().values()] == [0, 1]
    assert aws.fleet("fourth").describe([wanted.token])[wanted.token].instance_id == (
        launched.instance_id
    )


def test_one_region_down_does_not_stop_launches_in_the_other(aws: Regions) -> None:
    fleet = aws.fleet()
    down(aws, THERE)
    instance = fleet.launch(request(pool=HERE_A, others=(THERE_A,)))
    assert fleet.describe([instance.token])[instance.token].pool == HERE_A
    fleet.terminate([instance.token])
    assert aws.running()[HERE] == []


def test_a_pool_of_no_region_is_refused_by_name(aws: Regions) -> None:
    strange = request(pool=type(HERE_A)(instance_type=TYPE, zone="eu-west-1a"))
    with pytest.raises(LaunchRejected, match=f"eu-west-1a is in none of .* {HERE}, {THERE}"):
        aws.fleet().launch(strange)


# -- looking and ending -------------------------------------------------------------------------


def test_nothing_is_said_of_a_token_while_a_region_is_silent_that_may_have_it(
    aws: Regions,
) -> None:
    here = aws.fleet("launcher").launch(request("token-1", pool=HERE_A, others=()))
    there = aws.fleet("launcher").launch(request("token-2", pool=THERE_A, others=()))
    down(aws, THERE)
    fleet = aws.fleet("watcher")
    assert set(fleet.describe([here.token])) == {here.token}, "it was found elsewhere"
    with pytest.raises(FleetUnavailable):
        fleet.describe([here.token, there.token])
    with pytest.raises(FleetUnavailable):
        fleet.describe(["never-launched"])
    fleet.recall([here])
    assert set(fleet.describe([here.token])) == {here.token}
    fleet.recall([there])
    with pytest.raises(FleetUnavailable):
        fleet.describe([there.token])


def test_the_end_of_an_instance_is_asked_for_where_it_is(aws: Regions) -> None:
    fleet = aws.fleet()
    there = fleet.launch(request(pool=THERE_A, others=()))
    down(aws, HERE)
    fleet.terminate([there.token])
    aws.tick(60)
    assert fleet.describe([there.token])[there.token].state is InstanceState.TERMINATED


def test_a_token_that_was_given_up_is_launched_in_no_region(aws: Regions) -> None:
    fleet = aws.fleet()
    fleet.terminate(["token-1"])
    for pool in (HERE_A, THERE_A):
        with pytest.raises(LaunchRejected, match="ended before it was launched"):
            fleet.launch(request("token-1", pool=pool, others=()))


def test_who_gives_up_a_token_hears_of_the_region_that_did_not_answer(aws: Regions) -> None:
    launched = aws.fleet("launcher").launch(request(pool=THERE_A, others=()))
    fleet = aws.fleet("giver-up")
    down(aws, HERE)
    with pytest.raises(FleetUnavailable):
        fleet.terminate([launched.token])
    assert aws.running()[THERE] == [], "the other was asked all the same"


def test_the_reaper_sees_the_instances_of_all_regions_or_none(aws: Regions) -> None:
    fleet = aws.fleet()
    for number, pool in enumerate((HERE_A, THERE_A)):
        fleet.launch(request(f"token-{number}", pool=pool, others=()))
    assert {each.pool for each in fleet.owned()} == {HERE_A, THERE_A}
    assert fleet.tidy(lambda tags: True) == 2
    down(aws, THERE)
    aws.tick(10)
    with pytest.raises(FleetUnavailable):
        fleet.owned()


def test_an_instance_is_kept_and_priced_where_it_is(aws: Regions) -> None:
    fleet = aws.fleet(on_failure="keep")
    there = fleet.launch(request(pool=THERE_A, others=()))
    shell = fleet.keep(there.token, until=aws.clock.now)
    assert f"--region {THERE}" in shell
    [instance] = aws.running()[THERE]
    assert KEEP_TAG in instance.tags or any(KEEP_TAG in tags for _, tags in instance.late_tags)
    aws.tick(60)
    assert fleet.price_timeline(there)


# -- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (elsewhere(region=HERE), f"elsewhere is '{HERE}'; it must be a region named only once"),
        (elsewhere(region="the moon"), "elsewhere is 'the moon'; it must be a region, such as"),
        (elsewhere(subnets=[]), rf"elsewhere \({THERE}\) has no subnets"),
        (elsewhere(subnets=["vpc-0a"]), rf"elsewhere \({THERE}\): .*subnets is 'vpc-0a'"),
        (elsewhere(subnet="subnet-0c"), "unknown field `subnet`.*elsewhere"),
        (OPTIONS | {"region": ""}, "elsewhere is given, and region is not"),
        (OPTIONS | {"ami": "ami-0a"}, rf"elsewhere \({THERE}\) needs an ami of its own"),
        (OPTIONS | {"kms_key": "arn:aws:kms:us-east-1:1:key/2"}, "needs a kms_key of its own"),
        (OPTIONS | {"storage_region": "s3"}, "storage_region"),
        (OPTIONS | {"egress_usd_gb": -1}, "egress_usd_gb"),
    ],
)
def test_a_region_that_cannot_work_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        Ec2Regions(options, environment={})


def test_what_has_one_name_everywhere_need_not_be_said_twice() -> None:
    options = Ec2Options.of(OPTIONS | {"kms_key": "alias/disks", "queue_url": "https://here"})
    here, there = options.regions()
    assert (there.ami, there.kms_key) == (here.ami, "alias/disks")
    assert there.queue_url == "", "events stay in their region"
    assert (here.storage_region, there.storage_region) == ("", HERE)


def test_options_settle_to_what_a_spec_can_hold() -> None:
    settled = Ec2Regions.settle(OPTIONS, now=Regions().clock.now)
    assert Ec2Options.of(settled) == Ec2Options.of(OPTIONS)


def test_the_fleet_of_one_region_asks_and_says_what_it_did_before(aws: Regions) -> None:
    fleet = aws.fleet(elsewhere=[])
    offers = fleet.offers([TYPE])
    assert {offer.pool for offer in offers} == {HERE_A, HERE_B}
    assert all(offer.read_usd_gb == offer.write_usd_gb == 0 for offer in offers)
    fleet.terminate([fleet.launch(request(pool=HERE_A, others=(HERE_B,))).token])
    assert not aws.clouds[THERE].calls
    assert fleet_class("ec2") is Ec2Regions


def test_a_price_between_regions_is_known_or_dear() -> None:
    assert egress_usd_gb("us-east-1", "us-east-1") == 0
    assert egress_usd_gb("us-east-1", "us-east-2") == Decimal("0.01")
    assert egress_usd_gb("us-east-1", "eu-west-1") == Decimal("0.02")
    assert egress_usd_gb("ap-northeast-1", "us-east-1") == Decimal("0.09")
    assert egress_usd_gb("us-east-1", "xx-new-1") == UNKNOWN_USD_GB
