"""The template's policies against a training script, and against whoever writes to the bucket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fleets.ec2.examined import an_account
from tests.fleets.ec2.policies import Statements, decide, statements_of
from tests.fleets.ec2.stacks import Stack, bucket_policy, resolved, template
from tests.security.objects import OBJECTS, Kind

ACCOUNT = "arn:aws:iam::123456789012"
AIRFLOW = f"{ACCOUNT}:role/airflow"
STORAGES = ("spotfirst", "spotfirst/team/one")
"""The stack's own, and one further below its prefix."""
NAMES = ("r", "control", "code", "wheelhouse", "datasets", "runs", "attempts")
"""Run ids that read like folders."""
_each_object = pytest.mark.parametrize("kind", OBJECTS, ids=lambda kind: kind.name)
_each_storage = pytest.mark.parametrize("storage", STORAGES)


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with an_account() as stack:
        yield stack


@pytest.fixture(scope="module")
def instance(stack: Stack) -> Statements:
    name = stack.outputs["InstanceProfile"]
    answer = stack.client("iam").get_instance_profile(InstanceProfileName=name)
    return statements_of(str(answer["InstanceProfile"]["Roles"][0]["Arn"]))


def _arn(stack: Stack, storage: str, path: str) -> str:
    return f"arn:aws:s3:::{stack.bucket}/{storage}/{path}"


# -- a training script, with all rights of its instance -------------------------------------------


@_each_object
@_each_storage
@pytest.mark.parametrize("name", NAMES)
def test_an_instance_writes_what_attempts_leave_and_nothing_else(
    stack: Stack, instance: Statements, kind: Kind, storage: str, name: str
) -> None:
    path = kind.example.replace("runs/r/", f"runs/{name}/")
    arn = _arn(stack, storage, path)
    may_write = kind.writer != "controllers"
    assert (decide(instance, "s3:PutObject", arn) == "allowed") is may_write
    assert (decide(instance, "s3:DeleteObject", arn) == "allowed") is kind.removable
    assert decide(instance, "s3:GetObject", arn) == "allowed"


@_each_object
@pytest.mark.parametrize(
    "action",
    ["DeleteObjectVersion", "PutObjectAcl", "PutObjectTagging", "BypassGovernanceRetention", "RestoreObject", "PutObjectRetention"],
)  # fmt: skip
def test_an_instance_forgets_nothing_for_good(
    stack: Stack, instance: Statements, kind: Kind, action: str
) -> None:
    assert decide(instance, f"s3:{action}", _arn(stack, "spotfirst", kind.example)) != "allowed"


@pytest.mark.parametrize("kind", [k for k in OBJECTS if k.name.startswith(("control", "code", "wheel"))],
                         ids=lambda kind: kind.name)  # fmt: skip
@_each_storage
def test_what_runs_stays_the_controllers_whatever_else_a_role_is_given(
    stack: Stack, instance: Statements, kind: Kind, storage: str
) -> None:
    everything = [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]
    for action in ("s3:PutObject", "s3:DeleteObject", "s3:DeleteObjectVersion"):
        arn = _arn(stack, storage, kind.example)
        assert decide([*instance, *everything], action, arn) == "explicitDeny"


@pytest.mark.parametrize(
    "action",
    ["s3:PutBucketPolicy", "s3:PutBucketVersioning", "s3:PutLifecycleConfiguration", "ec2:CreateTags",
     "ec2:ModifyInstanceAttribute", "ec2:DescribeInstanceAttribute", "iam:PutRolePolicy", "sts:AssumeRole",
     "sqs:SendMessage", "sqs:DeleteMessage", "events:PutEvents", "ssm:SendCommand"],
)  # fmt: skip
def test_an_instance_changes_no_rule_no_tag_and_no_notice(
    instance: Statements, action: str
) -> None:
    assert decide(instance, action, "*") == "implicitDeny"


def test_without_separate_runs_nothing_speaks_of_access_points(
    stack: Stack, instance: Statements
) -> None:
    """With it: test_separation.py."""
    assert stack.apart is None
    assert "separate_runs" not in stack.outputs["FleetOptions"]
    assert len(stack.outputs["ControllerPolicies"].split(",")) == 3
    controller = statements_of(stack.outputs["ControllerRoleArn"])
    for found in (instance, controller, bucket_policy(stack.bucket)):
        assert "accesspoint" not in json.dumps(found).lower()


# -- whoever writes to the bucket -----------------------------------------------------------------


def _put(who: str, path: str, *, once: bool, controllers: tuple[str, ...] = ()) -> str:
    """What S3 decides for somebody whose own policies allow everything in it."""
    context: dict[str, Any] = {
        "aws:PrincipalArn": who, "aws:SecureTransport": "true", "s3:ObjectCreationOperation": "true",
    }  # fmt: skip
    if once:
        context["s3:if-none-match"] = "*"
    own = [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]
    statements = [*own, *bucket_policy("b", controllers=controllers)]
    return decide(statements, "s3:PutObject", f"arn:aws:s3:::b/{path}", context)


@_each_object
@_each_storage
def test_an_object_that_is_created_once_is_never_replaced_by_anyone(
    kind: Kind, storage: str
) -> None:
    path = f"{storage}/{kind.example}"
    assert (_put(AIRFLOW, path, once=False) == "explicitDeny") is kind.once
    assert _put(AIRFLOW, path, once=True) == "allowed"


def test_the_parts_of_an_upload_carry_no_condition() -> None:
    context = {"aws:SecureTransport": "true", "s3:ObjectCreationOperation": "false"}
    arn = "arn:aws:s3:::b/spotfirst/runs/r/checkpoints/00000001.json"
    own = [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]
    assert decide([*own, *bucket_policy("b")], "s3:PutObject", arn, context) == "allowed"


@pytest.mark.parametrize("kind", [k for k in OBJECTS if k.name.startswith(("control", "code", "wheel"))],
                         ids=lambda kind: kind.name)  # fmt: skip
def test_with_known_controllers_nobody_else_writes_what_they_decide(kind: Kind) -> None:
    path = f"spotfirst/{kind.example}"
    known = (AIRFLOW, f"{ACCOUNT}:user/ops-*")
    for who in (AIRFLOW, f"{ACCOUNT}:user/ops-jane"):
        assert _put(who, path, once=True, controllers=known) == "allowed"
    for who in (f"{ACCOUNT}:user/eve", f"{AIRFLOW}-2", "arn:aws:iam::999999999999:root"):
        assert _put(who, path, once=True, controllers=known) == "explicitDeny"


def test_old_versions_are_kept_when_that_is_asked_for() -> None:
    properties = template()["Resources"]["Bucket"]["Properties"]
    for days, status in ((0, "AWS::NoValue"), (7, {"Status": "Enabled"})):
        found = resolved(properties, {"KeepVersionsDays": days}, {"KeepVersions": days > 0})
        assert found["VersioningConfiguration"] == status
        rules = found["LifecycleConfiguration"]["Rules"]
        kept = [rule["NoncurrentVersionExpiration"] for rule in rules[1:]]
        assert kept == ([{"NoncurrentDays": 7}] if days else [])
