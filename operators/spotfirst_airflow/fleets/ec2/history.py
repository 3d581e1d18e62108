"""What EC2 tells of a spot market's past and of its chances now."""

from __future__ import annotations

from datetime import datetime, timedelta

from spotfirst.errors import LaunchRejected
from spotfirst_airflow.fleets.ec2.aws import Aws, call
from spotfirst_airflow.fleets.ec2.prices import spot_history
from spotfirst_airflow.fleets.ec2.pricetable import load_table
from spotfirst_airflow.markets.history import Line, Price, Score

__all__ = ["market_lines", "scores"]

LONGEST = timedelta(days=90)
"""How far EC2's history of prices reaches back."""


def market_lines(aws: Aws, instance_type: str, *, now: datetime) -> list[Line]:
    """The spot prices of 90 days in all zones, and the price on demand where the table has it.

    Raises :class:`~spotfirst.errors.FleetUnavailable` and :class:`LaunchRejected`.
    """
    told = spot_history(aws, InstanceTypes=[instance_type], StartTime=now - LONGEST, EndTime=now)
    lines: list[Line] = [
        Price(at=since, zone=pool.zone, usd_h=usd_h) for since, pool, usd_h in told
    ]
    # What is in force now, so that the recording says until when it holds.
    newest = {pool.zone: usd_h for _, pool, usd_h in told}
    lines += [Price(at=now, zone=zone, usd_h=usd_h) for zone, usd_h in newest.items()]
    table = load_table().regions.get(aws.region)
    if table is not None and instance_type in table.usd_h:
        lines.append(Price(at=table.at, usd_h=table.usd_h[instance_type]))
    return lines


def scores(aws: Aws, instance_type: str, *, now: datetime) -> tuple[list[Line], str]:
    """Spot placement scores of the region's zones, or why there are none: they need a permission."""
    client = aws.client("ec2")
    try:
        answer = call(
            client.get_spot_placement_scores, InstanceTypes=[instance_type], TargetCapacity=1,
            SingleAvailabilityZone=True, RegionNames=[aws.region],
        )  # fmt: skip
    except LaunchRejected as error:
        return [], str(error)
    return [
        Score(at=now, place=each.get("AvailabilityZoneId") or each["Region"], score=each["Score"])
        for each in answer.get("SpotPlacementScores", [])
    ], ""
