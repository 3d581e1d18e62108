"""The doctor on access points: whether the options and the stack mean the same, and what is allowed."""

from __future__ import annotations

from spotfirst_airflow.fleets.checks import Check
from spotfirst_airflow.fleets.ec2._examination import Examination, Refused, allow

__all__ = ["check_separation", "way_through"]

_ACTIONS = (
    "s3:CreateAccessPoint",
    "s3:DeleteAccessPoint",
    "s3:GetAccessPointPolicy",
    "s3:PutAccessPointPolicy",
)
_OUTPUT = "give the fleet options of the stack's output FleetOptions"


def check_separation(look: Examination) -> list[Check]:
    """Nothing to say without the fleet option ``separate_runs``."""
    apart = look.options.separate_runs
    if apart is None:
        return []
    return [_agreement(look, apart.access_points, apart.role), _permission(look)]


def way_through(look: Examination) -> dict[str, str]:
    """What a request of an instance carries that the role's policies ask for."""
    apart = look.options.separate_runs
    return {} if apart is None else {"s3:DataAccessPointArn": f"{apart.access_points}-doctor"}


def _agreement(look: Examination, points: str, role: str) -> Check:
    name = "separate runs"
    _, _, _, region, account, _ = points.split(":")
    for what, given, found in (
        ("the region", region, look.storage_region),
        ("the account", account, look.account),
        ("the role", role, look.role_arn or role),
    ):
        if given != found:
            why = f"{what} in separate_runs is {given}, and here it is {found}"
            return Check(name=name, verdict="failed", found=why, fix=_OUTPUT)
    if not look.bucket or not look.role_arn:
        why = "needs a storage in S3 and an instance profile"
        return Check(name=name, verdict="skipped", found=why)
    prefix = look.storage_url.partition("://")[2].partition("/")[2]
    path = "/".join(part for part in (look.bucket, prefix, "runs/doctor/packs/probe") if part)
    direct = look.simulate(look.role_arn, "s3:PutObject", f"arn:{look.partition}:s3:::{path}")
    if direct == "allowed":
        found = (
            f"{look.role_arn} may use {look.storage_url} without an access point: the stack keeps "
            "no runs apart, and a training may write to those of others"
        )
        fix = "set SeparateRuns=true on the stack, while nothing runs; or leave separate_runs out"
        return Check(name=name, verdict="failed", found=found, fix=fix)
    if direct == "unknown":
        found = "the role's rights could not be simulated (iam:SimulatePrincipalPolicy)"
        return Check(name=name, verdict="skipped", found=found)
    found = f"{look.role_arn} reaches {look.storage_url} through access points only"
    return Check(name=name, verdict="ok", found=found)


def _permission(look: Examination) -> Check:
    """Asked for one that is not there, and of IAM's simulator: nothing is made."""
    apart = look.options.separate_runs
    assert apart is not None
    name, fix = "permission to access points", allow("s3:CreateAccessPoint")
    _, _, _, region, account, rest = apart.access_points.split(":")
    try:
        look.ask(
            "s3control", "get_access_point", region=region,
            AccountId=account, Name=f"{rest.removeprefix('accesspoint/')}-doctor",
        )  # fmt: skip
    except Refused as error:
        if error.denied:
            found = "denied: s3:GetAccessPoint"
            return Check(name=name, verdict="failed", found=found, fix=fix)
        if error.code != "NoSuchAccessPoint":
            raise
    arn = f"{apart.access_points}-doctor"
    verdicts = {action: look.simulate(look.caller, action, arn) for action in _ACTIONS}
    lacking = [action for action, verdict in verdicts.items() if verdict == "denied"]
    if lacking:
        found = f"denied, says IAM's policy simulator: {', '.join(lacking)}"
        return Check(name=name, verdict="failed", found=found, fix=fix)
    found = "looked for one"
    if "unknown" not in verdicts.values():
        found += ", and asked IAM's policy simulator for the rest"
    return Check(name=name, verdict="ok", found=found)
