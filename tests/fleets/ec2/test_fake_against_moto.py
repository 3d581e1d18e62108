"""The fake of EC2 answers as AWS's API is described, and as moto answers the same calls."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import boto3
import botocore.session
import pytest
from botocore.exceptions import ClientError
from botocore.model import ListShape, Shape, StructureShape
from botocore.validate import ParamValidator
from moto import mock_aws

from tests.fakes.clients import QUEUE_URL, FakeAws
from tests.fakes.cloud import Cloud, Weather

REGION = "us-east-1"
TAGS = [{"Key": "spotfirst:token", "Value": "t-1"}, {"Key": "spotfirst:run", "Value": "r"}]
TEMPLATE: dict[str, Any] = {
    "ImageId": "ami-0123456789abcdef0",
    "UserData": base64.b64encode(b"#!/bin/sh\n").decode(),
    "MetadataOptions": {"HttpTokens": "required", "InstanceMetadataTags": "enabled"},
    "InstanceInitiatedShutdownBehavior": "terminate",
}


class Both:
    """The same calls to one of two clouds, whose ids differ."""

    def __init__(self, ec2: Any, subnets: list[str]) -> None:
        self.ec2, self.subnets = ec2, subnets
        self.story: list[tuple[str, dict[str, Any]]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self.ec2, method)(**parameters)
        except ClientError as error:
            answer = {"Error": {"Code": error.response["Error"]["Code"]}}
        self.story.append((method, answer))
        return answer

    def tell(self) -> None:
        """A life: template, launch, look, end."""
        name = {"LaunchTemplateName": "spotfirst-1"}
        self.call("create_launch_template", **name, LaunchTemplateData=TEMPLATE)
        self.call("create_launch_template", **name, LaunchTemplateData=TEMPLATE)
        self.call("describe_launch_templates", LaunchTemplateNames=["spotfirst-1"])
        self.call("describe_launch_templates", LaunchTemplateNames=["spotfirst-2"])
        self.call("describe_subnets", SubnetIds=self.subnets)
        self.call("describe_subnets", SubnetIds=["subnet-0ffffffffffffffff"])
        answer = self.call("create_fleet", **create_fleet(self.subnets))
        (instance_id,) = answer["Instances"][0]["InstanceIds"]
        mine = [{"Name": "tag-key", "Values": ["spotfirst:token"]}]
        self.call("describe_instances", Filters=mine, MaxResults=500)
        self.call("describe_instances", InstanceIds=[instance_id])
        self.call("describe_instances", InstanceIds=["i-0ffffffffffffffff"])
        self.call("create_tags", Resources=[instance_id], Tags=[{"Key": "kept", "Value": "yes"}])
        self.call("terminate_instances", InstanceIds=["i-0ffffffffffffffff"])
        self.call("terminate_instances", InstanceIds=[instance_id])
        self.call("describe_instances", InstanceIds=[instance_id])
        self.call("delete_launch_template", **name)


def create_fleet(subnets: list[str], **changes: Any) -> dict[str, Any]:
    overrides = [{"InstanceType": "g6.xlarge", "SubnetId": subnet} for subnet in subnets]
    return {
        "Type": "instant",
        "ClientToken": "t-1",
        "LaunchTemplateConfigs": [
            {
                "LaunchTemplateSpecification": {
                    "LaunchTemplateName": "spotfirst-1",
                    "Version": "1",
                },
                "Overrides": overrides,
            }
        ],
        "TargetCapacitySpecification": {
            "TotalTargetCapacity": 1,
            "DefaultTargetCapacityType": "spot",
        },
        "SpotOptions": {"AllocationStrategy": "price-capacity-optimized"},
        "TagSpecifications": [{"ResourceType": "instance", "Tags": TAGS}],
        **changes,
    }


def of_fake() -> Both:
    cloud = Cloud("moto")
    both = Both(FakeAws(cloud).client("ec2"), list(cloud.subnets))
    both.tell()
    return both


@pytest.fixture
def of_moto(monkeypatch: pytest.MonkeyPatch) -> Iterator[Both]:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    with mock_aws():
        ec2 = boto3.client("ec2", region_name=REGION)
        subnets = [each["SubnetId"] for each in ec2.describe_subnets()["Subnets"][:2]]
        image = ec2.describe_images()["Images"][0]["ImageId"]
        TEMPLATE["ImageId"] = image
        both = Both(ec2, subnets)
        both.tell()
        yield both


def shape_of(value: Any) -> Any:
    """The types and names of an answer, without what is in it."""
    if isinstance(value, dict):
        return {name: shape_of(item) for name, item in value.items() if name != "ResponseMetadata"}
    if isinstance(value, (list, tuple)):
        return [shape_of(value[0])] if value else []
    return type(value)


def beyond(fake: Any, real: Any, where: str = "") -> list[str]:
    """Where the fake says something that the other does not say, or in another type."""
    if isinstance(fake, dict) and isinstance(real, dict):
        return [
            text
            for name, value in fake.items()
            for text in (
                beyond(value, real[name], f"{where}.{name}")
                if name in real
                else [f"{where}.{name} is only in the fake's answer"]
            )
        ]
    if isinstance(fake, list) and isinstance(real, list):
        return beyond(fake[0], real[0], f"{where}[]") if fake and real else []
    return [] if fake == real else [f"{where}: {fake} here, {real} there"]


MOTO_LACKS = {
    # moto leaves these out; AWS's API has them, as the check against its model says.
    ".AvailabilityZoneId", ".Tags", ".OwnerId", ".RequesterId", ".ClientToken", ".Lifecycle",
    ".AvailabilityZone", ".StateReason", ".SpotInstanceRequestId", ".Errors", ".LaunchTemplateId",
    ".GroupName", ".CreateTime", ".CreatedBy", "VersionNumber",
}  # fmt: skip


def test_the_same_calls_get_answers_of_the_same_shape_as_from_moto(of_moto: Both) -> None:
    found = []
    for (method, fake), (_, moto) in zip(of_fake().story, of_moto.story, strict=True):
        found += [f"{method}{text}" for text in beyond(shape_of(fake), shape_of(moto))]
        if "Error" in fake or "Error" in moto:
            assert fake.get("Error") == moto.get("Error"), method
    surprising = [text for text in found if not any(name in text for name in MOTO_LACKS)]
    assert surprising == []


def errors_in(value: Any, shape: Shape, where: str) -> list[str]:
    """Where an answer is not what the service's model says. Values are checked by botocore."""
    if isinstance(shape, StructureShape):
        return [
            text
            for name, item in value.items()
            if name != "ResponseMetadata"
            for text in (
                errors_in(item, shape.members[name], f"{where}.{name}")
                if name in shape.members
                else [f"{where}.{name} is not in AWS's model"]
            )
        ]
    if isinstance(shape, ListShape):
        return [text for item in value for text in errors_in(item, shape.member, f"{where}[]")]
    report = ParamValidator().validate(value, shape)
    return [f"{where}: {report.generate_report()}"] if report.has_errors() else []


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    session = botocore.session.Session()
    return {name: session.get_service_model(name) for name in ("ec2", "sqs", "ssm")}


def test_requests_and_answers_are_what_the_model_of_the_api_says(models: dict[str, Any]) -> None:
    cloud = Cloud("model")
    aws = FakeAws(cloud)
    ec2, sqs, ssm = (aws.client(name) for name in ("ec2", "sqs", "ssm"))
    both = Both(ec2, list(cloud.subnets))
    both.tell()
    both.call("create_launch_template", LaunchTemplateName="again", LaunchTemplateData=TEMPLATE)
    config = create_fleet(both.subnets)
    config["LaunchTemplateConfigs"][0]["LaunchTemplateSpecification"] = {
        "LaunchTemplateName": "again", "Version": "1",
    }  # fmt: skip
    cloud.launch_error = ("MaxSpotInstanceCountExceeded", "Max spot instance count exceeded")
    refused = both.call("create_fleet", **{**config, "ClientToken": "t-2"})
    assert [error["ErrorCode"] for error in refused["Errors"]] == [cloud.launch_error[0]] * 2
    both.call("describe_spot_price_history", InstanceTypes=["g6.xlarge"], StartTime=cloud.clock())
    both.call(
        "describe_instance_type_offerings",
        LocationType="availability-zone",
        Filters=[{"Name": "instance-type", "Values": ["g6.xlarge"]}],
    )
    answers = [("ec2", *entry) for entry in both.story]
    cloud.enqueue("{}")
    received = sqs.receive_message(QueueUrl=QUEUE_URL, MaxNumberOfMessages=10, WaitTimeSeconds=0)
    handle = received["Messages"][0]["ReceiptHandle"]
    answers += [
        ("sqs", "receive_message", received),
        ("sqs", "delete_message", sqs.delete_message(QueueUrl=QUEUE_URL, ReceiptHandle=handle)),
        ("ssm", "get_parameter", ssm.get_parameter(Name="/aws/service/ami")),
    ]
    problems = []
    for service, method, answer in answers:
        operation = "".join(part.capitalize() for part in method.split("_"))
        shape = models[service].operation_model(operation).output_shape
        if shape is not None and "Error" not in answer:
            problems += errors_in(answer, shape, operation)
    for operation, parameters in ec2.calls + sqs.calls + ssm.calls:
        service = {"GetParameter": "ssm"}.get(operation, "sqs" if "Message" in operation else "ec2")
        report = ParamValidator().validate(
            parameters, models[service].operation_model(operation).input_shape
        )
        problems += [report.generate_report()] if report.has_errors() else []
    assert problems == []


# -- what moto does not do, and AWS does ------------------------------------------------------


def launched(cloud: Cloud, ec2: Any, **changes: Any) -> dict[str, Any]:
    if "spotfirst-1" not in cloud.templates:
        ec2.create_launch_template(LaunchTemplateName="spotfirst-1", LaunchTemplateData=TEMPLATE)
    answer: dict[str, Any] = ec2.create_fleet(**create_fleet(list(cloud.subnets), **changes))
    return answer


def test_a_client_token_gives_the_same_answer_again_and_refuses_another_request() -> None:
    cloud = Cloud("token")
    ec2 = FakeAws(cloud).client("ec2")
    first = launched(cloud, ec2)
    assert launched(cloud, ec2)["Instances"] == first["Instances"]
    assert len(cloud.instances) == 1
    with pytest.raises(ClientError, match="IdempotentParameterMismatch"):
        launched(cloud, ec2, SpotOptions={"AllocationStrategy": "lowest-price"})
    assert len(cloud.instances) == 1


def test_a_new_instance_and_its_tags_are_seen_late() -> None:
    cloud = Cloud(3, weather=Weather(hidden_s=20))
    ec2 = FakeAws(cloud).client("ec2")
    instance_id = launched(cloud, ec2)["Instances"][0]["InstanceIds"][0]
    by_tag = {"Filters": [{"Name": "tag:spotfirst:token", "Values": ["t-1"]}]}
    with pytest.raises(ClientError, match=r"InvalidInstanceID\.NotFound"):
        ec2.describe_instances(InstanceIds=[instance_id])
    assert ec2.describe_instances(**by_tag)["Reservations"] == []
    cloud.tick(41)
    (reservation,) = ec2.describe_instances(**by_tag)["Reservations"]
    assert reservation["Instances"][0]["InstanceId"] == instance_id


def test_answers_come_in_pages() -> None:
    cloud = Cloud(5)
    ec2 = FakeAws(cloud).client("ec2")
    for number in range(12):
        launched(cloud, ec2, ClientToken=f"t-{number}")
    pages = list(ec2.get_paginator("describe_instances").paginate(MaxResults=5))
    assert [len(page["Reservations"]) for page in pages] == [5, 5, 2]
    assert "NextToken" not in pages[-1]


def test_the_bill_is_free_for_what_aws_takes_back_in_the_first_hour_and_only_for_that() -> None:
    for by, seconds, free in (("aws", 3599, True), ("aws", 3600, False), ("user", 60, False)):
        cloud = Cloud(1)
        launched(cloud, FakeAws(cloud).client("ec2"))
        (instance,) = cloud.instances.values()
        instance.notice_at = instance.interrupted_at = None
        cloud.tick(seconds)
        instance.interrupt(notice_s=None) if by == "aws" else instance.end("user")
        assert (instance.cost_usd() == 0) == free
        cloud.tick(100)
        assert instance.used_s() == seconds
