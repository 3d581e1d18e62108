"""``spotfirst prices``: what EC2's GPU instances cost, and a fresh table of it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.error import HTTPError
from urllib.request import urlopen

import msgspec
import typer
from rich.table import Table
from rich.text import Text

from spotfirst.errors import FleetUnavailable, InvalidSpec
from spotfirst.wire import utc_now
from spotfirst_airflow.cli._common import (
    ErrorsAsLines,
    JsonOption,
    print_json,
    progress,
    stdout,
)

if TYPE_CHECKING:  # the fleet's package takes longer to import than most commands run
    from spotfirst_airflow.fleets.ec2.pricelist import Reading
    from spotfirst_airflow.fleets.ec2.pricetable import PriceTable

__all__ = ["app"]

_TIMEOUT_S = 60


class _ShowUnlessNamed(ErrorsAsLines):
    """``spotfirst prices g6.xlarge`` is ``spotfirst prices show g6.xlarge``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["show", *args]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


app = typer.Typer(
    cls=_ShowUnlessNamed,
    no_args_is_help=False,
    rich_markup_mode="markdown",
    help="Show what EC2's GPU instances cost on demand (`spotfirst prices [--region R] [TYPE…]`), "
    "or get a fresh table from AWS.",
)


@app.command("show")
def show(
    types: Annotated[
        list[str] | None, typer.Argument(metavar="[TYPE…]", help="Types; all when none is named.")
    ] = None,
    *,
    region: Annotated[
        str,
        typer.Option(
            envvar=["AWS_REGION", "AWS_DEFAULT_REGION"], help="Of AWS; all known when left out."
        ),
    ] = "",
    json: JsonOption = False,
) -> None:
    """Show the price table, with its date and its source.

    Prices are for Linux and shared tenancy. A type that is not listed has no known price there.

    Examples:

        spotfirst prices --region us-east-1

        spotfirst prices g6e.xlarge p5.4xlarge
    """
    from spotfirst_airflow.fleets.ec2.pricetable import load_table

    table = load_table()
    _check(table, types or [], region)
    rows = {
        name: _rows(table, name, types or []) for name in ([region] if region else table.regions)
    }
    if not any(rows.values()):
        where = region or "any region"
        msg = f"the price table has no price of {', '.join(types or [])} in {where}; {_how(region)}"
        raise InvalidSpec(msg)
    if json:
        print_json([row for region_rows in rows.values() for row in region_rows])
        return
    for name, found in rows.items():
        if found:
            _print_region(table, name, found)


@app.command("refresh")
def refresh(
    *,
    region: Annotated[
        str,
        typer.Option(envvar=["AWS_REGION", "AWS_DEFAULT_REGION"], help="Of AWS."),
    ] = "",
    source: Annotated[
        str, typer.Option("--from", metavar="FILE|URL", help="A list that you have; else AWS's.")
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="The table; else $SPOTFIRST_PRICES, or one in your home folder."),
    ] = None,
) -> None:
    """Read a region's prices from AWS's public price list, and keep them in a table of your own.

    The list has hundreds of MB, needs no account, and is not stored. Other regions of the table
    stay as they are. Where Airflow has several machines, put the table where all of them see it,
    and name it in `$SPOTFIRST_PRICES` on each.

    Examples:

        spotfirst prices refresh --region eu-central-1

        spotfirst prices refresh --region eu-west-1 --from index.csv --out /shared/prices.json
    """
    from spotfirst_airflow.fleets.ec2.pricelist import list_url
    from spotfirst_airflow.fleets.ec2.pricetable import (
        PRICES_VARIABLE,
        PriceTable,
        own_table_path,
        read_table,
        write_table,
    )

    if not region:
        msg = "no region: give --region, such as --region eu-central-1"
        raise InvalidSpec(msg)
    path = out or own_table_path()
    before = read_table(path) or PriceTable()  # before a long download: it may be no table
    reading = _read(source or list_url(region), region)
    table = msgspec.structs.replace(
        before,
        types=before.types | reading.types,
        regions={**before.regions, region: reading.prices},
    )
    write_table(path, table)
    count, day = len(reading.prices.usd_h), f"{reading.prices.at:%Y-%m-%d}"
    console = stdout()
    console.print(
        Text(f"{path}: {count} prices in {region}, of {reading.prices.source}, {day}"),
        soft_wrap=True,
    )
    if reading.others:
        text = f"left out, with other GPUs than those in the table: {', '.join(reading.others)}"
        console.print(Text(text), soft_wrap=True)
    if out is not None and out != own_table_path():
        console.print(Text(f"to use it: export {PRICES_VARIABLE}={out.absolute()}"), soft_wrap=True)


def _check(table: PriceTable, types: list[str], region: str) -> None:
    unknown = [name for name in types if name not in table.types]
    if unknown:
        msg = (
            f"the price table has no instance type {', '.join(map(repr, unknown))}; it has "
            f"{', '.join(table.types)}"
        )
        raise InvalidSpec(msg)
    if region and region not in table.regions:
        msg = f"the price table has no prices in {region}; {_how(region)}"
        raise InvalidSpec(msg)


def _how(region: str) -> str:
    return f"get them from AWS with `spotfirst prices refresh --region {region or 'REGION'}`"


def _rows(table: PriceTable, region: str, types: list[str]) -> list[dict[str, Any]]:
    """What there is to say of each type with a price, cheapest first."""
    prices = table.regions[region]
    names = [name for name in types or table.types if name in prices.usd_h]
    return [
        {
            "region": region,
            "instance_type": name,
            **msgspec.structs.asdict(table.types[name]),
            "on_demand_usd_h": prices.usd_h[name],
            "at": prices.at,
            "source": prices.source,
            "url": prices.url,
        }
        for name in sorted(names, key=lambda name: (prices.usd_h[name], name))
    ]


def _print_region(table: PriceTable, region: str, rows: list[dict[str, Any]]) -> None:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("type", "GPUs", "memory each", "vCPUs", "memory", "on demand/h"):
        shown.add_column(name, justify="left" if name in {"type", "GPUs"} else "right")
    for row in rows:
        shown.add_row(
            row["instance_type"], f"{row['gpus']} x {row['gpu_name']}",
            f"{row['gpu_memory_mib'] / 1024:.1f} GiB", str(row["vcpus"]),
            f"{row['memory_gib']:g} GiB", f"${row['on_demand_usd_h']}",
        )  # fmt: skip
    prices = table.regions[region]
    age = (utc_now() - prices.at).days
    console = stdout()
    console.print(Text(region, style="bold"))
    console.print(shown)
    text = f"{prices.source}, {prices.at:%Y-%m-%d} ({age} days ago)"
    console.print(Text(f"{text}: {prices.url}" if prices.url else text), soft_wrap=True)


def _read(source: str, region: str) -> Reading:
    """Read a list from a file or a URL, with a progress bar."""
    from spotfirst_airflow.fleets.ec2.pricelist import read_price_list
    from spotfirst_airflow.fleets.ec2.pricetable import load_table

    is_url = "://" in source
    with progress(f"prices of {region}") as (set_total, advance):
        try:
            with _open(source) as (stream, size):
                if size:
                    set_total(size)
                counted = _Counted(stream, advance)
                lines = io.TextIOWrapper(io.BufferedReader(counted, 2**20), "utf-8", newline="")
                reading = read_price_list(
                    lines, region, known=load_table({}), url=source if is_url else ""
                )
        except HTTPError as error:
            error.close()
            msg = f"{source} answered {error.code} {error.reason}"
            if error.code < 500:
                raise InvalidSpec(f"{msg}: is {region} a region of AWS's?") from error
            raise FleetUnavailable(f"{msg}: try again later") from error
        except (OSError, HTTPException) as error:
            if is_url:
                msg = f"{source} did not answer: {error}; try again, or give a file with --from"
                raise FleetUnavailable(msg) from error
            msg = f"the price list {source} cannot be read: {error}"
            raise InvalidSpec(msg) from error
    if size and counted.count != size:  # a connection that is cut looks like the end
        msg = f"{source} broke off after {counted.count} of {size} bytes: try again"
        raise FleetUnavailable(msg)
    return reading


@contextlib.contextmanager
def _open(source: str) -> Iterator[tuple[Any, int]]:
    """A stream of bytes, and how many there are (0: unknown)."""
    if "://" not in source:
        path = Path(source).expanduser()
        with path.open("rb") as file:
            yield file, path.stat().st_size
        return
    if not source.startswith(("https://", "http://")):
        msg = f"--from {source!r}: give a file, or a URL of http or https"
        raise InvalidSpec(msg)
    with urlopen(source, timeout=_TIMEOUT_S) as answer:  # noqa: S310  # only the two schemes above
        yield answer, int(answer.headers.get("Content-Length") or 0)


class _Counted(io.RawIOBase):
    """Passes bytes on, and says how many."""

    def __init__(self, stream: Any, advance: Callable[[int], None]) -> None:
        self._stream, self._advance = stream, advance
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        self._advance(len(data))
        return len(data)
