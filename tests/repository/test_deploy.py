"""deploy/aws.yaml is valid, and its roles may do what Spotfirst does, and nothing else.

The policies are taken as moto's CloudFormation resolves them, and decided upon by
tests/fleets/ec2/policies.py. AWS's own decisions only an account of AWS's can show.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spotfirst_airflow.fleets.ec2._examination import STATEMENTS
from spotfirst_airflow.fleets.ec2.options import Ec2Options
from tests.fleets.ec2.examined import an_account
from tests.fleets.ec2.policies import Statements, decide, document_of, statements_of
from tests.fleets.ec2.stacks import REGION_TEMPLATE, TEMPLATE, Stack, resolved, template

ACCOUNT = "123456789012"
EC2 = f"arn:aws:ec2:us-east-1:{ACCOUNT}"
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "ec2.md"


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with an_account() as stack:
        yield stack


@pytest.fixture(scope="module")
def controller(stack: Stack) -> Statements:
    return statements_of(stack.outputs["ControllerRoleArn"])


@pytest.fixture(scope="module")
def instance(stack: Stack) -> Statements:
    return statements_of(_instance_role(stack))


def _instance_role(stack: Stack) -> str:
    answer = stack.client("iam").get_instance_profile(
        InstanceProfileName=stack.outputs["InstanceProfile"]
    )
    return str(answer["InstanceProfile"]["Roles"][0]["Arn"])


@pytest.mark.parametrize("path", [TEMPLATE, REGION_TEMPLATE])
def test_a_template_is_valid_and_has_no_warnings(path: Path) -> None:
    lint = Path(sys.executable).with_name("cfn-lint")
    done = subprocess.run([lint, path], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("", 0), done.stdout + done.stderr


def test_its_outputs_are_fleet_options(stack: Stack) -> None:
    options = Ec2Options.of(json.loads(stack.outputs["FleetOptions"]))
    options.check_launch()
    assert options.queue_url == stack.outputs["QueueUrl"]
    assert options.security_groups == (stack.outputs["SecurityGroups"],)


def test_every_statement_that_the_doctor_points_to_exists() -> None:
    allowed: dict[str, set[str]] = {}
    for resource in template()["Resources"].values():
        document = resource["Properties"].get("PolicyDocument", {})
        for statement in resolved(document.get("Statement", []), {}, {"KeepApart": True}):
            actions = statement["Action"]
            actions = [actions] if isinstance(actions, str) else actions
            for action in actions:
                allowed.setdefault(statement["Sid"], set()).add(action)
    assert {
        action for action, statement in STATEMENTS.items() if action not in allowed[statement]
    } == set()


# -- instances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["GetObject", "PutObject", "DeleteObject"])
def test_an_instance_uses_objects_below_its_prefix_only(
    stack: Stack, instance: Statements, action: str
) -> None:
    """tests/security has which of them it may write."""
    bucket = f"arn:aws:s3:::{stack.bucket}"
    assert decide(instance, f"s3:{action}", f"{bucket}/spotfirst/runs/a/packs/x") == "allowed"
    for elsewhere in (
        f"{bucket}/other/x",
        f"{bucket}/spotfirst-2/x",
        "arn:aws:s3:::other/spotfirst/x",
    ):
        assert decide(instance, f"s3:{action}", elsewhere) == "implicitDeny"


@pytest.mark.parametrize("storage", ["spotfirst", "spotfirst/team/one"])
@pytest.mark.parametrize("name", ["0123456789abcdef0123-cp312.json", "0123456789abcdef0123-cp312/a.whl"])  # fmt: skip
def test_an_instance_cannot_change_what_later_ones_install(
    stack: Stack, instance: Statements, controller: Statements, storage: str, name: str
) -> None:
    wheels = f"arn:aws:s3:::{stack.bucket}/{storage}/wheelhouse/{name}"
    for action in ("s3:PutObject", "s3:DeleteObject"):
        assert decide(instance, action, wheels) == "explicitDeny"
        assert decide(controller, action, wheels) == "allowed"
    assert decide(instance, "s3:GetObject", wheels) == "allowed"
    own = f"arn:aws:s3:::{stack.bucket}/{storage}/runs/a/checkpoints/wheelhouse/x"
    assert decide(instance, "s3:PutObject", own) == "allowed"


def test_an_instance_lists_its_prefix_only(stack: Stack, instance: Statements) -> None:
    bucket = f"arn:aws:s3:::{stack.bucket}"
    for prefix, decision in (("spotfirst/runs/", "allowed"), ("other/", "implicitDeny")):
        assert decide(instance, "s3:ListBucket", bucket, {"s3:prefix": prefix}) == decision


@pytest.mark.parametrize(
    "action",
    ["ec2:RunInstances", "ec2:TerminateInstances", "iam:PassRole", "s3:DeleteBucket", "sqs:ReceiveMessage", "ssm:GetParameter", "sts:AssumeRole"],
)  # fmt: skip
def test_an_instance_may_do_nothing_else(instance: Statements, action: str) -> None:
    assert decide(instance, action, "*") == "implicitDeny"


# -- the controller -------------------------------------------------------------------------------


def _launch(storage_url: str, **more: str) -> dict[str, Any]:
    tags = {"aws:RequestTag/spotfirst:storage": storage_url}
    return {**tags, "ec2:MetadataHttpTokens": "required", **more}


@pytest.mark.parametrize(
    ("action", "resource"),
    [
        ("ec2:CreateFleet", f"{EC2}:fleet/fleet-1"),
        ("ec2:RunInstances", f"{EC2}:instance/i-1"),
        ("ec2:CreateLaunchTemplate", f"{EC2}:launch-template/lt-1"),
    ],
)
def test_launches_need_the_tag_of_this_storage(
    stack: Stack, controller: Statements, action: str, resource: str
) -> None:
    ours = stack.storage_url
    assert decide(controller, action, resource, _launch(ours)) == "allowed"
    assert decide(controller, action, resource, _launch(f"{ours}/team")) == "allowed"
    assert decide(controller, action, resource, _launch("s3://other/spotfirst")) == "implicitDeny"
    untagged = {"ec2:MetadataHttpTokens": "required"}
    assert decide(controller, action, resource, untagged) == "implicitDeny"


def test_no_instance_is_launched_without_imdsv2(stack: Stack, controller: Statements) -> None:
    request = _launch(stack.storage_url, **{"ec2:MetadataHttpTokens": "optional"})
    assert decide(controller, "ec2:RunInstances", f"{EC2}:instance/i-1", request) == "explicitDeny"


@pytest.mark.parametrize("kind", ["image/ami-1", "launch-template/lt-1", "network-interface/eni-1",
                                  "subnet/subnet-1", "volume/vol-1", "spot-instances-request/sir-1"])  # fmt: skip
def test_a_launch_may_use_what_it_needs(controller: Statements, kind: str) -> None:
    owner = "arn:aws:ec2:us-east-1:" + ("" if kind.startswith("image") else ACCOUNT)
    assert decide(controller, "ec2:RunInstances", f"{owner}:{kind}") == "allowed"


def test_only_the_stacks_security_group_is_used(stack: Stack, controller: Statements) -> None:
    ours = f"{EC2}:security-group/{stack.outputs['SecurityGroups']}"
    assert decide(controller, "ec2:RunInstances", ours) == "allowed"
    assert decide(controller, "ec2:RunInstances", f"{EC2}:security-group/sg-0") == "implicitDeny"


@pytest.mark.parametrize(
    ("action", "resource"),
    [
        ("ec2:TerminateInstances", f"{EC2}:instance/i-1"),
        ("ec2:DeleteLaunchTemplate", f"{EC2}:launch-template/lt-1"),
    ],
)
def test_only_what_is_of_this_storage_is_ended(
    stack: Stack, controller: Statements, action: str, resource: str
) -> None:
    tag = "aws:ResourceTag/spotfirst:storage"
    assert decide(controller, action, resource, {tag: stack.storage_url}) == "allowed"
    assert decide(controller, action, resource, {tag: "s3://other/x"}) == "implicitDeny"
    assert decide(controller, action, resource) == "implicitDeny"


def test_tags_are_written_at_creation_and_to_keep_an_instance(
    stack: Stack, controller: Statements
) -> None:
    resource = f"{EC2}:instance/i-1"
    for maker in ("CreateFleet", "RunInstances", "CreateLaunchTemplate"):
        made = {"ec2:CreateAction": maker}
        assert decide(controller, "ec2:CreateTags", resource, made) == "allowed"
    ours = {"aws:ResourceTag/spotfirst:storage": stack.storage_url}
    keep = {**ours, "aws:TagKeys": ["spotfirst:keep-until"]}
    claim = {**ours, "aws:TagKeys": ["spotfirst:storage"]}
    assert decide(controller, "ec2:CreateTags", resource, keep) == "allowed"
    assert decide(controller, "ec2:CreateTags", resource, claim) == "implicitDeny"
    stranger = {"aws:TagKeys": ["spotfirst:storage"]}
    assert decide(controller, "ec2:CreateTags", resource, stranger) == "implicitDeny"


def test_only_the_instances_role_is_passed_and_only_to_ec2(
    stack: Stack, controller: Statements
) -> None:
    role, to_ec2 = _instance_role(stack), {"iam:PassedToService": "ec2.amazonaws.com"}
    assert decide(controller, "iam:PassRole", role, to_ec2) == "allowed"
    admin = f"arn:aws:iam::{ACCOUNT}:role/admin"
    assert decide(controller, "iam:PassRole", admin, to_ec2) == "implicitDeny"
    to_lambda = {"iam:PassedToService": "lambda.amazonaws.com"}
    assert decide(controller, "iam:PassRole", role, to_lambda) == "implicitDeny"


def test_each_policy_fits_in_iams_limit(stack: Stack) -> None:
    """6,144 characters without white space, in regions with the longest names too."""
    for arn in stack.outputs["ControllerPolicies"].split(","):
        text = json.dumps(document_of(arn), separators=(",", ":"))
        assert len(text.replace("us-east-1", "ap-southeast-99")) <= 6144, arn


# -- what is not a policy -------------------------------------------------------------------------


def test_nothing_comes_in_and_only_https_goes_out() -> None:
    group = template()["Resources"]["SecurityGroup"]["Properties"]
    assert group["SecurityGroupIngress"] == []
    assert {(rule["FromPort"], rule["ToPort"]) for rule in group["SecurityGroupEgress"]} == {
        (443, 443)
    }


def test_the_bucket_outlives_the_stack() -> None:
    bucket = template()["Resources"]["Bucket"]
    assert (bucket["DeletionPolicy"], bucket["UpdateReplacePolicy"]) == ("Retain", "Retain")


def test_only_eventbridge_sends_to_the_queue() -> None:
    [allow, deny] = template()["Resources"]["QueuePolicy"]["Properties"]["PolicyDocument"][
        "Statement"
    ]
    assert allow["Principal"] == {"Service": "events.amazonaws.com"}
    assert "aws:SourceArn" in allow["Condition"]["ArnEquals"]
    assert deny["Effect"] == "Deny"


def test_the_guide_names_parameters_outputs_and_options_that_exist() -> None:
    text = DOCUMENT.read_text()
    for path in (TEMPLATE, REGION_TEMPLATE):
        found = template(path)
        for name in [*found["Parameters"], *found["Outputs"]]:
            assert name in text, f"docs/ec2.md does not name {name}"
    for option in Ec2Options.__struct_fields__:
        if option != "endpoint_url":
            assert option in text, f"docs/ec2.md does not name the option {option}"
