"""The doctor on permissions: each asked for with EC2's DryRun, which launches nothing."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from spotfirst_airflow.fleets.base import ATTEMPT_TAG, KEEP_TAG, RUN_TAG, STORAGE_TAG
from spotfirst_airflow.fleets.checks import Check
from spotfirst_airflow.fleets.ec2._examination import Examination, Refused, allow
from spotfirst_airflow.fleets.ec2._separation import way_through
from spotfirst_airflow.fleets.ec2.instances import TOKEN_TAG, tag_list

__all__ = [
    "check_ending",
    "check_launching",
    "check_looking",
    "check_profile",
    "check_service_roles",
]

_NO_TEMPLATE = "spotfirst-doctor-no-such-template"
_ALLOWED = "DryRunOperation"
_SNAKE = re.compile("(?<=[a-z])(?=[A-Z])")


def check_looking(look: Examination) -> list[Check]:
    """What the fleet looks at while runs go on."""
    # Narrow, for endpoints that ignore DryRun where nothing is changed.
    one = look.type_names[0]
    filters = [{"Name": "instance-type", "Values": [one]}]
    parameters: dict[str, dict[str, Any]] = {
        "DescribeInstances": {"MaxResults": 5},
        "DescribeSpotPriceHistory": {"InstanceTypes": [one], "MaxResults": 1},
        "DescribeSubnets": {"MaxResults": 5},
        "DescribeInstanceTypes": {"InstanceTypes": [one]},
        "DescribeInstanceTypeOfferings": {"Filters": filters},
        "DescribeLaunchTemplates": {"MaxResults": 5},
    }
    found = [
        _dry(look, _SNAKE.sub("_", name).lower(), f"ec2:{name}", **more)
        for name, more in parameters.items()
    ]
    return [*found, _scores(look)]


def _scores(look: Examination) -> Check:
    """What no run needs: recordings of the market have them."""
    action = "ec2:GetSpotPlacementScores"
    asked = _dry(
        look, "get_spot_placement_scores", action,
        InstanceTypes=[look.type_names[0]], TargetCapacity=1, RegionNames=[look.aws.region],
    )  # fmt: skip
    if asked.verdict == "ok":
        return asked
    found = f"{asked.found}: `spotfirst market record` saves no placement scores then"
    return msgspec.structs.replace(asked, verdict="warning", found=found)


def check_launching(look: Examination) -> list[Check]:
    """A launch with everything that a real one has, tags and profile included."""
    tags = _tags(look)
    return [
        _dry(
            look, "create_launch_template", "ec2:CreateLaunchTemplate",
            LaunchTemplateName="spotfirst-doctor",
            LaunchTemplateData={"InstanceType": look.type_names[0]},
            TagSpecifications=[{"ResourceType": "launch-template", "Tags": tags}],
        ),
        _run_instances(look, tags),
        # The template does not exist: AWS answers a dry run before it looks for it, and even
        # a server that ignores DryRun could not launch from it.
        _dry(
            look, "create_fleet", "ec2:CreateFleet",
            Type="instant",
            TargetCapacitySpecification={"TotalTargetCapacity": 1, "DefaultTargetCapacityType": "spot"},
            LaunchTemplateConfigs=[{
                "LaunchTemplateSpecification": {"LaunchTemplateName": _NO_TEMPLATE, "Version": "1"},
                "Overrides": [{"InstanceType": name} for name in look.type_names],
            }],
            TagSpecifications=[
                {"ResourceType": kind, "Tags": tags} for kind in ("fleet", "instance")
            ],
        ),
    ]  # fmt: skip


def _run_instances(look: Examination, tags: list[dict[str, str]]) -> Check:
    name = "permission ec2:RunInstances"
    lacking = [
        what for what, found in (("an AMI", look.image_id), ("a subnet", look.subnets)) if not found
    ]
    if lacking:
        found = f"needs {' and '.join(lacking)} to ask with"
        return Check(name=name, verdict="skipped", found=found)
    more: dict[str, Any] = {}
    if look.role_arn:
        more["IamInstanceProfile"] = {"Name": look.options.instance_profile}
    if look.options.security_groups:
        more["SecurityGroupIds"] = list(look.options.security_groups)
    return _dry(
        look, "run_instances", "ec2:RunInstances",
        MinCount=1,
        MaxCount=1,
        ImageId=look.image_id,
        InstanceType=look.type_names[0],
        SubnetId=look.subnets[0]["SubnetId"],
        MetadataOptions={"HttpTokens": "required"},
        TagSpecifications=[
            {"ResourceType": kind, "Tags": tags} for kind in ("instance", "volume")
        ],
        **more,
    )  # fmt: skip


def check_ending(look: Examination) -> list[Check]:
    """Instances of ours may be ended. Asked about a real one: the permission hangs on its tags."""
    own = _an_instance(look)
    found = []
    for action in _actions_on_own(look):
        name = f"permission {action}"
        if own and action == "ec2:CreateTags":
            tags = tag_list({KEEP_TAG: "2030-01-01T00:00:00Z"})
            found.append(_dry(look, "create_tags", action, Resources=[own], Tags=tags))
            continue
        if own:
            found.append(_dry(look, "terminate_instances", action, InstanceIds=[own]))
            continue
        # AWS refuses to speak of an instance that does not exist, allowed or not.
        pattern = f"arn:{look.partition}:ec2:{look.aws.region}:{look.account}:instance/*"
        context = {f"aws:ResourceTag/{STORAGE_TAG}": look.storage_url}
        if action == "ec2:CreateTags":
            context["aws:TagKeys"] = KEEP_TAG
        verdict = look.simulate(look.caller, action, pattern, **context)
        if verdict == "allowed":
            found.append(Check(name=name, verdict="ok", found="says IAM's policy simulator"))
        elif verdict == "denied":
            why = f"denied, says IAM's policy simulator: {_ACTIONS_ON_OWN[action]}"
            found.append(Check(name=name, verdict="failed", found=why, fix=_allow_own(action)))
        else:
            why = "no instance of this storage's to ask about, and IAM's simulator may not be used"
            fix = f"{allow('iam:SimulatePrincipalPolicy')}, or ask again while a run goes on"
            found.append(Check(name=name, verdict="warning", found=why, fix=fix))
    return found


_ACTIONS_ON_OWN = {
    "ec2:TerminateInstances": "instances would go on until their own timer ends them",
    "ec2:CreateTags": "nothing would be kept, as it could not be marked (on_failure)",
}


def _actions_on_own(look: Examination) -> list[str]:
    if look.options.on_failure == "keep":
        return list(_ACTIONS_ON_OWN)
    return ["ec2:TerminateInstances"]


def _allow_own(action: str) -> str:
    if action == "ec2:CreateTags":
        return (
            "allow ec2:CreateTags to the controller's role: statement MarkKept of deploy/aws.yaml"
        )
    return allow(action)


def _an_instance(look: Examination) -> str:
    """Any instance of this storage's that is not gone."""
    try:
        # All pages: one that a filter has emptied may have others behind it.
        found = look.ask_all(
            "ec2", "describe_instances", "Reservations",
            Filters=[
                {"Name": f"tag:{STORAGE_TAG}", "Values": [look.storage_url]},
                {"Name": "instance-state-name", "Values": ["pending", "running", "stopped"]},
            ],
        )  # fmt: skip
    except Refused:
        return ""
    ids = [i["InstanceId"] for r in found for i in r["Instances"]]
    return str(ids[0]) if ids else ""


def check_profile(look: Examination) -> list[Check]:
    """The instances' role exists, may be passed on, and can use the storage."""
    name, wanted = "instance profile", look.options.instance_profile
    fix = "give the fleet option instance_profile: output InstanceProfile of deploy/aws.yaml"
    if not wanted:
        found = "the fleet option instance_profile is not given"
        return [Check(name=name, verdict="failed", found=found, fix=fix)]
    try:
        answer = look.ask("iam", "get_instance_profile", InstanceProfileName=wanted)
    except Refused as error:
        if error.code == "NoSuchEntity":
            found = f"there is no instance profile {wanted!r} in account {look.account}"
            return [Check(name=name, verdict="failed", found=found, fix=fix)]
        raise
    roles = answer["InstanceProfile"]["Roles"]
    if not roles:
        found = f"{wanted} holds no role, so instances could not reach the storage"
        fix = f"aws iam add-role-to-instance-profile --instance-profile-name {wanted} --role-name …"
        return [Check(name=name, verdict="failed", found=found, fix=fix)]
    look.role_arn = roles[0]["Arn"]
    found = f"{wanted} holds {roles[0]['RoleName']}"
    return [
        Check(name=name, verdict="ok", found=found),
        _pass_role(look),
        _role_storage(look),
    ]


def _pass_role(look: Examination) -> Check:
    name, action = "permission iam:PassRole", "iam:PassRole"
    service = "ec2.amazonaws.com" + (".cn" if look.partition == "aws-cn" else "")
    verdict = look.simulate(look.caller, action, look.role_arn, **{"iam:PassedToService": service})
    if verdict == "allowed":
        return Check(name=name, verdict="ok", found=f"{look.role_arn}, says IAM's simulator")
    if verdict == "denied":
        found = f"the controller may not give {look.role_arn} to instances"
        return Check(name=name, verdict="failed", found=found, fix=allow(action))
    found = "not simulated (iam:SimulatePrincipalPolicy); the dry run of RunInstances tells"
    return Check(name=name, verdict="skipped", found=found)


def _role_storage(look: Examination) -> Check:
    name = "instance role"
    if not look.bucket:
        return Check(name=name, verdict="skipped", found="the storage is not in S3")
    bucket = f"arn:{look.partition}:s3:::{look.bucket}"
    prefix = look.storage_url.partition("://")[2].partition("/")[2]
    below, way = f"{prefix}/" if prefix else "", way_through(look)
    path = f"{bucket}/{below}runs/doctor/packs/probe"
    verdicts = {
        action: look.simulate(look.role_arn, action, path, **way) for action in _OBJECT_ACTIONS
    }
    verdicts["s3:ListBucket"] = look.simulate(
        look.role_arn, "s3:ListBucket", bucket, **{"s3:prefix": f"{below}probe"}, **way
    )
    lacking = [action for action, verdict in verdicts.items() if verdict == "denied"]
    if lacking:
        found = f"{look.role_arn} lacks {', '.join(lacking)} below {look.storage_url}"
        fix = "attach InstanceStorage of deploy/aws.yaml to it, or give the stack's own profile"
        if look.options.separate_runs is None:
            fix += "; with SeparateRuns=true, its fleet option separate_runs, too"
        return Check(name=name, verdict="failed", found=found, fix=fix)
    if "unknown" in verdicts.values():
        found = "its rights could not be simulated (iam:SimulatePrincipalPolicy)"
        return Check(name=name, verdict="skipped", found=found)
    decided = f"{bucket}/{below}control/runs/doctor/journal/00000001.json"
    if look.simulate(look.role_arn, "s3:PutObject", decided, **way) == "allowed":
        found = (
            f"{look.role_arn} may write what controllers decide ({look.storage_url}/control): "
            "only the signatures keep a training from changing it"
        )
        fix = "attach InstanceLimits of deploy/aws.yaml to it, or give the stack's own profile"
        return Check(name=name, verdict="warning", found=found, fix=fix)
    found = f"reads {look.storage_url}, and writes there what attempts leave"
    return Check(name=name, verdict="ok", found=found)


_OBJECT_ACTIONS = ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload")


def check_service_roles(look: Examination) -> list[Check]:
    """The two roles that EC2 itself needs: made at an account's first use, where that is allowed."""
    name = "service-linked roles"
    lacking = []
    for service, role in (
        ("spot.amazonaws.com", "AWSServiceRoleForEC2Spot"),
        ("ec2fleet.amazonaws.com", "AWSServiceRoleForEC2Fleet"),
    ):
        try:
            look.ask("iam", "get_role", RoleName=role)
        except Refused as error:
            if error.code != "NoSuchEntity":
                raise
            lacking.append(service)
    if not lacking:
        return [Check(name=name, verdict="ok", found="spot and EC2 Fleet have theirs")]
    commands = "; ".join(
        f"aws iam create-service-linked-role --aws-service-name {service}" for service in lacking
    )
    found = f"{', '.join(lacking)} has none yet; the first launch makes it, where that is allowed"
    return [Check(name=name, verdict="warning", found=found, fix=commands)]


def _dry(look: Examination, method: str, action: str, **parameters: Any) -> Check:
    """Whether AWS would do it."""
    name = f"permission {action}"
    try:
        look.ask("ec2", method, DryRun=True, **parameters)
    except Refused as error:
        if error.code == _ALLOWED:
            return Check(name=name, verdict="ok", found="dry run allowed")
        if error.unavailable:
            fix = "run the doctor again"
            return Check(name=name, verdict="warning", found=str(error), fix=fix)
        if error.denied:
            found = f"denied: {error.action}" if error.action != action else "denied"
            return Check(name=name, verdict="failed", found=found, fix=allow(error.action))
        fix = "correct what the message names; docs/ec2.md lists errors"
        return Check(name=name, verdict="failed", found=str(error), fix=fix)
    return Check(name=name, verdict="ok", found="answered")


def _tags(look: Examination) -> list[dict[str, str]]:
    """Those of a launch: the permission hangs on them."""
    values = {
        RUN_TAG: "doctor",
        ATTEMPT_TAG: "1",
        STORAGE_TAG: look.storage_url,
        TOKEN_TAG: "doctor",
    }
    return tag_list(values)
