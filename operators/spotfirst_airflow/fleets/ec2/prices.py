"""What instances cost: on demand from the price table, spot from EC2's own history."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Hashable, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from spotfirst.errors import InvalidSpec
from spotfirst.market import Pool
from spotfirst.wire import Clock, Record, utc_now
from spotfirst_airflow.fleets.ec2.aws import Aws, call
from spotfirst_airflow.fleets.ec2.options import Requirements
from spotfirst_airflow.fleets.ec2.pricetable import GpuType, PriceTable, load_table, plain

__all__ = ["SPOT_SOURCE", "Price", "Prices", "forget_spot_prices", "spot_history"]

SPOT_SOURCE = "DescribeSpotPriceHistory"
SPOT_TTL_S = 60.0
"""How long an answer serves all runs of a process; AWS moves spot prices over hours."""

_PRODUCT = "Linux/UNIX"
_PAGE = 1000
_MOST_PAST = 1000
"""Prices of the past that are remembered: a run needs one for each of its open attempts."""


class Price(Record):
    """Dollars per hour, where they are from, and of when: the table's date, or when EC2 said so."""

    usd_h: Decimal
    source: str
    at: datetime


class Prices:
    """The prices of one account and region. Thread-safe.

    The table is read once, so all that one fleet says of on-demand prices is of one date. Spot
    prices are shared by all with the same identity.
    """

    def __init__(
        self, aws: Aws, *, table: PriceTable | None = None, clock: Clock = utc_now
    ) -> None:
        self._aws = aws
        self._clock = clock
        self._table = load_table() if table is None else table
        self._past: dict[tuple[Pool, datetime], Price] = {}

    def on_demand(self, instance_type: str) -> Price:
        """Linux, shared tenancy. Raises :class:`InvalidSpec` for a price that is not known."""
        prices = self._table.regions.get(self._aws.region)
        usd_h = prices.usd_h.get(instance_type) if prices else None
        if prices is None or usd_h is None:
            msg = (
                f"the price table has no on-demand price of {instance_type} in "
                f"{self._aws.region}; {_refresh(self._aws.region)}"
            )
            raise InvalidSpec(msg)
        return Price(usd_h=usd_h, source=f"{prices.source}, {self._aws.region}", at=prices.at)

    def spot(self, types: Collection[str], zones: Collection[str]) -> dict[Pool, Price]:
        """The spot price now of each pool that sells one; other pools are left out.

        One call for all types (a page per 1,000 pools), and none for a minute after it. Raises
        :class:`FleetUnavailable` and :class:`LaunchRejected`.
        """
        if not types:
            return {}
        names = tuple(sorted(set(types)))
        quotes = _SPOT.get(self._aws, names, self._clock)
        return {
            pool: price
            for pool, price in quotes.items()
            if pool.instance_type in types and pool.zone in zones
        }

    def spot_between(
        self, pool: Pool, start: datetime, end: datetime
    ) -> list[tuple[datetime, Decimal]]:
        """The spot prices of a pool from ``start`` to ``end``: (since when, USD per hour).

        The first is what was in force at ``start``. Empty when EC2 no longer knows: its history
        reaches back 90 days. Raises as :meth:`spot`.
        """
        entries = spot_history(
            self._aws,
            InstanceTypes=[pool.instance_type],
            AvailabilityZone=pool.zone,
            StartTime=start,
            EndTime=max(start, end),
        )
        timeline: list[tuple[datetime, Decimal]] = []
        for since, _, usd_h in entries:
            if since > max(start, end):
                break
            if since <= start:
                timeline = [(start, usd_h)]
            elif not timeline or timeline[-1][1] != usd_h:  # the same is said anew each day
                timeline.append((since, usd_h))
        return timeline

    def spot_at(self, pool: Pool, at: datetime) -> Price | None:
        """The spot price that was in force then; ``None`` when EC2 does not know (any more).

        Asked once: it never changes. Raises as :meth:`spot`.
        """
        if (pool, at) not in self._past:
            timeline = self.spot_between(pool, at, at)
            if not timeline:
                return None
            if len(self._past) >= _MOST_PAST:
                self._past.clear()
            self._past[pool, at] = Price(usd_h=timeline[0][1], source=SPOT_SOURCE, at=at)
        return self._past[pool, at]

    def matching(self, requirements: Requirements) -> list[str]:
        """The types that meet the requirements, by on-demand price, cheapest first.

        ``gpus`` is met by that number only, since a script is written for it; all else by as much
        or more. ``gpu_memory_gib`` counts as makers do, in powers of ten: 24 is met by a GPU that
        is sold as 24 GB. Raises :class:`InvalidSpec` when none does, and names the nearest.
        """
        _check_names(requirements.gpu_names, self._table.types.values())
        region = self._aws.region
        known = self._table.regions.get(region)
        prices = known.usd_h if known else {}
        lacks = {name: _lacks(kind, requirements) for name, kind in self._table.types.items()}
        met = [name for name, lacking in lacks.items() if not lacking]
        priced = sorted((name for name in met if name in prices), key=lambda n: (prices[n], n))
        if priced:
            return priced
        if met:
            msg = (
                f"{', '.join(met)} would meet the requirements, but the price table has no price "
                f"of them in {region}; {_refresh(region)}"
            )
            raise InvalidSpec(msg)
        choice = [name for name in lacks if name in prices] or list(lacks)
        nearest = min(
            choice, key=lambda n: (_gap(self._table.types[n], requirements), prices.get(n, 0))
        )
        msg = (
            f"no instance type of the price table meets the requirements; the nearest, {nearest}, "
            f"has {' and '.join(lacks[nearest])}. `spotfirst prices` shows them all"
        )
        raise InvalidSpec(msg)


def forget_spot_prices() -> None:
    """Ask EC2 again, whatever was asked just before."""
    _SPOT.clear()


class _SpotPrices:
    """Answers by identity and types. One caller asks, others who want the same wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._busy: dict[Hashable, threading.Lock] = {}
        self._answers: dict[Hashable, tuple[datetime, dict[Pool, Price]]] = {}

    def get(self, aws: Aws, names: tuple[str, ...], clock: Clock) -> dict[Pool, Price]:
        key = (aws.identity.key, names)
        with self._lock:
            busy = self._busy.setdefault(key, threading.Lock())
        with busy:
            now = clock()
            answer = self._answers.get(key)
            if answer is None or not timedelta(0) <= now - answer[0] < timedelta(
                seconds=SPOT_TTL_S
            ):
                entries = spot_history(aws, InstanceTypes=list(names), StartTime=now)
                answer = (
                    now,
                    {
                        pool: Price(usd_h=usd_h, source=SPOT_SOURCE, at=now)
                        for _, pool, usd_h in entries  # oldest first, so that the newest stays
                    },
                )
                self._answers[key] = answer
            return answer[1]

    def clear(self) -> None:
        with self._lock:
            self._answers.clear()

    def leave_to_parent(self) -> None:
        """A forked child has its parent's locks, perhaps held for ever."""
        self._lock, self._busy = threading.Lock(), {}


_SPOT = _SpotPrices()
os.register_at_fork(after_in_child=_SPOT.leave_to_parent)


def spot_history(aws: Aws, **parameters: Any) -> list[tuple[datetime, Pool, Decimal]]:
    """(since when, pool, USD per hour) of the Linux history, oldest first."""
    client = aws.client("ec2")
    entries: list[tuple[datetime, Pool, Decimal]] = []
    token = ""
    while True:
        more = {"NextToken": token} if token else {}
        answer = call(
            client.describe_spot_price_history,
            ProductDescriptions=[_PRODUCT],
            MaxResults=_PAGE,
            **parameters,
            **more,
        )
        entries += [
            (
                entry["Timestamp"],
                Pool(instance_type=entry["InstanceType"], zone=entry["AvailabilityZone"]),
                plain(Decimal(entry["SpotPrice"])),
            )
            for entry in answer.get("SpotPriceHistory", [])
        ]
        token = answer.get("NextToken") or ""
        if not token:
            return sorted(entries, key=lambda entry: entry[0])


def _lacks(kind: GpuType, wanted: Requirements) -> list[str]:
    """What the type has instead of what is wanted, in words; nothing if it meets all."""
    names = {name.casefold() for name in wanted.gpu_names}
    gpu_bytes = kind.gpu_memory_mib * 2**20
    lacks = []
    if names and kind.gpu_name.casefold() not in names:
        lacks.append(f"{kind.gpu_name} GPUs (not {' or '.join(wanted.gpu_names)})")
    if kind.gpus != wanted.gpus:
        lacks.append(f"{kind.gpus} GPU{'s' * (kind.gpus != 1)} (not {wanted.gpus})")
    if gpu_bytes < wanted.gpu_memory_gib * 10**9 * 0.999:  # an "L4 24 GB" has 23,999,807,488
        lacks.append(f"{gpu_bytes / 10**9:.0f} GB per GPU (not {wanted.gpu_memory_gib:g})")
    if kind.vcpus < wanted.vcpus:
        lacks.append(f"{kind.vcpus} vCPUs (not {wanted.vcpus})")
    if kind.memory_gib < wanted.memory_gib:
        lacks.append(f"{kind.memory_gib:g} GiB of memory (not {wanted.memory_gib:g})")
    return lacks


def _gap(kind: GpuType, wanted: Requirements) -> float:
    """How far the type is from what is wanted: the sum of what it falls short by, as shares.

    Another GPU than those named is further off than half of the memory.
    """
    pairs = (
        (kind.gpu_memory_mib * 2**20 / 10**9, wanted.gpu_memory_gib),
        (kind.vcpus, wanted.vcpus),
        (kind.memory_gib, wanted.memory_gib),
    )
    short = sum(max(0.0, 1 - have / want) for have, want in pairs if want)
    names = {name.casefold() for name in wanted.gpu_names}
    other = 2.0 if names and kind.gpu_name.casefold() not in names else 0.0
    return other + short + abs(kind.gpus - wanted.gpus) / max(1, wanted.gpus)


def _check_names(names: Sequence[str], kinds: Collection[GpuType]) -> None:
    known = sorted({kind.gpu_name for kind in kinds})
    unknown = [n for n in names if n.casefold() not in {name.casefold() for name in known}]
    if unknown:
        msg = (
            f"no instance type has a GPU named {' or '.join(map(repr, unknown))}; "
            f"known are {', '.join(known)}"
        )
        raise InvalidSpec(msg)


def _refresh(region: str) -> str:
    return f"write one from AWS's list with `spotfirst prices refresh --region {region}`"
