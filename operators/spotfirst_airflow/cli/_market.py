"""``spotfirst market``: record a spot market, and look at recordings."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from spotfirst.market import Market, Pool
from spotfirst.run import list_runs
from spotfirst.storage import Storage
from spotfirst.wire import utc_now
from spotfirst_airflow.arguments import span
from spotfirst_airflow.cli._common import (
    JsonOption,
    find_storage,
    print_json,
    stderr,
    stdout,
    tell_broken,
)
from spotfirst_airflow.markets import Course, market_options
from spotfirst_airflow.markets.history import Line, Seen, append
from spotfirst_airflow.reading import read_runs

if TYPE_CHECKING:
    from spotfirst_airflow.fleets.ec2.aws import Aws

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Record the spot market of an account, and look at recordings, for `spotfirst simulate`.",
)


@app.command("record")
def record(
    folder: Annotated[Path, typer.Argument(help="Where the recordings go, one for each type.")],
    *,
    instance_type: Annotated[
        list[str], typer.Option("--instance-type", help="Of EC2; give it again for more.")
    ],
    region: Annotated[
        str, typer.Option(envvar=["AWS_REGION", "AWS_DEFAULT_REGION"], help="Of AWS.")
    ] = "",
    storage: Annotated[
        str, typer.Option(help="Also what the runs in this storage saw of each pool.")
    ] = "",
    every: Annotated[str, typer.Option(help="Again and again, until Ctrl-C: `10m`.")] = "",
) -> None:
    """Save what EC2 tells of its spot market, for later simulations of your trainings.

    Spot prices of the last 90 days in every zone, the price on demand, AWS's placement scores of
    this moment, and, with `--storage`, where your runs got instances, were refused, or lost them.
    One file for each type, `FOLDER/TYPE.jsonl`, to which only what is new is added, so do it as
    often as you like; it costs nothing. Prices do not tell whether there was capacity: where none
    of your runs tried, a simulation takes it as there.

    Examples:

        spotfirst market record market --region us-east-1 --instance-type g6.xlarge

        spotfirst market record market --instance-type g5.xlarge --storage s3://bucket/runs --every 10m

        spotfirst simulate --market market/g6.xlarge.jsonl --instance-type g6.xlarge --work 8h --deadline 12h
    """
    from spotfirst_airflow.fleets.ec2.aws import Aws, Identity

    pause = span("--every", every) if every else None
    aws = Aws.of(Identity(region=region, environment=os.environ))
    place = find_storage(storage) if storage else None
    try:
        while True:
            _record(aws, folder, instance_type, place, now=utc_now())
            if pause is None:
                return
            time.sleep(pause.total_seconds())
    except KeyboardInterrupt:
        stderr().print("stopped; all that was told is in the recordings")


def _record(
    aws: Aws, folder: Path, types: Iterable[str], place: Storage | None, *, now: datetime
) -> None:
    from spotfirst_airflow.fleets.ec2.history import market_lines, scores

    seen = _seen_by_runs(place) if place is not None else {}
    for name in types:
        lines = market_lines(aws, name, now=now)
        told, why_none = scores(aws, name, now=now)
        if why_none:
            stderr().print(Text(f"no placement scores of {name}: {why_none}", style="yellow"))
        mine = [line for pool, line in seen.get(name, ()) if pool.instance_type == name]
        path = folder / f"{name}.jsonl"
        count = append(path, [*lines, *told, *mine], instance_type=name, now=now)
        stdout().print(Text(f"{path}: {count} new lines"), soft_wrap=True)


def _seen_by_runs(place: Storage) -> dict[str, list[tuple[Pool, Line]]]:
    """By instance type: where runs got spot instances, were refused, or lost them."""
    found: dict[str, list[tuple[Pool, Line]]] = {}

    def saw(pool: Pool, at: datetime, *, there: bool) -> None:
        line = Seen(at=at, zone=pool.zone, there=there)
        found.setdefault(pool.instance_type, []).append((pool, line))

    states, broken = read_runs(place, list_runs(place), lambda run: run.journal().refresh())
    tell_broken(broken)
    for state in states:
        for attempt in state.attempts:
            if attempt.market is not Market.SPOT:
                continue
            if attempt.launched:
                saw(attempt.pool, attempt.launched.started_at, there=True)
            if attempt.ended and attempt.ended.cause == "interrupted":
                saw(attempt.pool, attempt.ended.ended_at, there=False)
            refused = attempt.not_launched
            if refused and refused.cause == "no_capacity":
                for pool in refused.pools or (attempt.pool,):
                    saw(pool, refused.at, there=False)
    return found


@app.command("show")
def show(
    files: Annotated[list[str], typer.Argument(help="Recordings: files, folders, or ZONE=FILE.")],
    *,
    inverted: Annotated[
        bool, typer.Option("--inverted", help="1 in these files means that there was none.")
    ] = False,
    prices: Annotated[str, typer.Option(help="A JSON file of prices by zone.")] = "",
    json: JsonOption = False,
) -> None:
    """Show what recordings hold: how often there was spot, for how long, and what it cost.

    Look here first whether 1 means *available* in your files: a market that is up 10 % of the time
    is more often one that was read the wrong way round.

    Example:

        spotfirst market show market/g6.xlarge.jsonl
    """
    from spotfirst_airflow.simulation.assuming import find_market

    options, zones, _ = find_market(files, zones=(), inverted=inverted, prices=prices)
    market = market_options(options)
    lasts_s = market.lasts_s()
    assert lasts_s is not None
    rows = [{"zone": zone, **_figures(market.course(zone), lasts_s)} for zone in zones]
    if json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("zone", "days", "with spot", "mean up", "mean down", "losses", "price/h"):
        table.add_column(name, justify="left" if name == "zone" else "right")
    for row in rows:
        table.add_row(
            row["zone"], f"{row['days']:.1f}", f"{row['share']:.0%}", _hours(row["up_h"]),
            _hours(row["down_h"]), str(row["losses"]), _prices(row),
        )  # fmt: skip
    stdout().print(table)


def _figures(course: Course, lasts_s: float) -> dict[str, Any]:
    """Of one zone, once through its recording. Hours, and dollars an hour weighted by time."""
    up: list[float] = []
    down: list[float] = []
    costs: list[tuple[float, float]] = []
    time_s, spell_s, was_up = 0.0, 0.0, course.at(0.0).capacity > 0
    while time_s < lasts_s:
        state = course.at(time_s)
        until_s = min(course.next_change(time_s), course.next_price_change(time_s), lasts_s)
        if (state.capacity > 0) is not was_up:
            (up if was_up else down).append(spell_s / 3600)
            spell_s, was_up = 0.0, not was_up
        spell_s += until_s - time_s
        if state.price_usd_h is not None:
            costs.append((until_s - time_s, state.price_usd_h))
        time_s = until_s
    losses = len(up)
    (up if was_up else down).append(spell_s / 3600)
    all_s = sum(seconds for seconds, _ in costs)
    return {
        "days": lasts_s / 86400,
        "share": sum(up) / (sum(up) + sum(down)),
        "up_h": mean(up) if up else None,
        "down_h": mean(down) if down else None,
        "losses": losses,
        "min_usd_h": min((usd for _, usd in costs), default=None),
        "mean_usd_h": sum(s * usd for s, usd in costs) / all_s if all_s else None,
        "max_usd_h": max((usd for _, usd in costs), default=None),
    }


def _hours(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:.1f} h"


def _prices(row: dict[str, Any]) -> str:
    if row["mean_usd_h"] is None:
        return "-"
    return f"${row['mean_usd_h']:.4f} ({row['min_usd_h']:.4f} - {row['max_usd_h']:.4f})"
