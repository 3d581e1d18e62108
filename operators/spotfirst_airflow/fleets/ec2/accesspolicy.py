"""What the policy of a run's access point says, and which run one is of. Makes no calls.

A request through an access point is decided twice, by IAM's rules: for the access point's ARN, with
this policy, and for the bucket's, with the bucket's policy; the role's own policies count in both.
So nothing is possible here that the role may not do. All instances have that one role, and whatever
allows it something allows it to all of them. Hence each limit stands here as an explicit denial,
which nothing overrides, and the role is allowed nothing on access points but by these policies: one
without a policy admits no instance.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from spotfirst.errors import LaunchRejected
from spotfirst.spec import RunSpec
from spotfirst.wire import Record
from spotfirst_airflow.fleets.base import RUN_TAG, STORAGE_TAG

__all__ = ["LIMIT_BYTES", "Place", "Policy", "policy_of", "tags_of_policy"]

LIMIT_BYTES = 20480
"""S3's, for the policy of an access point."""
_WRITTEN = ("attempts", "checkpoints", "packs")
_LISTINGS = ["s3:ListBucket", "s3:ListBucketMultipartUploads", "s3:ListBucketVersions"]
_WRITES = ["s3:AbortMultipartUpload", "s3:ListMultipartUploadParts", "s3:PutObject"]
_DELETES = ["s3:DeleteObject", "s3:DeleteObjectVersion"]
_ELSEWHERE = "NoWritesElsewhere"
_PLAIN = re.compile(r"[A-Za-z0-9!_.()'/+=@:,-]*")
_WRITABLE = re.compile(r"arn:[^/]+:accesspoint/[^/]+/object/(?:(.+)/)?runs/([^/]+)/attempts/\*")


class Place(Record):
    """Where a storage is in S3. ``prefix`` has no slash at its ends."""

    bucket: str
    prefix: str

    @classmethod
    def of(cls, storage_url: str) -> Place:
        """Raises :class:`LaunchRejected` for a storage that no access point can lead to."""
        scheme, _, rest = storage_url.partition("://")
        bucket, _, prefix = rest.strip("/").partition("/")
        if scheme not in {"s3", "s3a"} or not bucket:
            msg = f"fleet option separate_runs needs a storage in S3, and this one is {storage_url}"
            raise LaunchRejected(msg)
        if not _PLAIN.fullmatch(prefix):
            # Others stand for something in a policy: '*', '?' and '${'.
            msg = (
                f"fleet option separate_runs: storage {storage_url} has a character in its prefix "
                "that an access point's policy cannot name; use letters, digits, '/', '-', '_' and '.'"
            )
            raise LaunchRejected(msg)
        return cls(bucket=bucket, prefix=prefix)

    def path(self, *parts: str) -> str:
        """Below the bucket."""
        return "/".join(part for part in (self.prefix, *parts) if part)


class Policy(Record):
    """A policy's text, and a name for what it says: S3 may write the same in another way."""

    name: str
    text: str

    def names(self, text: str | None) -> bool:
        """Whether ``text``, which S3 gave, says the same."""
        return text is not None and _read(text).get("Id") == self.name


def policy_of(
    point_arn: str,
    role_arn: str,
    place: Place,
    run_id: str,
    *,
    spec: RunSpec | None = None,
    instances: Sequence[str] = (),
) -> Policy:
    """What lets these instances, by their ARNs, use what is the run's. Without any, none may.

    They may read the run, what its ``spec`` names, and what all share: datasets and wheels. Raises
    :class:`LaunchRejected` for one that S3 would not take.
    """
    objects = f"{point_arn}/object/"
    seen = _readable(place, run_id, spec)
    written = [objects + place.path("runs", run_id, name, "*") for name in _WRITTEN]
    outsiders: dict[str, Any] = {}
    if instances:
        # A request that carries no instance's ARN is denied as well.
        outsiders = {"Condition": {"ArnNotEquals": {"ec2:SourceInstanceARN": list(instances)}}}
    statements = [
        _deny("NoOtherObjects", "s3:*", Resource=f"{objects}*", **outsiders),
        _deny("NoOtherListings", _LISTINGS, Resource=point_arn, **outsiders),
        _deny("NothingElse", "s3:*", NotResource=[point_arn, *(objects + path for path in seen)]),
        _deny(_ELSEWHERE, _WRITES, NotResource=written),
        _deny("NoDeletionsElsewhere", _DELETES, NotResource=written[-1:]),
        # Reading an object that is missing is no listing, and has no prefix.
        _deny(
            "NoListingsElsewhere", _LISTINGS, Resource=point_arn,
            Condition={"StringNotLike": {"s3:prefix": seen}, "Null": {"s3:prefix": "false"}},
        ),
    ]  # fmt: skip
    if instances:
        # Of all that the denials leave.
        statements.append({
            "Sid": "TheRest", "Effect": "Allow", "Principal": {"AWS": role_arn},
            "Action": ["s3:GetObject", "s3:ListBucket", *_WRITES, _DELETES[0]],
            "Resource": [point_arn, f"{objects}*"],
        })  # fmt: skip
    name = "spotfirst-" + hashlib.sha256(_json(statements).encode()).hexdigest()[:40]
    text = _json({"Version": "2012-10-17", "Id": name, "Statement": statements})
    if len(text.encode()) > LIMIT_BYTES:
        msg = (
            f"the policy of run {run_id}'s access point has {len(text.encode())} bytes, and S3 takes "
            f"{LIMIT_BYTES}: shorten the storage's prefix or the run's id"
        )
        raise LaunchRejected(msg)
    return Policy(name=name, text=text)


def tags_of_policy(text: str, bucket: str) -> dict[str, str]:
    """The tags that an instance of the same run has: whose it is. Empty for a policy not of ours."""
    found = _read(text)
    for statement in found.get("Statement", ()):
        if statement.get("Sid") == _ELSEWHERE:
            for arn in statement.get("NotResource", ()):
                if match := _WRITABLE.fullmatch(arn):
                    place = Place(bucket=bucket, prefix=match[1] or "")
                    return {RUN_TAG: match[2], STORAGE_TAG: f"s3://{bucket}/{place.prefix}"}
    return {}


def _readable(place: Place, run_id: str, spec: RunSpec | None) -> list[str]:
    """Objects, with ``/*`` where it is all that begins so."""
    seen = [
        place.path("runs", run_id, "*"), place.path("control/runs", run_id, "*"),
        place.path("datasets/*"), place.path("wheelhouse/*"),
    ]  # fmt: skip
    if spec is not None and spec.code is not None:
        seen.append(place.path("code", f"{spec.code.digest}.tar.gz"))
    if spec is not None and spec.resume_from is not None:
        parent = spec.resume_from.run_id
        seen += [place.path("runs", parent, name, "*") for name in ("checkpoints", "packs")]
    return seen


def _deny(sid: str, action: str | list[str], **more: Any) -> dict[str, Any]:
    return {"Sid": sid, "Effect": "Deny", "Principal": "*", "Action": action, **more}


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


def _read(text: str) -> Mapping[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
