"""What the access points of a simulated cloud let an instance do."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from typing import Any

from spotfirst.errors import StorageDenied
from spotfirst.storage import Storage
from tests.fakes.cloud import ACCOUNT, Cloud, CloudInstance
from tests.fleets.ec2.policies import decide

BUCKET, PREFIX = "bucket", "spotfirst"
URL = f"s3://{BUCKET}/{PREFIX}"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/spotfirst-InstanceRole-0"
_READS = {"read", "read_many", "read_range", "read_tail", "read_or_none", "exists", "size_bytes",
          "read_into", "read_scattered", "download"}  # fmt: skip
_WRITES = {"write", "create", "write_from", "upload"}
_DELETES = {"delete", "delete_many"}


def stack_of(region: str) -> dict[str, Any]:
    """The fleet option of a stack there."""
    points = f"arn:aws:s3:{region}:{ACCOUNT}:accesspoint/spotfirst-0a1b2c3d"
    return {"separate_runs": {"access_points": points, "role": ROLE}}


def way_of(instance: CloudInstance) -> str:
    """The storage's URL that the instance was started with."""
    script = base64.b64decode(instance.template["UserData"]).decode()
    found = re.search(r'"storage_url": "([^"]+)"', script)
    assert found is not None
    return found[1]


def admitted(cloud: Cloud, alias: str) -> set[str]:
    """The instances, by their ids, that the access point of this alias lets in."""
    point = next(p for p in cloud.access_points.values() if p["Alias"] == alias)
    statements = json.loads(point["Policy"])["Statement"]
    if all(each["Effect"] == "Deny" for each in statements):
        return set()
    arns = statements[0]["Condition"]["ArnNotEquals"]["ec2:SourceInstanceARN"]
    return {arn.rpartition("/")[2] for arn in arns}


def may(cloud: Cloud, instance: CloudInstance, action: str, path: str) -> bool:
    """Whether the way that the instance was given leads there, by its access point's policy."""
    alias, _, prefix = way_of(instance).removeprefix("s3://").partition("/")
    point = next((p for p in cloud.access_points.values() if p["Alias"] == alias), None)
    if point is None or "Policy" not in point:
        return False
    assert prefix == PREFIX
    arn, context = point["AccessPointArn"], {
        "aws:PrincipalArn": ROLE,
        "ec2:SourceInstanceARN": f"arn:aws:ec2:{instance.cloud.region}:{ACCOUNT}:instance/{instance.instance_id}",
    }  # fmt: skip
    resource = f"{arn}/object/{prefix}/{path}"
    if action == "s3:ListBucket":
        resource, context["s3:prefix"] = arn, f"{prefix}/{path}/"
    statements = json.loads(point["Policy"])["Statement"]
    return decide(statements, action, resource, context) == "allowed"


class Guarded:
    """A storage as an instance sees it: what its access point denies is denied."""

    def __init__(self, inner: Storage, instance: CloudInstance, cloud: Cloud, at: str = "") -> None:
        self._inner, self._instance, self._cloud, self._at = inner, instance, cloud, at
        self.url = way_of(instance) + (f"/{at}" if at else "")

    def child(self, path: str) -> Guarded:
        at = f"{self._at}/{path}" if self._at else path
        return Guarded(self._inner.child(path), self._instance, self._cloud, at)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._inner, name)
        if not callable(call):
            return call
        return lambda *args, **more: self._do(name, call, *args, **more)

    def _do(self, name: str, call: Callable[..., Any], *args: Any, **more: Any) -> Any:
        kinds = {"s3:GetObject": _READS, "s3:PutObject": _WRITES, "s3:DeleteObject": _DELETES,
                 "s3:ListBucket": {"list", "walk"}}  # fmt: skip
        [action] = [action for action, names in kinds.items() if name in names]
        paths = [args[0]] if isinstance(args[0], str) else list(args[0])
        for path in paths:
            full = f"{self._at}/{path}" if self._at else path
            if not may(self._cloud, self._instance, action, full):
                msg = f"{self._instance.instance_id} may not {action} {full}"
                raise StorageDenied(msg)
        return call(
            paths[0] if len(args) == 1 and isinstance(args[0], str) else args[0], *args[1:], **more
        )
