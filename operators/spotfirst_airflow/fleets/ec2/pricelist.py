"""AWS's public bulk price list for EC2, read line by line.

One CSV per region, of hundreds of MB: some lines about the list, the names of the columns, then a
row per price of anything that EC2 sells. See "Reading the price list files for an AWS service" in
AWS's billing guide. The list does not name GPUs: that a family has L4s is known from our table.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from datetime import datetime
from decimal import Decimal, InvalidOperation

import msgspec

from spotfirst.errors import InvalidSpec
from spotfirst.wire import Record
from spotfirst_airflow.fleets.ec2.pricetable import GpuType, PriceTable, RegionPrices, family, plain

__all__ = ["SOURCE", "Reading", "list_url", "read_price_list"]

SOURCE = "AWS price list"

_URL = (
    "https://pricing.us-east-1.amazonaws.com/offers/v1.0/aws/AmazonEC2/current/{region}/index.csv"
)
_WANTED = {
    "TermType": {"OnDemand"},
    "Operating System": {"Linux"},
    "Tenancy": {"Shared"},
    "CapacityStatus": {"Used"},
    "Pre Installed S/W": {"NA", ""},
    "Unit": {"Hrs"},
}
_NEEDED = (*_WANTED, "Instance Type", "vCPU", "Memory", "GPU", "PricePerUnit", "Currency")
_WHERE_PRESENT = {"operation": {"RunInstances"}, "MarketOption": {"OnDemand", ""}}
"""Columns that older lists lack; without them, Capacity Blocks would be among the rows."""


class Reading(Record):
    """What a list has for us. ``others`` are GPU types that we do not know how to describe."""

    prices: RegionPrices
    types: dict[str, GpuType]
    others: tuple[str, ...] = ()


def list_url(region: str) -> str:
    """Where AWS publishes the list of a region."""
    return _URL.format(region=region)


def read_price_list(
    lines: Iterable[str], region: str, *, known: PriceTable, url: str = ""
) -> Reading:
    """The prices of GPU instances, from the lines of a region's list, in one pass.

    A new size of a family that ``known`` has is taken with what its row says. Raises
    :class:`InvalidSpec` for what is no such list, for another region's, or when it has two prices
    for one type: then AWS has changed what the columns mean, and none is taken.
    """
    rows = csv.reader(lines, strict=True)
    try:
        published, columns = _head(rows)
        return _body(rows, columns, region, known=known, published=published, url=url)
    except (csv.Error, UnicodeDecodeError) as error:
        msg = f"the price list is not CSV as AWS writes it: {error}; get it again"
        raise InvalidSpec(msg) from error


def _head(rows: Iterator[list[str]]) -> tuple[datetime, dict[str, int]]:
    """When the list was published, and the place of each column."""
    about: dict[str, str] = {}
    for row in rows:
        if row and row[0] == "SKU":
            columns = {name: index for index, name in enumerate(row)}
            missing = [name for name in _NEEDED if name not in columns]
            if missing:
                msg = f"the price list has no column {', '.join(map(repr, missing))}: is it EC2's?"
                raise InvalidSpec(msg)
            return _moment(about.get("Publication Date", "")), columns
        if len(row) != 2 or len(about) > 20:
            break
        about[row[0]] = row[1]
    msg = f"this is no price list of AWS's in CSV; EC2's is at {list_url('REGION')}"
    raise InvalidSpec(msg)


def _moment(text: str) -> datetime:
    try:
        published = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        published = None
    if published is None or published.tzinfo is None:
        msg = f"the price list does not say when it was published ({text!r}): get it again"
        raise InvalidSpec(msg)
    return published


def _body(
    rows: Iterator[list[str]],
    columns: dict[str, int],
    region: str,
    *,
    known: PriceTable,
    published: datetime,
    url: str,
) -> Reading:
    conditions = [(columns[name], allowed) for name, allowed in _WANTED.items()]
    conditions += [
        (columns[name], allowed) for name, allowed in _WHERE_PRESENT.items() if name in columns
    ]
    samples = {family(name): kind for name, kind in known.types.items()}
    types: dict[str, GpuType] = {}
    usd_h: dict[str, Decimal] = {}
    others: set[str] = set()
    for row in rows:
        if len(row) != len(columns):
            msg = f"the price list breaks off or is damaged at {','.join(row)[:60]!r}: get it again"
            raise InvalidSpec(msg)
        if not all(row[index] in allowed for index, allowed in conditions):
            continue
        gpus, price = _number(row[columns["GPU"]]), _number(row[columns["PricePerUnit"]])
        if gpus <= 0 or price <= 0:  # 0 is what a Capacity Block's own row says
            continue
        _check(row, columns, region)
        name = row[columns["Instance Type"]]
        sample = samples.get(family(name))
        if sample is None:
            others.add(name)
            continue
        if usd_h.setdefault(name, price) != price:
            msg = (
                f"the price list has two on-demand prices for {name}, ${usd_h[name]} and ${price}; "
                "this Spotfirst does not know which is meant: keep the table that you have"
            )
            raise InvalidSpec(msg)
        types[name] = known.types.get(name) or msgspec.structs.replace(
            sample,
            vcpus=int(_number(row[columns["vCPU"]])),
            memory_gib=float(_number(row[columns["Memory"]].removesuffix(" GiB"))),
            gpus=int(gpus),
        )
    if not usd_h:
        msg = f"the price list has no Linux instances with NVIDIA GPUs: is it {region}'s list?"
        raise InvalidSpec(msg)
    return Reading(
        prices=RegionPrices(at=published, source=SOURCE, url=url, usd_h=usd_h),
        types=types,
        others=tuple(sorted(others)),
    )


def _check(row: list[str], columns: dict[str, int], region: str) -> None:
    if "Region Code" in columns and row[columns["Region Code"]] != region:
        msg = f"this is the price list of {row[columns['Region Code']]}, not of {region}"
        raise InvalidSpec(msg)
    if row[columns["Currency"]] != "USD":
        msg = f"the price list is in {row[columns['Currency']]}; Spotfirst reckons in USD"
        raise InvalidSpec(msg)


def _number(text: str) -> Decimal:
    """``1,152`` is 1152; what is no number is 0."""
    try:
        number = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return Decimal(0)
    return plain(number) if number.is_finite() else Decimal(0)
