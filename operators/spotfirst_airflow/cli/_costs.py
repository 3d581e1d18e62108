"""``spotfirst cost``: what runs cost, row by row and summed."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from spotfirst.errors import InvalidSpec
from spotfirst.run import Run, list_runs
from spotfirst.spec import TAG_NAMES
from spotfirst.wire import Record, utc_now
from spotfirst_airflow.cli._common import (
    FAILED,
    JsonOption,
    StorageOption,
    existing_run,
    find_storage,
    moment,
    print_json,
    stdout,
    tell_broken,
)
from spotfirst_airflow.costs import Bill, bill, is_simulated, usd
from spotfirst_airflow.reading import read_runs

__all__ = ["cost"]


_FIGURES = {
    "seconds", "price/h", "cost", "between regions", "on demand", "runs", "attempts",
}  # fmt: skip


class _Account(Record):
    run_id: str
    tags: dict[str, str]
    bill: Bill


def cost(
    run_ids: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN…]", help="Runs; all when none is named.")
    ] = None,
    *,
    storage: StorageOption = "",
    by: Annotated[
        str, typer.Option(help="Sums by a tag: model_id, team, env or experiment_run.")
    ] = "",
    json: JsonOption = False,
) -> None:
    """Show what runs cost: one row per attempt, with its price and the rule that applied.

    What was paid for bytes between regions is shown apart where there is any; the sums hold it.
    A run that cannot be read is named, is missing from the sums, and makes the exit code 1.
    Prices were frozen when an instance was launched, so the answer never changes later.

    Examples:

        spotfirst cost night-1

        spotfirst cost --by team
    """
    if by and by not in TAG_NAMES:
        msg = f"--by {by!r}: costs are summed by {', '.join(TAG_NAMES)}"
        raise InvalidSpec(msg)
    place = find_storage(storage)
    if run_ids:
        run_ids = [existing_run(storage, run_id).run_id for run_id in run_ids]
    accounts, broken = read_runs(place, run_ids or list_runs(place), _account)
    if by:
        _print_sums(accounts, by, json=json)
    elif json:
        print_json([_as_json(account) for account in accounts])
    elif run_ids:
        _print_rows(accounts)
    else:
        _print_runs(accounts)
    tell_broken(broken)
    if broken:
        raise typer.Exit(FAILED)  # a sum that lacks a run must not pass for the whole


def _account(run: Run) -> _Account:
    tags = run.spec().tags
    state = run.journal().refresh()
    return _Account(run_id=run.run_id, tags=tags, bill=bill(state, now=utc_now(), tags=tags))


def _print_rows(accounts: Iterable[_Account]) -> None:
    console = stdout()
    for account in accounts:
        names = ["attempt", "market", "pool", "seconds", "price/h", "price from", "rule", "cost"]
        crosses = bool(account.bill.egress_usd)
        table = _table(*names, *(["between regions"] if crosses else []))
        for charge in account.bill.charges:
            mark = "~" if charge.is_estimate else ""
            table.add_row(
                str(charge.attempt), str(charge.market), str(charge.pool), f"{charge.used_s:.1f}",
                f"${charge.price_usd_h}", f"{charge.price_source}, {moment(charge.price_at)} UTC",
                charge.rule, f"{mark}{usd(charge.cost_usd, simulated=is_simulated(charge.price_source))}",
                *([usd(charge.egress_usd)] if crosses else []),
            )  # fmt: skip
        console.print(Text(account.run_id, style="bold"))
        console.print(table)
        tags = ", ".join(f"{k}={v}" for k, v in sorted(account.tags.items()))
        console.print(f"total {_total(account.bill)}" + (f"; {tags}" if tags else ""), markup=False)


def _print_runs(accounts: list[_Account]) -> None:
    table = _table("run", "attempts", "on demand", "cost")
    for account in accounts:
        table.add_row(
            Text(account.run_id), str(len(account.bill.charges)),
            usd(account.bill.known_on_demand_usd, simulated=account.bill.is_simulated),
            usd(account.bill.total_usd, simulated=account.bill.is_simulated),
        )  # fmt: skip
    console = stdout()
    console.print(table)
    for kind in (False, True):
        same = [a.bill.total_usd for a in accounts if a.bill.is_simulated is kind]
        # A run that cost nothing is of neither kind.
        if any(same) or not (kind or any(a.bill.total_usd for a in accounts)):
            console.print(f"total {usd(sum(same, Decimal(0)), simulated=kind)}")


def _print_sums(accounts: list[_Account], by: str, *, json: bool) -> None:
    # Dollars of a simulated market are never added to those that somebody pays.
    sums: dict[tuple[str, bool], list[_Account]] = {}
    for account in accounts:
        key = (account.tags.get(by, ""), account.bill.is_simulated)
        sums.setdefault(key, []).append(account)
    rows: list[dict[str, Any]] = [
        {
            by: name or None,
            "is_simulated": simulated,
            "runs": len(members),
            "cost_usd": sum((a.bill.total_usd for a in members), Decimal(0)),
            "on_demand_usd": _on_demand_usd(members),
        }
        for (name, simulated), members in sorted(sums.items())
    ]
    if json:
        print_json(rows)
        return
    table = _table(by, "runs", "on demand", "cost")
    for row in rows:
        name = str(row[by] or "(no tag)")
        amounts = [row["on_demand_usd"], row["cost_usd"]]
        texts = [usd(amount, simulated=bool(row["is_simulated"])) for amount in amounts]
        table.add_row(Text(name), str(row["runs"]), *texts)
    stdout().print(table)


def _on_demand_usd(accounts: Iterable[_Account]) -> Decimal | None:
    """What the runs would have cost on demand; ``None`` while that of one is not known."""
    found = [a.bill.known_on_demand_usd for a in accounts if a.bill.charges]
    known = [amount for amount in found if amount is not None]
    return sum(known, Decimal(0)) if known and len(known) == len(found) else None


def _total(account: Bill) -> str:
    text = usd(account.total_usd, simulated=account.is_simulated)
    on_demand = usd(account.known_on_demand_usd, simulated=account.is_simulated)
    text += f", on demand {on_demand}"
    if account.saved_usd is None:
        return text
    return f"{text}: {usd(abs(account.saved_usd))} ({account.saving_in_words})"


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        right = name in _FIGURES
        table.add_column(name, justify="right" if right else "left")
    return table


def _as_json(account: _Account) -> dict[str, Any]:
    return {
        "run_id": account.run_id,
        "tags": account.tags,
        "charges": account.bill.charges,
        "total_usd": account.bill.total_usd,
        "egress_usd": account.bill.egress_usd,
        "on_demand_usd": account.bill.known_on_demand_usd,
        "saving_usd": account.bill.saved_usd,
        "is_simulated": account.bill.is_simulated,
        "lost_steps": account.bill.lost_steps,
    }
