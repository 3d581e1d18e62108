"""An account in moto with the stack of deploy/aws.yaml, and a way to plant faults in it."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from email.utils import formatdate
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from botocore.exceptions import ClientError

from spotfirst_airflow.fleets.ec2.aws import Aws, Identity
from spotfirst_airflow.fleets.ec2.options import Ec2Options, SeparateRuns
from tests.fleets.ec2 import policies

TEMPLATE = Path(__file__).resolve().parents[3] / "deploy" / "aws.yaml"
REGION_TEMPLATE = TEMPLATE.with_name("aws-region.yaml")
REGION = "us-east-1"
AMI = "ssm:/aws/service/ami-amazon-linux-latest/al2023-ami-kernel-6.1-x86_64"
"""One that moto has; it knows no Deep Learning AMI."""
ARM_AMI = AMI.replace("x86_64", "arm64")

Planted = Exception | Callable[[dict[str, Any]], Any]


class _Loader(yaml.SafeLoader):
    """Reads CloudFormation's short tags as what they stand before."""


def _plain(loader: Any, suffix: str, node: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node)


_Loader.add_multi_constructor("!", _plain)


def template(path: Path = TEMPLATE) -> dict[str, Any]:
    """The template with each intrinsic function replaced by its argument."""
    found = yaml.load(path.read_text(), Loader=_Loader)
    assert isinstance(found, dict)
    return found


def bucket_policy(
    bucket: str, *, controllers: tuple[str, ...] = (), apart: SeparateRuns | None = None
) -> list[dict[str, Any]]:
    """The statements of the bucket's policy, which moto's CloudFormation does not resolve.

    ``apart`` is what a stack says that keeps runs apart.
    """
    arn = f"arn:aws:s3:::{bucket}"
    values = {"Bucket.Arn": arn, "Prefix": "spotfirst", "Controllers": list(controllers)}
    document = template()["Resources"]["BucketPolicy"]["Properties"]["PolicyDocument"]
    conditions = {"NameControllers": bool(controllers), "KeepApart": apart is not None}
    statements = list(resolved(document["Statement"], values, conditions))
    for statement in statements if apart is not None else ():
        if statement["Sid"].startswith("Delegated"):
            statement["Principal"]["AWS"] = apart.role
            [points, _] = statement["Condition"]["ArnLike"]["s3:DataAccessPointArn"]
            assert points.endswith(":accesspoint/spotfirst-${stack}-*")
            statement["Condition"]["ArnLike"]["s3:DataAccessPointArn"] = f"{apart.access_points}-*"
    return statements


def resolved(value: Any, values: Mapping[str, Any], conditions: Mapping[str, bool]) -> Any:
    """A part of :func:`template` with its parameters and conditions; an absent one is false."""
    if isinstance(value, dict):
        return {key: resolved(item, values, conditions) for key, item in value.items()}
    if isinstance(value, list):
        if len(value) == 3 and isinstance(value[0], str) and value[0] in _CONDITIONS:
            return resolved(value[1 if conditions.get(value[0]) else 2], values, conditions)
        found = [resolved(item, values, conditions) for item in value]
        return [item for item in found if item != "AWS::NoValue"]
    if isinstance(value, str):
        if value in values:
            return values[value]
        return re.sub(r"\$\{([^}]+)\}", lambda name: str(values.get(name[1], name[0])), value)
    return value


_CONDITIONS = set(template()["Conditions"])


class Stack:
    """Deploys into the moto that is on, through its CloudFormation."""

    def __init__(self, **parameters: str) -> None:
        self._queue: dict[str, str] = {}
        ec2 = self.client("ec2")
        subnets = sorted(ec2.describe_subnets()["Subnets"], key=lambda s: s["AvailabilityZone"])[:2]
        self.vpc = subnets[0]["VpcId"]
        tables = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [self.vpc]}])
        self.route_table = tables["RouteTables"][0]["RouteTableId"]
        values = {
            "VpcId": self.vpc,
            "Subnets": ",".join(subnet["SubnetId"] for subnet in subnets),
            "RouteTableIds": self.route_table,
            "ControllerPrincipal": "arn:aws:iam::123456789012:root",
            **parameters,
        }
        cloudformation = self.client("cloudformation")
        self.outputs = _make_stack(cloudformation, "spotfirst", TEMPLATE, values)
        self.storage_url = self.outputs["Storage"]
        self.bucket = self.storage_url.split("/")[2]
        queue = self.outputs["QueueUrl"].rsplit("/", 1)[1]
        self.queue_url = self.client("sqs").get_queue_url(QueueName=queue)["QueueUrl"]
        self.options = {
            **json.loads(self.outputs["FleetOptions"]),
            "queue_url": self.queue_url,
            "ami": AMI,
        }
        self._finish()

    @property
    def apart(self) -> SeparateRuns | None:
        """What its outputs say of access points."""
        return Ec2Options.of(self.options).separate_runs

    def client(self, service: str) -> Any:
        """As an administrator of the account."""
        return _administrator().client(service)

    def _finish(self) -> None:
        """What moto's CloudFormation leaves out, as the template has it."""
        resources = template()["Resources"]
        s3 = self.client("s3")
        bucket = resources["Bucket"]["Properties"]
        s3.put_public_access_block(
            Bucket=self.bucket,
            PublicAccessBlockConfiguration=bucket["PublicAccessBlockConfiguration"],
        )
        rules = [
            {
                "ID": rule["Id"],
                "Status": rule["Status"],
                "Filter": {"Prefix": ""},
                "AbortIncompleteMultipartUpload": rule["AbortIncompleteMultipartUpload"],
            }
            for rule in resolved(bucket["LifecycleConfiguration"]["Rules"], {}, {})
        ]
        s3.put_bucket_lifecycle_configuration(
            Bucket=self.bucket, LifecycleConfiguration={"Rules": rules}
        )
        statements = bucket_policy(self.bucket, apart=self.apart)
        s3.put_bucket_policy(
            Bucket=self.bucket,
            Policy=json.dumps({"Version": "2012-10-17", "Statement": statements}),
        )
        statements = resources["QueuePolicy"]["Properties"]["PolicyDocument"]["Statement"]
        for statement in statements:
            statement["Resource"] = "*"
        self.set_queue(Policy=json.dumps({"Version": "2012-10-17", "Statement": statements}))
        iam = self.client("iam")
        arns = {
            policy["PolicyName"]: policy["Arn"]
            for policy in iam.list_policies(Scope="Local")["Policies"]
        }
        for role in iam.list_roles()["Roles"]:
            logical = role["RoleName"].split("-")[1]
            conditions = {"KeepApart": self.apart is not None}
            attached = resources[logical]["Properties"]["ManagedPolicyArns"]
            for wanted in resolved(attached, {}, conditions):
                [arn] = [a for name, a in arns.items() if name.split("-")[1] == wanted] or [""]
                if arn:
                    iam.attach_role_policy(RoleName=role["RoleName"], PolicyArn=arn)
        for name in ("AWSServiceRoleForEC2Spot", "AWSServiceRoleForEC2Fleet"):
            iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")

    def set_queue(self, **attributes: str) -> None:
        # All of them each time: moto forgets the policy otherwise.
        self._queue |= attributes
        self.client("sqs").set_queue_attributes(QueueUrl=self.queue_url, Attributes=self._queue)

    def aws(self) -> PlantedAws:
        """AWS as the controller meets it, with nothing planted yet."""
        aws = PlantedAws(_administrator())
        role = self.outputs["ControllerRoleArn"].rsplit("/", 1)[1]
        answer = aws.client("sts").get_caller_identity()
        arn = f"arn:aws:sts::{answer['Account']}:assumed-role/{role}/airflow"
        # Only in name: moto asks nobody for permissions, and clients of their own for each
        # account's role would take longer to make than everything else.
        aws.planted["sts", "get_caller_identity"] = lambda _: {
            "Account": answer["Account"],
            "Arn": arn,
            "ResponseMetadata": {"HTTPHeaders": {"date": formatdate(usegmt=True)}},
        }
        aws.calls.clear()
        return aws


class RegionStack:
    """The stack of a further region, beside that of the main one."""

    def __init__(self, main: Stack, region: str) -> None:
        self.main, self.region = main, region
        ec2 = self.client("ec2")
        subnets = sorted(ec2.describe_subnets()["Subnets"], key=lambda s: s["AvailabilityZone"])[:2]
        # A default VPC's own, with public addresses and a way out, which moto leaves out.
        vpc = subnets[0]["VpcId"]
        gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
        ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
        tables = ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [vpc]}])
        ec2.create_route(
            RouteTableId=tables["RouteTables"][0]["RouteTableId"],
            DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway,
        )  # fmt: skip
        values = {
            "VpcId": vpc,
            "Subnets": ",".join(subnet["SubnetId"] for subnet in subnets),
            "Storage": main.storage_url,
            "ControllerRole": main.outputs["ControllerRoleArn"].rsplit("/", 1)[1],
        }
        cloudformation = self.client("cloudformation")
        self.outputs = _make_stack(cloudformation, "spotfirst-region", REGION_TEMPLATE, values)
        self.elsewhere = json.loads(self.outputs["Elsewhere"])
        queue = self.elsewhere["queue_url"].rsplit("/", 1)[1]
        self.elsewhere["queue_url"] = self.client("sqs").get_queue_url(QueueName=queue)["QueueUrl"]
        statements = template(REGION_TEMPLATE)["Resources"]["QueuePolicy"]["Properties"][
            "PolicyDocument"
        ]["Statement"]
        for statement in statements:
            statement["Resource"] = "*"
        self.client("sqs").set_queue_attributes(
            QueueUrl=self.elsewhere["queue_url"],
            Attributes={"Policy": json.dumps({"Version": "2012-10-17", "Statement": statements})},
        )
        iam = self.client("iam")
        iam.attach_role_policy(
            RoleName=values["ControllerRole"], PolicyArn=self.outputs["ControllerPolicy"]
        )

    def client(self, service: str) -> Any:
        """As an administrator of the account."""
        return _administrator(self.region).client(service)

    def aws(self) -> PlantedAws:
        """AWS as the controller meets it there."""
        return PlantedAws(_administrator(self.region))


@lru_cache
def _administrator(region: str = REGION) -> Aws:
    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    return Aws(Identity(region=region, environment=keys))


class PlantedAws(Aws):
    """Passes calls on to moto, notes them, and fails or answers as was planted.

    moto lacks three things, which are answered here: IAM's policy simulator, by
    :mod:`tests.fleets.ec2.policies` from the policies that moto holds; EC2's quotas; and placement
    scores.
    """

    def __init__(self, controller: Aws) -> None:
        super().__init__(controller.identity)
        self._controller = controller
        self.calls: list[tuple[str, str, dict[str, Any]]] = []
        self.quotas = dict.fromkeys(("L-3819A6DF", "L-DB2E81BA", "L-7212CCBC", "L-417A185B"), 64.0)
        self.planted: dict[tuple[str, str], Planted] = {
            ("iam", "simulate_principal_policy"): _simulate,
            ("ec2", "get_spot_placement_scores"): refusal("DryRunOperation"),
            ("service-quotas", "get_service_quota"): self._quota,
            ("service-quotas", "get_aws_default_service_quota"): refusal("NoSuchResourceException"),
        }

    def client(self, service: str, region: str = "") -> Any:
        return _Noted(self, service, self._controller.client(service, region))

    def _quota(self, request: dict[str, Any]) -> dict[str, Any]:
        code = request["QuotaCode"]
        if code not in self.quotas:
            raise refusal("NoSuchResourceException")
        return {"Quota": {"QuotaCode": code, "Value": self.quotas[code]}}


def _simulate(request: dict[str, Any]) -> dict[str, Any]:
    if request["PolicySourceArn"].endswith(":root"):
        raise refusal("InvalidInput")
    return policies.simulate(request)


class _Noted:
    def __init__(self, aws: PlantedAws, service: str, client: Any) -> None:
        self._aws, self._service, self._client = aws, service, client

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(**parameters: Any) -> Any:
            self._aws.calls.append((self._service, method, parameters))
            planted = self._aws.planted.get((self._service, method))
            if isinstance(planted, Exception):
                raise planted
            if planted is not None:
                return planted(parameters)
            return getattr(self._client, method)(**parameters)

        return call


def refusal(code: str, message: str = "", operation: str = "Call") -> ClientError:
    """One of AWS's errors."""
    return ClientError({"Error": {"Code": code, "Message": message}}, operation)


def denial(action: str) -> ClientError:
    """What AWS says to whoever lacks a permission."""
    message = (
        "User: arn:aws:sts::123456789012:assumed-role/airflow/x is not authorized to perform: "
        f"{action} because no identity-based policy allows the {action} action"
    )
    code = "UnauthorizedOperation" if action.startswith("ec2:") else "AccessDenied"
    return refusal(code, message, action.partition(":")[2])


def _make_stack(
    cloudformation: Any, name: str, template_file: Path, values: dict[str, Any]
) -> dict[str, str]:
    """The outputs of a stack that is made with these parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # moto's, of what its caller makes up for
        cloudformation.create_stack(
            StackName=name, TemplateBody=template_file.read_text(),
            Capabilities=["CAPABILITY_IAM"],
            Parameters=[
                {"ParameterKey": key, "ParameterValue": value} for key, value in values.items()
            ],
        )  # fmt: skip
    [stack] = cloudformation.describe_stacks(StackName=name)["Stacks"]
    return {each["OutputKey"]: each["OutputValue"] for each in stack["Outputs"]}
