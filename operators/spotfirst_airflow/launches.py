"""What a run may launch: no storm, and nothing again and again that was just refused.

A refusal of a permission, an image or a configuration holds for a market of a region, and so does
a quota (of instance types that begin alike, such as ``g`` or ``p``). Until it is tried again, the
offers there count as not available; so policies do what they do without capacity.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime, timedelta

import msgspec

from spotfirst.events import NotLaunched
from spotfirst.market import Market, Pool
from spotfirst.state import Attempt
from spotfirst_airflow.fleets import Offer
from spotfirst_airflow.policies import rest_s

__all__ = ["Place", "next_launch_at", "out_of_quota", "place_of", "rejections", "with_refusals"]

HOUR_S = 3600.0
_LASTING = 3
_QUOTA_RETRY_S = 30.0
_REJECTED_RETRY_S = 60.0
_REJECTED_LONGEST_S = HOUR_S

Place = tuple[Market, str]
"""A market of a region, by what the names of the region's zones have in common."""


def next_launch_at(attempts: Iterable[Attempt], *, per_hour: int, now: datetime) -> datetime | None:
    """From when on the run may launch again; ``None`` when it may now.

    An hour is one of the run's own clock, by which it is billed: in a local market that runs a
    hundred times faster, it is over after 36 s. What was asked for and never launched does not
    count: it costs nothing, and policies leave pools alone that refuse.
    """
    free_again = sorted(
        launched.at + timedelta(seconds=HOUR_S / launched.clock_rate)
        for attempt in attempts
        if (launched := attempt.launched)
    )
    counted = [at for at in free_again if at > now]
    return None if len(counted) < per_hour else counted[len(counted) - per_hour]


def rejections(attempts: Iterable[Attempt]) -> dict[Place, NotLaunched]:
    """Where the newest launch was refused for good, as far as anyone knows; and why."""
    found: dict[Place, NotLaunched] = {}
    for attempt in attempts:
        refused = attempt.not_launched
        if attempt.launched:
            found.pop(place_of(attempt.market, attempt.pool), None)
        elif refused is not None and refused.cause == "rejected":
            found[place_of(attempt.market, attempt.pool)] = refused
    return found


def out_of_quota(attempts: Iterable[Attempt]) -> set[Place]:
    """Where the newest launches have found no quota, three times in a row or more."""
    counts: dict[Place, int] = {}
    for attempt in attempts:
        place, refused = place_of(attempt.market, attempt.pool), attempt.not_launched
        if attempt.launched:
            counts.pop(place, None)
        elif refused is not None and refused.quota:
            counts[place] = counts.get(place, 0) + 1
    return {place for place, count in counts.items() if count >= _LASTING}


def with_refusals(
    offers: Iterable[Offer], attempts: Iterable[Attempt], *, now: datetime
) -> tuple[Offer, ...]:
    """The offers; those that were refused lately as not available.

    A rejected launch is tried again after a minute, then after twice as long each time, up to an
    hour; one for which there was no quota as a pool without capacity (``policies.rest_s``). An
    instance whose environment the agent cannot work in counts as a rejected launch.
    """
    refusals: dict[tuple[Place, str], int] = {}
    until: dict[tuple[Place, str], datetime] = {}
    for attempt in attempts:
        place, refused = place_of(attempt.market, attempt.pool), attempt.not_launched
        if (ended := attempt.ended) is not None and ended.cause == "unfit":
            at, quota = ended.at, False
        elif attempt.launched:
            refusals = {key: count for key, count in refusals.items() if key[0] != place}
            until = {key: at for key, at in until.items() if key[0] != place}
            continue
        elif refused is not None and (refused.cause == "rejected" or refused.quota):
            at, quota = refused.at, refused.quota
        else:
            continue
        key = (place, _kind(attempt.pool) if quota else "")
        count = refusals[key] = refusals.get(key, 0) + 1
        if quota:
            rest = rest_s(count, retry_s=_QUOTA_RETRY_S, salt=attempt.token)
        else:
            rest = min(_REJECTED_LONGEST_S, _REJECTED_RETRY_S * 2.0 ** min(count - 1, 16))
        until[key] = at + timedelta(seconds=rest)
    resting = {key for key, at in until.items() if now < at}

    def rests(offer: Offer) -> bool:
        place = place_of(offer.market, offer.pool)
        return (place, "") in resting or (place, _kind(offer.pool)) in resting

    return tuple(
        msgspec.structs.replace(offer, available=False) if rests(offer) else offer
        for offer in offers
    )


def place_of(market: Market, pool: Pool) -> Place:
    """Where a refusal of a launch in this pool holds."""
    return market, pool.zone[:-1]


def _kind(pool: Pool) -> str:
    """What instance types that share a quota begin with: the letters before the first digit."""
    return re.split(r"[^a-z]", pool.instance_type, maxsplit=1)[0]
