"""What each policy costs on recorded markets, beside what was published and what was possible.

`python -m benchmarks.policies [--quick] [--only TABLE…] [--policy NAME…] [--windows N]` plays the policies
of the product on recorded markets, by the code that decides and bills in production, beside Greedy and
Uniform Progress as published, and the least that was possible. The rules stand in `__init__.py`. Tables:

- ``v100``, ``h100``: SkyNomad's panels to the letter, in US dollars per run, by window or by
  deadline / work; ``v100_windows``, ``v100_zones``, ``h100_windows``, ``h100_zones``: the same where nobody looked;
- ``one_zone``: 48 h of work in each of nine zones, by deadline in hours, with a changeover of 12 minutes;
  ``one_zone_fast``: with 91 s; ``gang``: four nodes, all or none, in three zones;
- ``speed``: milliseconds per simulated run, and the memory that a longer market needs.

The last line is one JSON object: ``v100_mean_usd``, ``h100_mean_usd`` (by ratio), ``one_zone_usd`` (by deadline, then
by policy), ``missed_deadlines``, ``ms_per_run``, and every table whole under ``tables``. The traces are read from
``$SPOTFIRST_TRACES`` or ``../shared/traces``; without them nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from rich.table import Table

from benchmarks._figures import console, figures_table
from benchmarks.policies import speed, traces
from benchmarks.policies.figures import PUBLISHED, figures, late, means, worst_vs_on_demand
from benchmarks.policies.playing import OMNISCIENT, SEEING, Result, play_all
from benchmarks.policies.tables import TABLES, cases

_OURS = "spotfirst"
_POLICIES = (_OURS, "uniform_progress", "greedy", "on_demand")
_SPEED = "speed"
_WINDOWS, _QUICK_WINDOWS = 100, 3
_TICKS, _QUICK_TICKS, _FEW_TICKS = 1_000_000, 20_000, 1_000
_MEANS = ("one_zone", "one_zone_fast", "gang")


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.policies",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = [*TABLES, _SPEED]
    parser.add_argument("--quick", action="store_true", help="fewer starts per zone, within 50 s")
    parser.add_argument("--only", nargs="+", metavar="TABLE", choices=known, help=", ".join(known))
    parser.add_argument(
        "--policy", nargs="+", metavar="NAME",
        help=f"instead of the usual ones; NAME{SEEING} sees for nothing where there is spot",
    )  # fmt: skip
    parser.add_argument("--windows", type=int, metavar="N", help="starts per zone")
    options = parser.parse_args()
    if not traces.is_there():
        message = f"no traces in {traces.folder()}; set SPOTFIRST_TRACES to where they are"
        print(f"Skipped: {message}.")
        print(json.dumps({"skipped": message}))
        return
    windows = options.windows or (_QUICK_WINDOWS if options.quick else _WINDOWS)
    policies = tuple(options.policy or _POLICIES)
    only = options.only or known
    ms: dict[int, float] = {}
    growth: int | None = None
    if _SPEED in only:  # first, and alone: the tables use all cores
        ms = speed.ms_per_run(policies[0])
        ticks = _QUICK_TICKS if options.quick else _TICKS
        growth = speed.growth_bytes(policies[0], ticks=ticks, than=_FEW_TICKS)
    results = play_all(cases([name for name in only if name in TABLES], windows=windows), policies)
    found = figures(results, policies, ms, growth)
    terminal = console()
    for name, rows in means(results).items():
        terminal.print(_table(name, rows, [*policies, OMNISCIENT]))
        terminal.print()
    if worst := _worst(results, policies):
        terminal.print(_table("one_zone / on demand", worst, policies))
        terminal.print()
    terminal.print(figures_table(found))
    print(json.dumps(_json(results, policies, ms, growth) | {
        "met": sum(each.met is True for each in found),
        "missed": [each.name for each in found if each.met is False],
        "windows": windows,
        "cores": os.cpu_count(),
    }))  # fmt: skip


def _worst(results: Sequence[Result], policies: Sequence[str]) -> dict[str, dict[str, float]]:
    """By zone and policy."""
    alone = [result for result in results if result.case.table == "one_zone"]
    by_policy = {policy: worst_vs_on_demand(alone, policy) for policy in policies}
    zones = next(iter(by_policy.values()), {})
    return {zone: {policy: by_policy[policy][zone] for policy in policies} for zone in zones}


def _table(name: str, rows: Mapping[str, Mapping[str, float]], policies: Sequence[str]) -> Table:
    """Rows and their mean by policy, and what was published beside."""
    published = PUBLISHED.get(name, {})
    table = Table(name, box=None, pad_edge=False, header_style="bold")
    for policy in (*policies, *(f"{each}, published" for each in published)):
        table.add_column(policy.replace("_", " "), justify="right")

    def cells(row: Mapping[str, float], then: Sequence[float]) -> list[str]:
        values = [row.get(policy) for policy in policies]
        return ["" if value is None else f"{value:.2f}" for value in (*values, *then)]

    for label, row in rows.items():
        table.add_row(label, *cells(row, [usd[label] for usd in published.values()]))
    if len(rows) > 1:
        every = {
            p: mean(row[p] for row in rows.values())
            for p in policies
            if all(p in row for row in rows.values())
        }
        table.add_row(
            "mean", *cells(every, [mean(usd.values()) for usd in published.values()]), style="bold"
        )
    return table


def _json(
    results: Sequence[Result], policies: Sequence[str], ms: Mapping[int, float], growth: int | None
) -> dict[str, Any]:
    tables = means(results)
    missed = late(results, policies)
    v100 = [row[_OURS] for row in tables.get("v100", {}).values() if _OURS in row]
    h100 = {ratio: row[_OURS] for ratio, row in tables.get("h100", {}).items() if _OURS in row}
    found: dict[str, Any] = {
        "v100_mean_usd": round(mean(v100), 2) if v100 else None,
        "h100_mean_usd": h100,
        "one_zone_usd": tables.get("one_zone", {}),
        "one_zone_worst_vs_on_demand": _worst(results, policies),
        "missed_deadlines": sum(missed.values()),
        "missed_deadlines_by_policy": missed,
        "runs": len(results) * len(policies),
        "ms_per_run": max(ms.values()) if ms else None,
        "ms_per_run_by_zones": dict(ms),
        "growth_bytes": growth,
        "tables": tables,
    }
    return {key: _rounded(value) for key, value in found.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
