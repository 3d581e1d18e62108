"""The doctor in a healthy account: what it asks, wrong options, missing permissions, the clock.

The account is moto's, with the stack of deploy/aws.yaml. What moto lacks (quotas, the policy
simulator, denials) is planted by hand: see stacks.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from botocore.exceptions import ConnectTimeoutError

from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.fleets.ec2.doctor import Ec2Doctor
from tests.fleets.ec2.examined import World, an_account, wrong
from tests.fleets.ec2.stacks import ARM_AMI, REGION, Stack, denial, refusal


@pytest.fixture(scope="module")
def account() -> Iterator[Stack]:
    """Shared: no test here changes it, and the doctor must not either."""
    with an_account() as stack:
        yield stack


@pytest.fixture
def world(account: Stack) -> World:
    return World(account)


def test_an_account_with_the_stack_of_deploy_aws_yaml_passes(world: World) -> None:
    checks = world.ask()
    assert wrong(checks) == {}
    skipped = {name for name, check in checks.items() if check.verdict == "skipped"}
    assert skipped == set()


def test_nothing_is_launched_or_made(world: World) -> None:
    world.options["on_failure"] = "keep"
    world.ask()
    ec2 = world.client("ec2")
    assert ec2.describe_instances()["Reservations"] == []
    assert ec2.describe_fleets()["Fleets"] == []
    assert ec2.describe_launch_templates()["LaunchTemplates"] == []
    looks = ("get_", "describe_", "list_", "simulate_", "receive_")
    for service, method, parameters in world.aws.calls:
        if not method.startswith(looks) and (service, method) != ("sqs", "delete_message"):
            assert parameters.get("DryRun") is True, f"{service} {method} was meant"


def test_a_dry_run_of_create_fleet_names_no_template_that_exists(world: World) -> None:
    world.ask()
    [request] = [
        parameters for _, method, parameters in world.aws.calls if method == "create_fleet"
    ]
    names = [
        config["LaunchTemplateSpecification"]["LaunchTemplateName"]
        for config in request["LaunchTemplateConfigs"]
    ]
    assert names == ["spotfirst-doctor-no-such-template"]


def test_an_option_of_a_stack_that_keeps_runs_apart_is_told_from_one_that_does_not(
    world: World,
) -> None:
    """The other way round: test_doctor_separation.py."""
    name = world.stack.outputs["InstanceProfile"]
    answer = world.client("iam").get_instance_profile(InstanceProfileName=name)
    world.options["separate_runs"] = {
        "access_points": f"arn:aws:s3:{REGION}:123456789012:accesspoint/spotfirst-0a1b2c3d",
        "role": answer["InstanceProfile"]["Roles"][0]["Arn"],
    }
    checks = world.ask()
    assert checks["separate runs"].verdict == "failed"
    assert "SeparateRuns=true" in checks["separate runs"].fix
    assert checks["permission to access points"].verdict == "failed"


# -- wrong options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "fix"),
    [
        ({"subnets": []}, "subnets", "failed", "Subnets of deploy/aws.yaml"),
        ({"subnets": ["subnet-0123456789abcdef0"]}, "subnets", "failed", REGION),
        ({"security_groups": []}, "security groups", "warning", "security_groups"),
        ({"security_groups": ["sg-0123456789abcdef0"]}, "security groups", "failed", "aws.yaml"),
        ({"ami": "ssm:/aws/service/no/such"}, "AMI", "failed", "ami"),
        ({"ami": "ami-0123456789abcdef0"}, "AMI", "failed", "ami"),
        ({"ami": ARM_AMI}, "AMI", "failed", "ami"),
        ({"instance_profile": ""}, "instance profile", "failed", "instance_profile"),
        ({"instance_profile": "none-such"}, "instance profile", "failed", "instance_profile"),
        ({"queue_url": "https://sqs.us-east-1.amazonaws.com/123456789012/gone"}, "queue", "failed", "QueueUrl"),
        ({"queue_url": ""}, "queue", "skipped", ""),
    ],
)  # fmt: skip
def test_a_wrong_option_is_named(
    world: World, changes: dict[str, Any], name: str, verdict: str, fix: str
) -> None:
    world.options |= changes
    check = world.ask()[name]
    assert (check.verdict, fix in check.fix) == (verdict, True), check


def test_an_image_that_spotfirsts_wheels_do_not_run_on_fails(world: World) -> None:
    world.types, world.options["ami"] = ("g5g.xlarge",), ARM_AMI
    check = world.ask()["AMI"]
    assert (check.verdict, "x86_64" in check.fix) == ("failed", True), check


def test_types_that_do_not_exist(world: World) -> None:
    world.types = ("g9.huge",)
    check = world.ask()["instance types"]
    assert check.verdict == "failed"
    assert "g9.huge" in check.found


def test_types_that_no_zone_of_the_subnets_offers(world: World) -> None:
    world.types = ("trn1.2xlarge",)
    check = world.ask()["instance types"]
    assert check.verdict == "failed"
    assert "us-east-1c" in check.fix


def test_one_of_two_types_not_offered_is_a_warning(world: World) -> None:
    world.types = ("g6.xlarge", "trn1.2xlarge")
    assert world.ask()["instance types"].verdict == "warning"


def test_types_may_be_those_that_meet_the_requirements(world: World) -> None:
    world.types = ()
    world.options["requirements"] = {"gpus": 1, "gpu_names": ["L4"], "vcpus": 8, "memory_gib": 32}
    found = world.ask()["instance types"].found
    assert "g6.2xlarge" in found
    assert "g5" not in found


# -- missing permissions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "action", "name"),
    [
        ("describe_instances", "ec2:DescribeInstances", "permission ec2:DescribeInstances"),
        ("describe_spot_price_history", "ec2:DescribeSpotPriceHistory", "permission ec2:DescribeSpotPriceHistory"),
        ("create_launch_template", "ec2:CreateLaunchTemplate", "permission ec2:CreateLaunchTemplate"),
        ("create_fleet", "ec2:CreateFleet", "permission ec2:CreateFleet"),
        ("run_instances", "ec2:RunInstances", "permission ec2:RunInstances"),
        # A launch asks for several; AWS's message says which one is missing.
        ("run_instances", "ec2:CreateTags", "permission ec2:RunInstances"),
        ("run_instances", "iam:PassRole", "permission ec2:RunInstances"),
    ],
)  # fmt: skip
def test_a_permission_that_a_run_needs_fails_without_it(
    world: World, method: str, action: str, name: str
) -> None:
    world.aws.planted["ec2", method] = denial(action)
    check = world.ask()[name]
    assert check.verdict == "failed"
    assert f"allow {action}" in check.fix
    assert "of deploy/aws.yaml" in check.fix


def test_the_image_cannot_be_found_without_its_permission(world: World) -> None:
    world.aws.planted["ssm", "get_parameter"] = denial("ssm:GetParameter")
    check = world.ask()["AMI"]
    assert (check.verdict, "FindImage" in check.fix) == ("failed", True)


@pytest.mark.parametrize("method", ["get_queue_attributes", "receive_message", "delete_message"])
def test_the_queue_cannot_be_read_without_its_permissions(world: World, method: str) -> None:
    action = "sqs:" + "".join(part.title() for part in method.split("_"))
    world.aws.planted["sqs", method] = denial(action)
    check = world.ask()["queue"]
    assert (check.verdict, f"allow {action}" in check.fix) == ("failed", True), check


def test_ending_is_simulated_where_there_is_none(world: World) -> None:
    world.storage_url = "s3://of-someone-else/runs"  # whose instances this role may not end
    check = world.ask()["permission ec2:TerminateInstances"]
    assert (check.verdict, "EndOwn" in check.fix) == ("failed", True)


def test_keeping_needs_to_mark_instances(world: World) -> None:
    world.options["on_failure"] = "keep"
    assert world.ask()["permission ec2:CreateTags"].verdict == "ok"


@pytest.mark.parametrize(
    ("service", "method", "action", "name"),
    [
        ("ec2", "describe_route_tables", "ec2:DescribeRouteTables", "way to S3"),
        ("ec2", "describe_vpc_endpoints", "ec2:DescribeVpcEndpoints", "way to S3"),
        ("ec2", "describe_security_groups", "ec2:DescribeSecurityGroups", "security groups"),
        ("service-quotas", "get_service_quota", "servicequotas:GetServiceQuota", "quota, spot"),
        ("iam", "get_instance_profile", "iam:GetInstanceProfile", "instance profile"),
        ("iam", "get_role", "iam:GetRole", "service-linked roles"),
        ("s3", "get_bucket_encryption", "s3:GetEncryptionConfiguration", "bucket encryption"),
        ("s3", "get_bucket_versioning", "s3:GetBucketVersioning", "bucket versioning"),
        ("s3", "get_bucket_lifecycle_configuration", "s3:GetLifecycleConfiguration", "bucket lifecycle"),
        ("s3", "get_public_access_block", "s3:GetBucketPublicAccessBlock", "bucket privacy"),
        ("events", "list_rule_names_by_target", "events:ListRuleNamesByTarget", "event rules"),
    ],
)  # fmt: skip
def test_a_check_that_may_not_look_is_a_warning_with_what_to_allow(
    world: World, service: str, method: str, action: str, name: str
) -> None:
    world.aws.planted[service, method] = denial(action)
    checks = world.ask()
    assert checks[name].verdict == "warning"
    assert f"allow {action}" in checks[name].fix
    assert "failed" not in wrong(checks).values()


def test_without_the_simulator_the_rest_still_counts(world: World) -> None:
    world.aws.planted["iam", "simulate_principal_policy"] = denial("iam:SimulatePrincipalPolicy")
    checks = world.ask()
    assert wrong(checks) == {"permission ec2:TerminateInstances": "warning"}
    assert checks["permission iam:PassRole"].verdict == "skipped"


# -- who we are, and when -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message", "fix"),
    [
        ("InvalidClientTokenId", "The security token included is invalid", "aws_conn_id"),
        ("ExpiredToken", "The security token has expired", "log in again"),
        ("SignatureDoesNotMatch", "Signature expired: it is now 12:20", "clock"),
    ],
)
def test_without_credentials_nothing_else_is_asked(
    world: World, code: str, message: str, fix: str
) -> None:
    world.aws.planted["sts", "get_caller_identity"] = refusal(code, message)
    checks = world.ask()
    assert (checks["credentials"].verdict, fix in checks["credentials"].fix) == ("failed", True)
    assert {name for name, check in checks.items() if check.verdict == "ok"} == {"storage"}
    assert [method for _, method, _ in world.aws.calls] == ["get_caller_identity"]


def test_without_a_region_it_says_where_to_give_one() -> None:
    doctor = Ec2Doctor({}, storage_url="s3://b/p", opener=lambda url: open_storage("memory://x"))
    [check] = doctor.steps()[0].run()
    assert (check.verdict, "region" in check.fix) == ("failed", True), check


def test_without_boto3_it_says_what_to_install(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(service: str, region: str = "") -> Any:
        raise ModuleNotFoundError("No module named 'boto3'")

    monkeypatch.setattr(world.aws, "client", lacking)
    check = world.ask()["credentials"]
    assert (check.verdict, "pip install boto3" in check.fix) == ("failed", True), check


def test_roots_keys_are_a_warning(world: World) -> None:
    world.aws.planted["sts", "get_caller_identity"] = lambda _: {
        "Account": "123456789012", "Arn": "arn:aws:iam::123456789012:root", "ResponseMetadata": {},
    }  # fmt: skip
    assert world.ask()["credentials"].verdict == "warning"


@pytest.mark.parametrize(
    ("ahead_s", "verdict"),
    [(0, "ok"), (20, "ok"), (-45, "warning"), (45, "warning"), (400, "failed"), (-400, "failed")],
)
def test_the_clock_is_compared_with_awss(world: World, ahead_s: int, verdict: str) -> None:
    world.ahead = timedelta(seconds=ahead_s)
    check = world.ask()["clock"]
    assert check.verdict == verdict
    if verdict != "ok":
        assert ("ahead" in check.found) == (ahead_s > 0)


def test_the_date_of_a_refusal_tells_the_time_too(world: World) -> None:
    late = refusal("SignatureDoesNotMatch", "Signature expired")
    date = (utc_now() + timedelta(hours=1)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    late.response["ResponseMetadata"] = {"HTTPHeaders": {"Date": date}}  # type: ignore[typeddict-item]
    world.aws.planted["sts", "get_caller_identity"] = late
    assert world.ask()["clock"].verdict == "failed"


def test_silence_is_a_warning_and_no_verdict(world: World) -> None:
    for key in (("ec2", "describe_subnets"), ("ec2", "create_fleet"), ("sqs", "receive_message")):
        world.aws.planted[key] = ConnectTimeoutError(endpoint_url="https://aws")
    checks = world.ask()
    assert wrong(checks) == {
        "subnets": "warning",
        "permission ec2:CreateFleet": "warning",
        "permission ec2:DescribeSubnets": "warning",
        "queue": "warning",
    }
    assert all("again" in checks[name].fix for name in wrong(checks))


def test_p5_is_counted_by_its_own_quota_where_there_is_one(world: World) -> None:
    world.types = ("p5.48xlarge",)
    world.aws.quotas["L-7212CCBC"] = 1000.0
    assert world.ask()["quota, spot"].verdict == "ok"
    world.aws.quotas["L-C4BD4855"] = 0.0
    check = world.ask()["quota, spot"]
    assert (check.verdict, "L-C4BD4855" in check.fix) == ("failed", True)


def test_an_account_without_a_quota_of_its_own_has_awss_default(world: World) -> None:
    del world.aws.quotas["L-3819A6DF"]
    world.aws.planted["service-quotas", "get_aws_default_service_quota"] = lambda request: {
        "Quota": {"QuotaCode": request["QuotaCode"], "Value": 0.0}
    }
    assert world.ask()["quota, spot"].verdict == "failed"
