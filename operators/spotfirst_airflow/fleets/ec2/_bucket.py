"""The doctor on the storage's bucket: who can read it, and what it costs without anyone noticing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec

from spotfirst_airflow.fleets.checks import Check
from spotfirst_airflow.fleets.ec2._examination import Examination, Refused, statements, unlooked

__all__ = ["check_bucket"]

_STACK = "the bucket of deploy/aws.yaml has it"


def check_bucket(look: Examination) -> list[Check]:
    """Its region, privacy, encryption, versioning and lifecycle."""
    found = []
    looks: tuple[tuple[str, Callable[[Examination], Check]], ...] = (
        ("bucket region", _region),
        ("bucket privacy", _privacy),
        ("bucket TLS only", _transport),
        ("bucket encryption", _encryption),
        ("bucket versioning", _versioning),
        ("bucket lifecycle", _lifecycle),
    )
    for name, inspect in looks:
        try:
            found.append(inspect(look))
        except Refused as error:
            found.append(unlooked(name, error))
    return found


def _region(look: Examination) -> Check:
    answer = look.ask("s3", "get_bucket_location", Bucket=look.bucket)
    place = answer.get("LocationConstraint") or "us-east-1"
    place = {"EU": "eu-west-1"}.get(place, place)
    if place == look.storage_region:
        if place == look.aws.region:
            return Check(name="bucket region", verdict="ok", found=place)
        read, write = look.options.way_usd_gb(look.aws.region)
        found = f"{place}: a GB costs ${read:f} to {look.aws.region}, and ${write:f} from there"
        return Check(name="bucket region", verdict="ok", found=found)
    there = msgspec.structs.replace(look.options, storage_region=place)
    found = (
        f"{look.bucket} is in {place} and instances in {look.aws.region}: each GB between them "
        f"costs ${there.way_usd_gb(look.aws.region)[0]:f}, which no bill has, and an endpoint for S3 "
        "does not reach it"
    )
    fix = (
        f"use a bucket in {look.aws.region}, or the fleet option region={place}; or say "
        f"storage_region={place}, and it is counted"
    )
    return Check(name="bucket region", verdict="warning", found=found, fix=fix)


def _privacy(look: Examination) -> Check:
    fix = (
        f"aws s3api put-public-access-block --bucket {look.bucket} --public-access-block-"
        "configuration BlockPublicAcls=true,IgnorePublicAcls=true,BlockPublicPolicy=true,"
        "RestrictPublicBuckets=true"
    )
    settings: dict[str, bool] = {}
    try:
        answer = look.ask("s3", "get_public_access_block", Bucket=look.bucket)
        settings = answer["PublicAccessBlockConfiguration"]
    except Refused as error:
        if error.code != "NoSuchPublicAccessBlockConfiguration":
            raise
    names = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    lacking = [name for name in names if not settings.get(name)]
    if lacking:
        found = f"checkpoints and code could be made public: no {', '.join(lacking)}"
        return Check(name="bucket privacy", verdict="failed", found=found, fix=fix)
    return Check(name="bucket privacy", verdict="ok", found="all public access is blocked")


def _transport(look: Examination) -> Check:
    policy = ""
    try:
        policy = look.ask("s3", "get_bucket_policy", Bucket=look.bucket)["Policy"]
    except Refused as error:
        if error.code != "NoSuchBucketPolicy":
            raise
    for statement in statements(policy):
        asked = statement.get("Condition", {}).get("Bool", {}).get("aws:SecureTransport")
        if statement.get("Effect") == "Deny" and str(asked).lower() == "false":
            return Check(name="bucket TLS only", verdict="ok", found="plain HTTP is refused")
    fix = f"deny s3:* where aws:SecureTransport is false; {_STACK} (BucketPolicy)"
    found = "requests without TLS are not refused"
    return Check(name="bucket TLS only", verdict="warning", found=found, fix=fix)


def _encryption(look: Examination) -> Check:
    name = "bucket encryption"
    try:
        answer = look.ask("s3", "get_bucket_encryption", Bucket=look.bucket)
    except Refused as error:
        if error.code != "ServerSideEncryptionConfigurationNotFoundError":
            raise
        fix = f"set a default encryption; {_STACK} (AES256)"
        found = "no default encryption"
        return Check(name=name, verdict="warning", found=found, fix=fix)
    [rule] = answer["ServerSideEncryptionConfiguration"]["Rules"][:1]
    kind = rule.get("ApplyServerSideEncryptionByDefault", {}).get("SSEAlgorithm", "AES256")
    if kind.startswith("aws:kms") and not rule.get("BucketKeyEnabled"):
        found = f"{kind} without a bucket key: each object is a paid request to KMS"
        fix = "enable the bucket key; and both roles need kms:Decrypt and kms:GenerateDataKey"
        return Check(name=name, verdict="warning", found=found, fix=fix)
    return Check(name=name, verdict="ok", found=str(kind))


def _versioning(look: Examination) -> Check:
    name = "bucket versioning"
    if look.ask("s3", "get_bucket_versioning", Bucket=look.bucket).get("Status") != "Enabled":
        return Check(name=name, verdict="ok", found="off: what is deleted costs nothing")
    if any("NoncurrentVersionExpiration" in rule for rule in _rules(look)):
        return Check(name=name, verdict="ok", found="on, and old versions expire")
    found = "on, and old versions never expire: every deleted checkpoint is paid for, for ever"
    fix = "add a lifecycle rule with NoncurrentVersionExpiration (1 day), or suspend versioning"
    return Check(name=name, verdict="warning", found=found, fix=fix)


def _lifecycle(look: Examination) -> Check:
    name = "bucket lifecycle"
    ages = {str(r.get("ID", "?")): _taken_after(r) for r in _rules(look, partly=True)}
    taken = {rule: days for rule, days in ages.items() if days is not None}
    if taken:
        rules, days = ", ".join(taken), min(taken.values())
        found = f"{rules}: after {days} days it takes away what runs need, checkpoints and models"
        fix = f"exclude {look.storage_url} from the rule, and give runs a retention instead"
        verdict: Literal["failed", "warning"] = "failed" if days < _LONG_DAYS else "warning"
        return Check(name=name, verdict=verdict, found=found, fix=fix)
    if any("AbortIncompleteMultipartUpload" in rule for rule in _rules(look)):
        return Check(name=name, verdict="ok", found="incomplete uploads are aborted")
    found = "parts of uploads that a killed instance left are kept, unseen, and paid for"
    fix = f"add a lifecycle rule AbortIncompleteMultipartUpload after 1 day; {_STACK}"
    return Check(name=name, verdict="warning", found=found, fix=fix)


_READABLE = {"STANDARD_IA", "INTELLIGENT_TIERING", "ONEZONE_IA", "GLACIER_IR"}
"""Classes of storage from which an object is read as before."""


_LONG_DAYS = 30
"""Longer than nearly any run, whose checkpoint may be as old as itself."""


def _taken_after(rule: dict[str, Any]) -> int | None:
    """The age at which objects cannot be read any more, if any. Ours have no tags."""
    chosen = rule.get("Filter", {})
    if "Tag" in chosen or chosen.get("And", {}).get("Tags"):
        return None
    moves = [m for m in rule.get("Transitions", []) if m.get("StorageClass") not in _READABLE]
    ends = [each for each in (rule.get("Expiration", {}), *moves) if {"Days", "Date"} & set(each)]
    return min((int(each.get("Days", 0)) for each in ends), default=None)


def _rules(look: Examination, *, partly: bool = False) -> list[dict[str, Any]]:
    """The rules that are on and hold for the storage, or ``partly``: for some of it."""
    try:
        answer = look.ask("s3", "get_bucket_lifecycle_configuration", Bucket=look.bucket)
    except Refused as error:
        if error.code != "NoSuchLifecycleConfiguration":
            raise
        return []
    prefix = look.storage_url.partition("://")[2].partition("/")[2]
    ours = f"{prefix}/" if prefix else ""
    found = []
    for rule in answer["Rules"]:
        chosen = rule.get("Filter", rule)
        theirs = chosen.get("And", chosen).get("Prefix") or ""
        holds = ours.startswith(theirs) or (partly and theirs.startswith(ours))
        if rule.get("Status") == "Enabled" and holds:
            found.append(rule)
    return found
