"""How long a change of instance takes, with a real training on the local fleet.

`python -m benchmarks.changeover [--quick]` trains a small model with torch while instances are
taken back with notice again and again. The last line is one JSON object:

- ``startup_s_median``: how long the replacement's process and imports took to come up;
- ``changeover_s_median``: what it took from the notice to the first new step on the replacement,
  beyond that start-up: Spotfirst's own part (target: at most 3 s);
- ``notice_to_step_s_median``: both together;
- ``pause_s_median``: how long nothing was trained;
- ``lost_steps``: steps trained twice; ``n``: changes measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from spotfirst.run import Run
from spotfirst.state import RunState
from spotfirst.storage import open_storage
from spotfirst_airflow.changeovers import Changeover, changeovers, read_progress
from spotfirst_airflow.fleets.base import load_fleet
from spotfirst_airflow.following import Follower
from spotfirst_airflow.submission import Request, attach, request_stop

TARGET_S = 3.0
_TRAINING = Path(__file__).resolve().parent.parent / "dags" / "training" / "gpt"
_NOTICE_S = 12.0
"""Enough to start a replacement on a busy laptop; AWS gives 120."""
_CYCLE_S = 12.0
_ENDLESS = 1_000_000


def market(cycles: int) -> dict[str, object]:
    """Two zones that have room by turns: each change is an interruption with notice.

    A zone's room ends when the other's has come, and a notice comes ``_NOTICE_S`` before the end.
    """
    zones: dict[str, list[dict[str, float]]] = {
        "bench-a": [{"from_s": 0, "capacity": 4}],
        "bench-b": [{"from_s": 0, "capacity": 4}],
    }
    names = list(zones)
    for cycle in range(1, cycles + 1):
        leaving, staying = names[(cycle + 1) % 2], names[cycle % 2]
        zones[leaving].append({"from_s": cycle * _CYCLE_S, "capacity": 0})
        if cycle > 1:
            zones[staying].append({"from_s": cycle * _CYCLE_S - 1, "capacity": 4})
    for segments in zones.values():
        segments.sort(key=lambda segment: segment["from_s"])
    return {"kind": "scripted", "zones": zones}


def measure(folder: Path, *, changes: int, limit_s: float) -> tuple[Changeover, ...]:
    """Train until so many changes were seen, or the time is up."""
    storage = open_storage(str(folder / "storage"))
    request = Request(
        command=("python", "train.py", "--steps", str(_ENDLESS), "--log-every", "100"),
        code=str(_TRAINING),
        policy="spot_only",
        instance_types=("g6.xlarge",),
        fleet_options={
            "root": str(folder / "fleet"),
            "notice_s": _NOTICE_S,
            "market": market(changes + 1),
        },
        checkpoint_period_s=30.0,
        max_life_s=600.0,
    )
    run = attach(storage, "changeover", request, owner="benchmark", environment={})
    follower = Follower(lambda: (run, {}), show_output=False)
    give_up = time.monotonic() + limit_s
    found: tuple[Changeover, ...] = ()
    stopping = False
    while (wait_s := follower.look()) is not None:
        time.sleep(wait_s)
        state = follower.state
        if stopping or state is None:
            continue
        found = finished(run, state)
        if len(found) >= changes or time.monotonic() > give_up:
            request_stop(run, reason="measured enough")
            stopping = True
    assert follower.state is not None
    return finished(run, follower.state)[:changes]


def finished(run: Run, state: RunState) -> tuple[Changeover, ...]:
    """The changes whose replacement has begun to train, and whose old attempt has ended."""
    ended = {a.number for a in state.attempts if a.ended}
    every = changeovers(state, read_progress(run, state))
    return tuple(change for change in every if change.from_attempt in ended)


def show(found: tuple[Changeover, ...]) -> None:
    """One row per change."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "change",
        "why",
        "notice to step",
        "start-up",
        "changeover",
        "pause",
        "lost steps",
    ):
        table.add_column(name, justify="left" if name in {"change", "why"} else "right")
    for change in found:
        table.add_row(
            f"{change.from_attempt} → {change.to_attempt}",
            change.why,
            f"{change.changeover_s:.2f} s",
            f"{change.startup_s:.2f} s",
            f"{change.beyond_startup_s:.2f} s",
            f"{change.pause_s:.2f} s",
            "-" if change.lost_steps is None else str(change.lost_steps),
        )
    Console(highlight=False).print(table)


def main() -> None:
    """Measure and print; exit code 1 when nothing could be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.changeover", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two changes, within 50 s")
    options = parser.parse_args()
    with scratch() as folder:
        found = measure(
            folder,
            changes=2 if options.quick else 8,
            limit_s=38.0 if options.quick else 180.0,
        )
    if not found:
        print(json.dumps({"changeover_s_median": None, "startup_s_median": None, "n": 0}))
        sys.exit(1)
    show(found)
    print(
        json.dumps(
            {
                "changeover_s_median": round(median(c.beyond_startup_s for c in found), 3),
                "startup_s_median": round(median(c.startup_s for c in found), 3),
                "notice_to_step_s_median": round(median(c.changeover_s for c in found), 3),
                "pause_s_median": round(median(c.pause_s for c in found), 3),
                "lost_steps": sum(c.lost_steps or 0 for c in found),
                "target_s": TARGET_S,
                "n": len(found),
            }
        )
    )


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards, with every instance that was started in it."""
    folder = Path(tempfile.mkdtemp(prefix="spotfirst-bench-"))
    try:
        yield folder
    finally:
        fleet = load_fleet("local", {"root": str(folder / "fleet")}, environment={})
        fleet.terminate([instance.token for instance in fleet.owned()])
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
