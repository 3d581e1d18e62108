"""Schedules of faults on a simulated EC2: whatever fails, dies and races, nothing leaks and nothing lies.

`python -m benchmarks.schedules [--n 10000] [--quick] [--seed S] [--jobs J]` plays that many schedules.
In each, the controller, the EC2 fleet, the policies and the reaper as they are in production look
after one run on a cloud that is drawn from the schedule's seed (`tests/fakes/`), while calls are
refused, answers get lost, processes die or are held up in the middle of a call, and instances are
taken back. The last line is one JSON object:

- ``schedules``: how many were played; ``seed``: of the first one, the others follow;
- ``faults``: how many were injected, at calls of controllers, the reaper and agents;
- ``violations``: in how many schedules something did not hold (target: 0). What, and the seed to
  play it again (``--n 1 --seed S --story``), is printed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.fakes.schedules import Outcome, play, story

_QUICK = 200


def _outcomes(seeds: range, jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(play, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(play, seeds, chunksize=5)
        finally:  # also when nobody wants the rest
            pool.shutdown(cancel_futures=True)


def _table(total: Counter[str], phases: Counter[str], faults: Counter[str], took_s: float) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    table.add_column()
    for name in ("schedules", "calls", "attempts", "instances", "interrupted", "reaped", "fenced"):
        table.add_row(
            f"{total[name]:,}",
            {
                "calls": "calls of AWS",
                "reaped": "reaped orphans",
                "fenced": "attempts that came to commit after their successor's claim",
            }.get(name, name),
        )
    table.add_row(f"{total['simulated_s'] / 3600:,.0f}", "simulated hours")
    for kind, count in sorted(faults.items()):
        table.add_row(f"{count:,}", f"faults: {kind}")
    for phase, count in sorted(phases.items()):
        table.add_row(f"{count:,}", f"runs that {phase}")
    table.add_row(f"{total['exact']:,}", "charges equal to the cloud's, to the last digit")
    table.add_row(f"{total['estimated']:,}", "charges with a time or price that AWS told late")
    table.add_row(f"{total['unpriced']:,}", "charges on-demand since nobody told the spot price")
    table.add_row(
        f"{total['untold']:,}",
        f"instances (${total['untold_usd_e4'] / 10_000:.4f}) that came true after they were given up, "
        "and whose launcher had died",
    )
    table.add_row(f"{took_s:,.0f}", "seconds")
    return table


def main() -> int:
    """Play them; 1 when something was violated."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=__doc__)
    parser.add_argument("--n", type=int, default=0, help="how many (10000)")
    parser.add_argument("--quick", action="store_true", help=f"only {_QUICK}")
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    parser.add_argument("--jobs", type=int, default=0, help="processes (one per core)")
    parser.add_argument("--within-s", type=float, default=0, help="play no more after this time")
    parser.add_argument("--story", action="store_true", help="tell what happens in one schedule")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # what fails here fails on purpose
    if options.story:
        print(story(options.seed))
        return 0
    count = options.n or (_QUICK if options.quick else 10_000)
    jobs = options.jobs or os.cpu_count() or 1
    total: Counter[str] = Counter()
    phases: Counter[str] = Counter()
    faults: Counter[str] = Counter()
    violated = 0
    began = time.monotonic()
    outcomes = track(
        _outcomes(range(options.seed, options.seed + count), jobs),
        description="schedules", total=count, console=Console(stderr=True), transient=True,
    )  # fmt: skip
    for outcome in outcomes:
        total["schedules"] += 1
        for name in (
            "calls", "attempts", "instances", "interrupted", "reaped", "exact", "estimated",
            "unpriced", "fenced",
        ):  # fmt: skip
            total[name] += getattr(outcome, name)
        total["untold"] += outcome.untold
        total["untold_usd_e4"] += int(outcome.untold_usd * 10_000)
        total["simulated_s"] += round(outcome.simulated_s)
        phases[outcome.phase] += 1
        faults.update(outcome.faults)
        if outcome.violations:
            violated += 1
            print(f"seed {outcome.seed}: {'; '.join(outcome.violations[:4])}", flush=True)
        if 0 < options.within_s < time.monotonic() - began:
            break
    Console().print(_table(total, phases, faults, time.monotonic() - began))
    figures = {
        "schedules": total["schedules"],
        "faults": faults.total(),
        "violations": violated,
        "seed": options.seed,
    }
    print(json.dumps(figures))
    return int(violated > 0)


if __name__ == "__main__":
    sys.exit(main())
