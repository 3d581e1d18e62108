"""The doctor in two regions: the second is looked at like the first, and its checks have its name.

The account is moto's, with the stacks of deploy/aws.yaml and deploy/aws-region.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from spotfirst.storage import open_storage
from spotfirst_airflow.fleets.ec2.doctor import Ec2Doctor
from spotfirst_airflow.fleets.ec2.options import Ec2Options
from tests.fleets.ec2.examined import TYPES, Checks, an_account, wrong
from tests.fleets.ec2.policies import decide, statements_of
from tests.fleets.ec2.stacks import PlantedAws, RegionStack, denial

THERE = "us-west-2"


@pytest.fixture(scope="module")
def account() -> Iterator[RegionStack]:
    with an_account() as stack:
        yield RegionStack(stack, THERE)


def ask(account: RegionStack, there: PlantedAws | None = None, **changes: Any) -> Checks:
    options = account.main.options | {"elsewhere": [account.elsewhere]} | changes
    doctor = Ec2Doctor(
        options,
        storage_url=account.main.storage_url,
        instance_types=TYPES,
        aws=account.main.aws(),
        elsewhere=lambda _: there or account.aws(),
        opener=lambda _: open_storage("memory://doctor"),
    )
    checks = [check for step in doctor.steps() for check in step.run()]
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def test_an_account_with_both_stacks_passes(account: RegionStack) -> None:
    checks = ask(account)
    assert wrong(checks) == {}
    for name in ("subnets", "way to S3", "AMI", "queue", "permission ec2:RunInstances"):
        assert checks[f"{THERE}: {name}"].verdict == "ok", checks[f"{THERE}: {name}"]
    assert checks["bucket region"].verdict == "ok"


def test_what_is_wrong_in_a_region_is_said_of_that_region(account: RegionStack) -> None:
    strange = account.elsewhere | {"subnets": ["subnet-0123456789abcdef0"]}
    checks = ask(account, elsewhere=[strange])
    assert checks[f"{THERE}: subnets"].verdict == "failed"
    assert THERE in checks[f"{THERE}: subnets"].fix
    assert checks["subnets"].verdict == "ok"


def test_a_permission_that_is_missing_in_one_region_fails_there(account: RegionStack) -> None:
    there = account.aws()
    there.planted["ec2", "create_fleet"] = denial("ec2:CreateFleet")
    checks = ask(account, there)
    assert wrong(checks) == {f"{THERE}: permission ec2:CreateFleet": "failed"}


def test_an_endpoint_is_no_way_to_a_bucket_of_another_region(account: RegionStack) -> None:
    ec2 = account.client("ec2")
    subnets = account.elsewhere["subnets"]
    for subnet in subnets:
        ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": False})
    try:
        check = ask(account)[f"{THERE}: way to S3"]
    finally:
        for subnet in subnets:
            ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    assert check.verdict == "failed"
    assert "NAT" in check.fix


def test_placement_scores_are_no_need_of_a_run(account: RegionStack) -> None:
    there = account.aws()
    there.planted["ec2", "get_spot_placement_scores"] = denial("ec2:GetSpotPlacementScores")
    check = ask(account, there)[f"{THERE}: permission ec2:GetSpotPlacementScores"]
    assert check.verdict == "warning"
    assert "statement Look" in check.fix


def test_a_bucket_that_is_not_where_the_options_say_is_a_warning(account: RegionStack) -> None:
    check = ask(account, storage_region=THERE)["bucket region"]
    assert (check.verdict, "storage_region=us-east-1" in check.fix) == ("warning", True), check


# -- the template ---------------------------------------------------------------------------------


def test_its_output_is_an_entry_of_elsewhere(account: RegionStack) -> None:
    options = Ec2Options.of(account.main.options | {"elsewhere": [account.elsewhere]})
    _, there = options.regions()
    there.check_launch()
    assert (there.region, there.queue_url) == (THERE, account.elsewhere["queue_url"])


def test_the_controller_may_launch_for_this_storage_in_both_regions(account: RegionStack) -> None:
    controller = statements_of(account.main.outputs["ControllerRoleArn"])
    imds = {"ec2:MetadataHttpTokens": "required"}
    for region, decision in (
        ("us-east-1", "allowed"),
        (THERE, "allowed"),
        ("eu-west-1", "implicitDeny"),
    ):
        instance = f"arn:aws:ec2:{region}:123456789012:instance/i-1"
        ours = {"aws:RequestTag/spotfirst:storage": account.main.storage_url}
        assert decide(controller, "ec2:RunInstances", instance, ours | imds) == decision
        theirs = {"aws:RequestTag/spotfirst:storage": "s3://other/x"}
        assert decide(controller, "ec2:RunInstances", instance, theirs | imds) == "implicitDeny"
        own = {"aws:ResourceTag/spotfirst:storage": account.main.storage_url}
        assert decide(controller, "ec2:TerminateInstances", instance, own) == decision
