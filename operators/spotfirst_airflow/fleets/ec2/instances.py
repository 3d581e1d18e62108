"""EC2's words for an instance as ours: from an answer of DescribeInstances to an ``Instance``.

==================== ==========================================================================
EC2's state          ours
==================== ==========================================================================
pending              ``PENDING``
running              ``RUNNING``
shutting-down        ``RUNNING``: it may still write, and is not proven gone
stopping             ``RUNNING``, for the same reason
stopped              ``TERMINATED``: no trainer is on it, and none will be, as user data runs once.
                     Its volume still costs: it stays owned, so the reaper sees it
terminated           ``TERMINATED``
==================== ==========================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import msgspec

from spotfirst.market import Market, Pool
from spotfirst_airflow.fleets.base import EndedBy, Instance, InstanceState

__all__ = ["TOKEN_TAG", "Priced", "described_of", "instance_of", "is_over", "tag_list", "tags_of"]

TOKEN_TAG = "spotfirst:token"  # noqa: S105 - the name of a tag
"""On every instance, from its creation on: what it was launched with, and is found by."""

Priced = Callable[[Pool, Market, datetime], tuple[Decimal, str, Decimal]]
"""(pool, market, when) to (USD per hour, its source, USD per hour on demand)."""

_STATES = {"pending": InstanceState.PENDING, "terminated": InstanceState.TERMINATED,
           "stopped": InstanceState.TERMINATED}  # fmt: skip
_ENDED_BY: dict[str, EndedBy] = {
    "Server.SpotInstanceTermination": "fleet",
    "Server.SpotInstanceShutdown": "fleet",
    "Client.InstanceInitiatedShutdown": "itself",
    "Client.UserInitiatedShutdown": "request",
}
"""State reason codes of the API reference's StateReason. The others are failures of AWS's, or of
what the launch asked for, of which people should read."""
_WHEN = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")
_KEY_HINT = (
    "; often the role may not use the KMS key of the volume, see the key's policy and the fleet "
    "option kms_key"
)


def instance_of(described: Mapping[str, Any], *, price: Priced) -> Instance:
    """The instance that one entry of DescribeInstances tells of.

    ``ended_at`` is ``None`` for one that has ended when EC2 does not say when it did.
    """
    tags = tags_of(described)
    pool = Pool(
        instance_type=described["InstanceType"],
        zone=described.get("Placement", {}).get("AvailabilityZone", ""),
    )
    market = Market.SPOT if described.get("InstanceLifecycle") == "spot" else Market.ON_DEMAND
    started_at = described["LaunchTime"]
    usd_h, source, on_demand_usd_h = price(pool, market, started_at)
    state = _STATES.get(described["State"]["Name"], InstanceState.RUNNING)
    instance = Instance(
        token=tags.get(TOKEN_TAG, ""),
        instance_id=described["InstanceId"],
        state=state,
        market=market,
        pool=pool,
        started_at=started_at,
        price_usd_h=usd_h,
        price_source=source,
        on_demand_usd_h=on_demand_usd_h,
        tags=tags,
    )
    return _with_end(instance, described) if state is InstanceState.TERMINATED else instance


def described_of(instance: Instance) -> dict[str, Any]:
    """As much of DescribeInstances' entry as is known of an instance that was just launched."""
    described: dict[str, Any] = {
        "InstanceId": instance.instance_id,
        "InstanceType": instance.pool.instance_type,
        "State": {"Code": 0, "Name": "pending"},
        "LaunchTime": instance.started_at,
        "Placement": {"AvailabilityZone": instance.pool.zone},
    }
    if instance.market is Market.SPOT:
        described["InstanceLifecycle"] = "spot"
    return described


def is_over(described: Mapping[str, Any]) -> bool:
    """Whether nothing is left to terminate: it is gone, or on its way."""
    return described["State"]["Name"] in {"shutting-down", "terminated"}


def tags_of(described: Mapping[str, Any]) -> dict[str, str]:
    """The tags of anything that EC2 describes."""
    return {tag["Key"]: tag.get("Value", "") for tag in described.get("Tags", ())}


def tag_list(tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Tags as EC2 takes them, always in the same order."""
    return [{"Key": key, "Value": tags[key]} for key in sorted(tags)]


def _with_end(instance: Instance, described: Mapping[str, Any]) -> Instance:
    reason = described.get("StateReason") or {}
    transition = described.get("StateTransitionReason", "")
    code, message = reason.get("Code", ""), reason.get("Message", "")
    known = code or _first(_ENDED_BY, transition)
    by = _ENDED_BY.get(known, "unknown")
    if not known and transition.startswith("User initiated"):
        by = "request"
    why = "" if by != "unknown" else (message or transition or code)
    if code == "Client.InternalError":
        why += _KEY_HINT
    if described["State"]["Name"] == "stopped":
        why = f"{why or 'it was stopped'}; it is not terminated, and its volume still costs"
    when = _WHEN.search(f"{transition} {message}")
    return msgspec.structs.replace(
        instance,
        ended_at=_utc(when[1], instance.started_at) if when else None,
        ended_by=by,
        ended_why=why,
    )


def _first(codes: Iterable[str], text: str) -> str:
    return next((code for code in codes if code in text), "")


def _utc(text: str, not_before: datetime) -> datetime:
    when = datetime.strptime(text, "%Y-%m-%d %H:%M:%S").replace(tzinfo=timezone.utc)
    return max(when, not_before)
