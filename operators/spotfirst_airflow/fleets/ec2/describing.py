"""DescribeInstances: whole answers, and what EC2 says of single ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spotfirst.errors import FleetError
from spotfirst_airflow.fleets.ec2.aws import call, code_of

__all__ = ["describe", "describe_ids"]

PAGE = 500
MOST_CALLS = 20
_ID = re.compile(r"i-[0-9a-f]+")
_NOT_FOUND = "InvalidInstanceID.NotFound"


def describe(client: Callable[[], Any], **parameters: Any) -> list[Mapping[str, Any]]:
    """The instances on all pages of an answer. Raises :class:`~spotfirst.errors.FleetError`.

    EC2 takes no size of a page along with ids.
    """
    if "InstanceIds" not in parameters:
        parameters["MaxResults"] = PAGE
    instances: list[Mapping[str, Any]] = []
    while True:
        page: dict[str, Any] = call(client().describe_instances, **parameters)
        for reservation in page.get("Reservations", []):
            instances += reservation.get("Instances", [])
        if not page.get("NextToken"):
            return instances
        parameters["NextToken"] = page["NextToken"]


def describe_ids(
    client: Callable[[], Any], ids: Sequence[str]
) -> tuple[dict[str, Mapping[str, Any]], set[str]]:
    """What EC2 says of these ids, and those of which it says that they do not exist.

    One unknown id fails the whole call. The error names some or all that are unknown; if it names
    none of them, halves are asked for. After :data:`MOST_CALLS`, nothing is said of the rest.
    """
    instances: dict[str, Mapping[str, Any]] = {}
    not_found: set[str] = set()
    left = [list(ids[start : start + PAGE]) for start in range(0, len(ids), PAGE)]
    for _ in range(MOST_CALLS):
        if not left:
            break
        asked = left.pop()
        try:
            found = describe(client, InstanceIds=asked)
        except FleetError as error:
            if code_of(error) != _NOT_FOUND:
                raise
            named = set(_ID.findall(str(error))) & set(asked)
            if len(asked) == 1:
                not_found.update(asked)
            elif named:
                not_found |= named
                rest = [instance_id for instance_id in asked if instance_id not in named]
                left += [rest] if rest else []
            else:
                left += [asked[: len(asked) // 2], asked[len(asked) // 2 :]]
        else:
            instances |= {described["InstanceId"]: described for described in found}
    return instances, not_found
