"""``spotfirst simulate``: what a run would have cost, on markets that were recorded or drawn."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from spotfirst.errors import InvalidSpec
from spotfirst.wire import utc_now
from spotfirst_airflow.arguments import span, to_request
from spotfirst_airflow.budget import Budget
from spotfirst_airflow.cli._common import JsonOption, duration, print_json, stderr, stdout
from spotfirst_airflow.cli._specfile import read_spec_file
from spotfirst_airflow.submission import Request

if TYPE_CHECKING:  # only this command needs them
    from spotfirst_airflow.simulation.backtest import Backtest, Row
    from spotfirst_airflow.simulation.task import Task

__all__ = ["simulate"]

_TYPE = "g6.xlarge"
_ZONE_LETTERS = "abc"
_REGION = "us-east-1"
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B\s*")
_POWERS = ("", "k", "M", "G", "T")


def simulate(
    spec: Annotated[
        Path | None,
        typer.Argument(metavar="[SPEC]", help="A spec file, as of `spotfirst run`."),
    ] = None,
    *,
    work: Annotated[
        str, typer.Option(help="Training time without any interruption: `6h`, `90m`.")
    ] = "",
    deadline: Annotated[
        str, typer.Option(help="From the start, one or several: `8h,10h,12h`. [1.5 x the work]")
    ] = "",
    policy: Annotated[str, typer.Option(help="One or several: `greedy,on_demand`. [all]")] = "",
    market: Annotated[
        list[str] | None,
        typer.Option(
            help="`calibrated` (drawn by chance, as real zones are), `synthetic`, or recordings: a "
            "file, a folder, a 'pattern', or ZONE=FILE; repeat for several. [calibrated]"
        ),
    ] = None,
    scarcity: Annotated[
        str, typer.Option(help="Of the calibrated market: `plenty`, `usual` or `scarce`.")
    ] = "usual",
    inverted: Annotated[
        bool, typer.Option("--inverted", help="The recordings say 1 for *no* capacity.")
    ] = False,
    market_prices: Annotated[
        str, typer.Option(metavar="FILE", help="JSON with the prices of the recordings, by zone.")
    ] = "",
    starts: Annotated[int, typer.Option(min=1, help="From how many moments of the market.")] = 40,
    budget: Annotated[str, typer.Option(help="Dollars that a run may cost.")] = "",
    on_budget: Annotated[
        str, typer.Option(help="As it comes near: `stop`, `continue_cheaper` or `alert`. [stop]")
    ] = "",
    changeover: Annotated[str, typer.Option(help="From a launch to its first step; paid.")] = "95s",
    notice: Annotated[str, typer.Option(help="Warning before an interruption; 0s: none.")] = "2m",
    checkpoint_size: Annotated[
        str, typer.Option(help="What is brought along to another region: `5GB`.")
    ] = "5GB",
    egress: Annotated[str, typer.Option(help="Dollars per GB between regions.")] = "0.02",
    instance_type: Annotated[
        list[str] | None, typer.Option(help="May be launched; repeat for several.")
    ] = None,
    on_demand_price: Annotated[
        str, typer.Option(help="Dollars an hour, instead of the list's.")
    ] = "",
    spot_price: Annotated[
        str, typer.Option(help="Dollars an hour, where the market states none.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of a market that is drawn by chance.")] = 0,
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many at once. [one per core]")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Also a page with pictures, in one file.", metavar="FILE")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show what a training would have cost, and whether it would have been in time.

    The same policies, decisions and bill as in a real run; the market, the clock and the training
    are played. Each policy starts at the same moments. Nothing is launched, and no account is
    needed.

    A recording is a CSV with `date,availability`, or JSON with `metadata.gap_seconds`, `data` and
    perhaps `prices` (the format of public spot traces). Each file is a zone of one instance type.

    Examples:

        spotfirst simulate --work 8h --deadline 10h,12h,16h

        spotfirst simulate --work 8h --deadline 10h,12h,16h --html page.html

        spotfirst simulate spec.yaml --work 6h --policy uniform_progress,greedy

        spotfirst simulate --work 48h --deadline 60h --market traces --instance-type p3.2xlarge
    """
    from spotfirst_airflow.fleets.zones import region_of
    from spotfirst_airflow.policies import installed_policies
    from spotfirst_airflow.simulation.assuming import DRAWN, find_market, find_terms
    from spotfirst_airflow.simulation.backtest import PolicyChoice, backtest
    from spotfirst_airflow.simulation.setting import Setting
    from spotfirst_airflow.simulation.task import Task

    said: dict[str, str] = {}
    request = to_request(read_spec_file(spec)) if spec else Request()
    work_s = _work_s(work)
    deadlines_s = _deadlines_s(deadline, request, work_s, said)
    names = market or [DRAWN[0]]
    is_drawn = names[0] in DRAWN
    options, zones, market_said = find_market(
        names,
        zones=_zones(request),
        seed=seed,
        scarcity=scarcity,
        prices=market_prices,
        inverted=inverted,
    )
    said["market"] = market_said if market else f"{market_said}, as no --market is given"
    types = tuple(instance_type or request.instance_types) or ((_TYPE,) if is_drawn else ())
    terms, prices_said = find_terms(
        zones, types, on_demand_usd_h=_usd(on_demand_price, "--on-demand-price"),
        spot_usd_h=_usd(spot_price, "--spot-price"),
    )  # fmt: skip
    said["prices"] = "; ".join(prices_said)
    egress_usd_gb = _usd(egress, "--egress") or Decimal(0)
    task = Task(
        work_s=work_s,
        budget=_budget(budget, on_budget, request),
        changeover_s=_seconds(changeover, "--changeover"),
        notice_s=_seconds(notice, "--notice"),
        checkpoint_period_s=request.checkpoint_period_s,
        checkpoint_bytes=_bytes(checkpoint_size),
    )
    said["training"] = _task_said(task, egress_usd_gb, set(map(region_of, zones)))
    chosen = [
        PolicyChoice(name=name, options=request.policy_options if name == request.policy else {})
        for name in (_words(policy) or installed_policies())
    ]
    setting = Setting(market=options, pools=terms, egress_usd_gb=egress_usd_gb)
    total = len(chosen) * len(deadlines_s) * starts
    with _progress(total) as told:
        found = backtest(
            setting, task, chosen, deadlines_s=deadlines_s, starts=starts, processes=processes,
            told=told,
        )  # fmt: skip
    rows = found.rows()
    if html is not None:
        from spotfirst_airflow.simulation.pictures import render_page

        html.write_text(render_page(found, said), encoding="utf-8")
    if json:
        print_json(_plain(found, rows, said))
    else:
        _print(found, rows, said)
        if html is not None:
            stdout().print(Text(f"pictures: {html.absolute()}"), soft_wrap=True)


# -- what is shown ---------------------------------------------------------------------------


def _print(found: Backtest, rows: list[Row], said: dict[str, str]) -> None:
    console = stdout()
    for topic, sentence in said.items():
        console.print(Text(f"{topic}: {sentence}", style="dim"), soft_wrap=True)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("deadline", justify="right")
    shown.add_column("policy")
    for name in ("mean cost", "p10 - p90", "of on demand", "in time", "lost", "done after"):
        shown.add_column(name, justify="right")
    last = -1.0
    for row in rows:
        is_first, last = row.deadline_s != last, row.deadline_s or 0.0
        missed = row.runs - row.in_time
        in_time = f"{row.in_time}/{row.runs}"
        shown.add_row(
            (_hours(row.deadline_s) if row.deadline_s else "none") if is_first else "",
            Text(f"{row.policy} *" if row.is_best else row.policy, "green" if row.is_best else ""),
            f"${row.mean_usd:.2f}",
            f"{row.p10_usd:.2f} - {row.p90_usd:.2f}",
            f"{row.share_of_on_demand:.0%}",
            Text(
                f"{missed} missed, {in_time}" if missed else in_time, "bold red" if missed else ""
            ),
            f"{row.interruptions:.1f}",
            _hours(row.finished_s) if row.finished_s is not None else "-",
        )
    console.print()
    console.print(shown)
    console.print()
    work = _hours(found.task.work_s)
    text = f"On demand, {work} of work cost ${found.on_demand_usd:.2f}. "
    text += "* the cheapest that was always in time. Lost: instances that were interrupted."
    console.print(Text(text, style="dim"), soft_wrap=True)


def _plain(found: Backtest, rows: list[Row], said: dict[str, str]) -> dict[str, Any]:
    return {
        "said": said,
        "task": found.task,
        "pools": found.setting.pools,
        "market": found.setting.market,
        "on_demand_usd": found.on_demand_usd,
        "rows": rows,
        "runs": found.outcomes,
    }


def _hours(seconds: float) -> str:
    return f"{round(seconds / 3600, 1):g} h"


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, where that is a terminal; tell it how many runs are done."""
    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.update(task, completed=done)


# -- what is said ----------------------------------------------------------------------------


def _work_s(work: str) -> float:
    if not work:
        msg = "how long is the training? Give --work, such as --work 6h"
        raise InvalidSpec(msg)
    return _seconds(work, "--work", above=0)


def _deadlines_s(text: str, request: Request, work_s: float, said: dict[str, str]) -> list[float]:
    if text:
        return [_seconds(each, "--deadline", above=0) for each in _words(text)]
    if isinstance(request.deadline, datetime):
        return [_positive((request.deadline - utc_now()).total_seconds(), "the spec's deadline")]
    if request.deadline is not None:
        return [request.deadline.total_seconds()]
    said["deadline"] = f"1.5 x the work ({_hours(1.5 * work_s)}), as none is given"
    return [1.5 * work_s]


def _zones(request: Request) -> tuple[str, ...]:
    named = request.fleet_options.get("zones")
    if isinstance(named, (list, tuple)) and named:
        return tuple(map(str, named))
    region = request.fleet_options.get("region") or _REGION
    return tuple(f"{region}{letter}" for letter in _ZONE_LETTERS)


def _task_said(task: Task, egress_usd_gb: Decimal, regions: set[str]) -> str:
    parts = [f"{_hours(task.work_s)} of work", f"{duration(task.changeover_s)} for each start"]
    if task.notice_s > 0:
        parts.append(f"notices {duration(task.notice_s)} before")
    else:
        parts.append(f"no notices, a checkpoint every {duration(task.checkpoint_period_s)}")
    if len(regions) > 1 and task.checkpoint_bytes:
        size_gb = task.checkpoint_bytes / 10**9
        parts.append(f"{size_gb:g} GB to other regions at ${egress_usd_gb:f}/GB")
    if task.budget is not None:
        parts.append(f"a budget of ${task.budget.usd:f} ({task.budget.on_budget})")
    return ", ".join(parts)


def _budget(text: str, on_budget: str, request: Request) -> Budget | None:
    given = _usd(text, "--budget")
    amount = request.budget_usd if given is None else given
    if amount is None:
        return None
    choices = {"budget_usd": amount, "on_budget": on_budget or request.on_budget}
    return Budget(usd=amount, on_budget=to_request(choices).on_budget)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _seconds(text: str, option: str, *, above: float = -1) -> float:
    try:
        found = span(option, text)
    except InvalidSpec:
        found = None
    if found is None or found.total_seconds() <= above:
        msg = f"{option} {text!r} is no duration; give one such as 8h, 90m or 95s"
        raise InvalidSpec(msg)
    return found.total_seconds()


def _positive(seconds: float, what: str) -> float:
    if seconds <= 0:
        msg = f"{what} has passed; give --deadline"
        raise InvalidSpec(msg)
    return seconds


def _usd(text: str, option: str) -> Decimal | None:
    if not text:
        return None
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount < 0:
        msg = f"{option} {text!r} is no number of dollars, such as 25 or 0.36"
        raise InvalidSpec(msg)
    return amount


def _bytes(text: str) -> int:
    found = _SIZE.fullmatch(text)
    if not found:
        msg = f"--checkpoint-size {text!r} is no size; give one such as 5GB or 800MiB"
        raise InvalidSpec(msg)
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** _POWERS.index(found[2]))
