"""Each fault that an account may have is planted in one of its own, and the doctor names it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from spotfirst.storage import open_storage
from tests.fleets.ec2.examined import World, an_account
from tests.fleets.ec2.stacks import denial


@pytest.fixture
def world() -> Iterator[World]:
    with an_account() as stack:
        yield World(stack)


def _private(world: World) -> None:
    for subnet in world.options["subnets"]:
        world.client("ec2").modify_subnet_attribute(
            SubnetId=subnet, MapPublicIpOnLaunch={"Value": False}
        )


def _endpoint_of_another_service(world: World) -> None:
    """The route of DynamoDB's gateway endpoint looks as that of S3's."""
    _no_way_out(world)
    ec2 = world.client("ec2")
    tables = [
        table["RouteTableId"]
        for table in ec2.describe_route_tables()["RouteTables"]
        if any("SubnetId" in each for each in table["Associations"])
    ]
    ec2.create_vpc_endpoint(
        VpcId=world.stack.vpc, ServiceName="com.amazonaws.us-east-1.dynamodb",
        VpcEndpointType="Gateway", RouteTableIds=tables,
    )  # fmt: skip


def _only_s3_and_an_index(world: World) -> None:
    _private(world)
    world.options |= {"pip_install": ["x"], "pip_index": "https://pypi.org/simple"}


def _no_way_out(world: World) -> None:
    _private(world)
    ec2 = world.client("ec2")
    table = ec2.create_route_table(VpcId=world.stack.vpc)["RouteTable"]["RouteTableId"]
    for subnet in world.options["subnets"]:
        ec2.associate_route_table(RouteTableId=table, SubnetId=subnet)


def _through_nat(world: World) -> None:
    _private(world)
    ec2 = world.client("ec2")
    gateway = ec2.create_nat_gateway(SubnetId=world.options["subnets"][0])["NatGateway"]
    table = ec2.create_route_table(VpcId=world.stack.vpc)["RouteTable"]["RouteTableId"]
    ec2.create_route(
        RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", NatGatewayId=gateway["NatGatewayId"]
    )
    for subnet in world.options["subnets"]:
        ec2.associate_route_table(RouteTableId=table, SubnetId=subnet)


def _open_port(world: World) -> None:
    world.client("ec2").authorize_security_group_ingress(
        GroupId=world.options["security_groups"][0], IpProtocol="tcp", FromPort=22, ToPort=22,
        CidrIp="0.0.0.0/0",
    )  # fmt: skip


def _no_https_out(world: World) -> None:
    [group] = world.client("ec2").describe_security_groups(
        GroupIds=world.options["security_groups"]
    )["SecurityGroups"]
    world.client("ec2").revoke_security_group_egress(
        GroupId=group["GroupId"], IpPermissions=group["IpPermissionsEgress"]
    )


def _other_vpc(world: World) -> None:
    ec2 = world.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    group = ec2.create_security_group(GroupName="there", Description="there", VpcId=vpc)
    world.options["security_groups"] = [group["GroupId"]]


def _subnets_of_two_vpcs(world: World) -> None:
    ec2 = world.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.0.0/24")["Subnet"]
    world.options["subnets"] = [world.options["subnets"][0], subnet["SubnetId"]]


def _one_zone(world: World) -> None:
    world.options["subnets"] = world.options["subnets"][:1]


def _empty_profile(world: World) -> None:
    world.client("iam").create_instance_profile(InstanceProfileName="empty")
    world.options["instance_profile"] = "empty"


def _bare_role(world: World) -> None:
    """A role of someone else's: it may not be passed on, and cannot use the storage."""
    iam = world.client("iam")
    iam.create_role(RoleName="bare", AssumeRolePolicyDocument="{}")
    iam.create_instance_profile(InstanceProfileName="bare")
    iam.add_role_to_instance_profile(InstanceProfileName="bare", RoleName="bare")
    world.options["instance_profile"] = "bare"


def _no_service_role(world: World) -> None:
    world.client("iam").delete_role(RoleName="AWSServiceRoleForEC2Spot")


def _public(world: World) -> None:
    world.client("s3").delete_public_access_block(Bucket=world.stack.bucket)


def _half_public(world: World) -> None:
    world.client("s3").put_public_access_block(
        Bucket=world.stack.bucket, PublicAccessBlockConfiguration={"BlockPublicAcls": True}
    )


def _plain_http(world: World) -> None:
    world.client("s3").delete_bucket_policy(Bucket=world.stack.bucket)


def _not_encrypted(world: World) -> None:
    world.client("s3").delete_bucket_encryption(Bucket=world.stack.bucket)


def _kms_without_bucket_key(world: World) -> None:
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}}
    world.client("s3").put_bucket_encryption(
        Bucket=world.stack.bucket, ServerSideEncryptionConfiguration={"Rules": [rule]}
    )


def _versioned(world: World) -> None:
    world.client("s3").put_bucket_versioning(
        Bucket=world.stack.bucket, VersioningConfiguration={"Status": "Enabled"}
    )


def _no_lifecycle(world: World) -> None:
    world.client("s3").delete_bucket_lifecycle(Bucket=world.stack.bucket)


def _lifecycle_of_another_prefix(world: World) -> None:
    rule = {
        "ID": "elsewhere", "Status": "Enabled", "Filter": {"Prefix": "elsewhere/"},
        "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
    }  # fmt: skip
    world.client("s3").put_bucket_lifecycle_configuration(
        Bucket=world.stack.bucket, LifecycleConfiguration={"Rules": [rule]}
    )


def _lifecycle(world: World, **rule: object) -> None:
    abort = {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1}}
    rules = [
        {"ID": "tidy", "Status": "Enabled", "Filter": {"Prefix": ""}, **abort},
        {"ID": "old", "Status": "Enabled", "Filter": {"Prefix": ""}, **rule},
    ]
    world.client("s3").put_bucket_lifecycle_configuration(
        Bucket=world.stack.bucket, LifecycleConfiguration={"Rules": rules}
    )


def _checkpoints_expire(world: World) -> None:
    _lifecycle(world, Expiration={"Days": 3})


def _checkpoints_expire_late(world: World) -> None:
    _lifecycle(world, Filter={"Prefix": "spotfirst/runs/"}, Expiration={"Days": 90})


def _checkpoints_are_archived(world: World) -> None:
    _lifecycle(world, Transitions=[{"Days": 7, "StorageClass": "GLACIER"}])


def _bucket_elsewhere(world: World) -> None:
    world.client("s3").create_bucket(
        Bucket="far-away", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    world.storage_url = "s3://far-away/runs"


def _nobody_sends(world: World) -> None:
    world.stack.set_queue(Policy=json.dumps({"Version": "2012-10-17", "Statement": []}))


def _nobody_may_send(world: World) -> None:
    only_reads = {
        "Effect": "Allow", "Principal": {"Service": "events.amazonaws.com"},
        "Action": "sqs:ReceiveMessage", "Resource": "*",
    }  # fmt: skip
    world.stack.set_queue(Policy=json.dumps({"Version": "2012-10-17", "Statement": only_reads}))


def _queue_in_the_clear(world: World) -> None:
    world.stack.set_queue(SqsManagedSseEnabled="false")


def _no_rule(world: World) -> None:
    _without_rule(world, "InterruptionRule")


def _no_rebalance_rule(world: World) -> None:
    _without_rule(world, "RebalanceRule")


def _without_rule(world: World, logical: str) -> None:
    events = world.client("events")
    [name] = [rule["Name"] for rule in events.list_rules()["Rules"] if logical in rule["Name"]]
    events.remove_targets(Rule=name, Ids=["queue"])


def _rule_disabled(world: World) -> None:
    events = world.client("events")
    [name] = [r["Name"] for r in events.list_rules()["Rules"] if "InterruptionRule" in r["Name"]]
    events.disable_rule(Name=name)


def _no_spot_quota(world: World) -> None:
    world.aws.quotas["L-3819A6DF"] = 0.0


def _no_on_demand_quota(world: World) -> None:
    world.aws.quotas["L-DB2E81BA"] = 0.0


def _quota_for_the_smaller(world: World) -> None:
    world.types = ("g6.xlarge", "g6.48xlarge")


def _no_conditional_writes(world: World) -> None:
    class Overwrites(type(open_storage("memory://x"))):  # type: ignore[misc]
        def _create(self, full: str, data: bytes) -> None:
            self._write(full, data)

    world.opener = lambda url: Overwrites("memory://doctor", "doctor")


def _local_storage(world: World) -> None:
    world.storage_url = "/somewhere/local"


@pytest.mark.parametrize(
    ("plant", "name", "verdict", "fix"),
    [
        (_no_way_out, "way to S3", "failed", "RouteTableIds=rtb-"),
        (_endpoint_of_another_service, "way to S3", "failed", "RouteTableIds=rtb-"),
        (_only_s3_and_an_index, "way to S3", "warning", "NAT"),
        (_through_nat, "way to S3", "warning", "free"),
        (_open_port, "security groups", "warning", "revoke-security-group-ingress"),
        (_no_https_out, "security groups", "failed", "443"),
        (_other_vpc, "security groups", "failed", "security_groups"),
        (_subnets_of_two_vpcs, "subnets", "failed", "one VPC"),
        (_one_zone, "subnets", "warning", "each other zone"),
        (_empty_profile, "instance profile", "failed", "add-role-to-instance-profile"),
        (_bare_role, "instance role", "failed", "InstanceStorage"),
        (_bare_role, "permission iam:PassRole", "failed", "PassInstanceRole"),
        (_no_service_role, "service-linked roles", "warning", "spot.amazonaws.com"),
        (_public, "bucket privacy", "failed", "put-public-access-block"),
        (_half_public, "bucket privacy", "failed", "put-public-access-block"),
        (_plain_http, "bucket TLS only", "warning", "SecureTransport"),
        (_not_encrypted, "bucket encryption", "warning", "AES256"),
        (_kms_without_bucket_key, "bucket encryption", "warning", "bucket key"),
        (_versioned, "bucket versioning", "warning", "NoncurrentVersionExpiration"),
        (_no_lifecycle, "bucket lifecycle", "warning", "AbortIncompleteMultipartUpload"),
        (_lifecycle_of_another_prefix, "bucket lifecycle", "warning", "Abort"),
        (_checkpoints_expire, "bucket lifecycle", "failed", "exclude s3://"),
        (_checkpoints_expire_late, "bucket lifecycle", "warning", "exclude s3://"),
        (_checkpoints_are_archived, "bucket lifecycle", "failed", "exclude s3://"),
        (_bucket_elsewhere, "bucket region", "warning", "eu-west-1"),
        (_nobody_sends, "queue settings", "failed", "events.amazonaws.com"),
        (_nobody_may_send, "queue settings", "failed", "events.amazonaws.com"),
        (_queue_in_the_clear, "queue settings", "warning", "SqsManagedSseEnabled"),
        (_no_rule, "event rules", "failed", "InterruptionRule"),
        (_no_rebalance_rule, "event rules", "warning", "RebalanceRule"),
        (_rule_disabled, "event rules", "failed", "enable-rule"),
        (_no_spot_quota, "quota, spot", "failed", "--quota-code L-3819A6DF --desired-value 8"),
        (_no_on_demand_quota, "quota, on-demand", "warning", "L-DB2E81BA"),
        (_quota_for_the_smaller, "quota, spot", "warning", "--desired-value 384"),
        (_no_conditional_writes, "storage", "failed", "If-None-Match"),
        (_local_storage, "storage", "failed", "s3://"),
    ],
)
def test_a_planted_fault_is_reported_with_its_fix(
    world: World, plant: Callable[[World], None], name: str, verdict: str, fix: str
) -> None:
    plant(world)
    check = world.ask()[name]
    assert (check.verdict, fix in check.fix) == (verdict, True), check


def test_an_interface_endpoint_is_a_way_to_s3(world: World) -> None:
    _no_way_out(world)
    world.client("ec2").create_vpc_endpoint(
        VpcId=world.stack.vpc, ServiceName="com.amazonaws.us-east-1.s3",
        VpcEndpointType="Interface", SubnetIds=world.options["subnets"], PrivateDnsEnabled=True,
    )  # fmt: skip
    assert world.ask()["way to S3"].verdict == "ok"


def test_rules_for_other_objects_leave_checkpoints_alone(world: World) -> None:
    for chosen in ({"Prefix": "elsewhere/"}, {"Tag": {"Key": "temporary", "Value": "yes"}}):
        _lifecycle(world, Filter=chosen, Expiration={"Days": 1})
        assert world.ask()["bucket lifecycle"].verdict == "ok"
    _lifecycle(world, Transitions=[{"Days": 30, "StorageClass": "STANDARD_IA"}])
    assert world.ask()["bucket lifecycle"].verdict == "ok"


def test_a_policy_with_one_statement_is_read(world: World) -> None:
    bucket = f"arn:aws:s3:::{world.stack.bucket}"
    secure = {
        "Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": [bucket, f"{bucket}/*"],
        "Condition": {"Bool": {"aws:SecureTransport": "false"}},
    }  # fmt: skip
    world.client("s3").put_bucket_policy(
        Bucket=world.stack.bucket,
        Policy=json.dumps({"Version": "2012-10-17", "Statement": secure}),
    )
    sends = {"Effect": "Allow", "Principal": "*", "Action": "SQS:SendMessage", "Resource": "*"}
    world.stack.set_queue(Policy=json.dumps({"Version": "2012-10-17", "Statement": sends}))
    checks = world.ask()
    assert (checks["bucket TLS only"].verdict, checks["queue settings"].verdict) == ("ok", "ok")


def test_ending_is_asked_of_a_real_instance_where_there_is_one(world: World) -> None:
    tags = [{"Key": "spotfirst:storage", "Value": world.storage_url}]
    world.client("ec2").run_instances(
        MinCount=1, MaxCount=1, ImageId="ami-12c6146b",
        TagSpecifications=[{"ResourceType": "instance", "Tags": tags}],
    )  # fmt: skip
    world.aws.planted["ec2", "terminate_instances"] = denial("ec2:TerminateInstances")
    check = world.ask()["permission ec2:TerminateInstances"]
    assert (check.verdict, "EndOwn" in check.fix) == ("failed", True)
    [reservation] = world.client("ec2").describe_instances()["Reservations"]
    assert reservation["Instances"][0]["State"]["Name"] == "running"
