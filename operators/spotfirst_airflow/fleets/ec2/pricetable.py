"""The GPU types of EC2 and their on-demand prices: a table with a date and a source.

One comes with this package (``prices.json``). It holds only prices that its sources show: for
another region, or newer ones, ``spotfirst prices refresh --region …`` writes a table of one's own.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from importlib import resources
from pathlib import Path

import msgspec

from spotfirst.errors import FormatError, InvalidSpec
from spotfirst.wire import Record, decode, encode

__all__ = [
    "PRICES_VARIABLE",
    "GpuType",
    "PriceTable",
    "RegionPrices",
    "family",
    "load_table",
    "own_table_path",
    "plain",
    "read_table",
    "write_table",
]

PRICES_VARIABLE = "SPOTFIRST_PRICES"
"""Names a price table that counts before all others, whatever its date."""

_OWN_TABLE = Path(".local", "share", "spotfirst", "prices.json")


class GpuType(Record):
    """One instance type, as DescribeInstanceTypes has it. ``gpu_memory_mib`` is of one GPU.

    The names of types and GPUs are AWS's. A GPU that is sold as "24 GB" has 22,888 MiB.
    """

    vcpus: int
    memory_gib: float
    gpus: int
    gpu_name: str
    gpu_memory_mib: int


class RegionPrices(Record):
    """On-demand prices of one region for Linux and shared tenancy, and where they are from.

    ``at`` is when AWS published them, or when the source showed them.
    """

    at: datetime
    source: str
    url: str = ""
    usd_h: dict[str, Decimal]


class PriceTable(Record):
    """Types by name, and prices by region. A type may lack a price: it is then not known."""

    types: dict[str, GpuType] = {}
    types_source: str = ""
    regions: dict[str, RegionPrices] = {}


def family(instance_type: str) -> str:
    """``g6e`` of ``g6e.xlarge``: types that differ in size, and have the same GPU."""
    return instance_type.partition(".")[0]


def plain(amount: Decimal) -> Decimal:
    """The same without the zeros that AWS puts at the end, and never as ``3E+1``."""
    whole = amount.to_integral_value()
    return whole if whole == amount else amount.normalize()


def own_table_path(environment: Mapping[str, str] | None = None) -> Path:
    """Where a table of one's own is: ``$SPOTFIRST_PRICES``, or else in the home folder."""
    named = (os.environ if environment is None else environment).get(PRICES_VARIABLE, "")
    return Path(named).expanduser() if named else Path.home() / _OWN_TABLE


def load_table(environment: Mapping[str, str] | None = None) -> PriceTable:
    """The package's table, with what a table of one's own has for a region in its place.

    One that ``$SPOTFIRST_PRICES`` names counts in any case (it may hold negotiated prices, or be
    the same for all workers); one in the home folder where it is newer. Raises
    :class:`InvalidSpec` for a file that is missing though named, or is no price table.
    """
    packaged = resources.files(__package__).joinpath("prices.json").read_bytes()
    table = decode(packaged, PriceTable, path="prices.json")
    path = own_table_path(environment)
    is_named = bool((os.environ if environment is None else environment).get(PRICES_VARIABLE))
    own = read_table(path)
    if own is None:
        if is_named:
            msg = (
                f"{PRICES_VARIABLE} names {path}, and there is no such file: write it with "
                "`spotfirst prices refresh --region …`, or unset the variable"
            )
            raise InvalidSpec(msg)
        return table
    regions = dict(table.regions)
    for name, prices in own.regions.items():
        if is_named or name not in regions or prices.at >= regions[name].at:
            regions[name] = prices
    return msgspec.structs.replace(table, types=own.types | table.types, regions=regions)


def read_table(path: Path) -> PriceTable | None:
    """The table in a file; ``None`` if there is none. Raises :class:`InvalidSpec`."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        msg = f"the price table {path} cannot be read: {error}"
        raise InvalidSpec(msg) from error
    try:
        return decode(data, PriceTable, path=str(path))
    except FormatError as error:
        msg = f"{error}. A price table is written by `spotfirst prices refresh`"
        raise InvalidSpec(msg) from error


def write_table(path: Path, table: PriceTable) -> None:
    """Put the table in place of the one in this file, or leave that as it is.

    Raises :class:`InvalidSpec` when the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(msgspec.json.format(encode(table), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        msg = f"the price table {path} cannot be written: {error}; name another file with --out"
        raise InvalidSpec(msg) from error
