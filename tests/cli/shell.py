"""The command line as a person uses it: real processes, a real local fleet, no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from spotfirst import events as e
from spotfirst.market import Market, Pool
from spotfirst.run import Run
from spotfirst.state import RunState
from spotfirst.storage import open_storage
from spotfirst_airflow.fleets.base import Fleet, load_fleet
from spotfirst_airflow.fleets.local import LocalFleet
from tests.waiting import PATIENCE_S

PROGRAM = (sys.executable, "-m", "spotfirst_airflow.cli")
TRAINING = """
import os, sys, time
from pathlib import Path

saved = Path(os.environ["SPOTFIRST_CHECKPOINT_DIR"]) / "step"
step = int(saved.read_text()) if saved.exists() else 0
BEGAN = step
print("begins at", step, flush=True)
total = int(os.environ.get("STEPS", "30"))
while step < total:
    step += 1
    time.sleep(0.05)
    if step % 10 == 0:
        print("step", step, flush=True)
    if step % 30 == 0 or step == total:  # less often than a file needs to settle
        part = saved.with_name(".part")
        part.write_text(str(step))
        part.replace(saved)
    if step == 60 and "HOLD" in os.environ:  # until it is interrupted; the next goes on from here
        del os.environ["HOLD"]
        time.sleep(0 if BEGAN else 100_000)
sys.exit(int(os.environ.get("EXIT_CODE", "0")))
"""


class Shell:
    """A home with a storage, a fleet and a training script, and a way to call ``spotfirst``."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.storage = home / "storage"
        code = home / "code"
        code.mkdir(parents=True)
        (code / "train.py").write_text(TRAINING)
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SPOTFIRST_")},
            "SPOTFIRST_STORAGE": str(self.storage),
            "SPOTFIRST_LOCAL_FLEET": str(home / "fleet"),
        }
        self.environment.pop("COLUMNS", None)

    def spec(self, name: str = "spec.json", **changes: Any) -> str:
        """Write a spec file; its path."""
        values = {
            "command": ["python", "train.py"],
            "code": "./code",
            "checkpoint_mode": "files",
            "checkpoint_period_s": 0.5,
            "instance_types": ["g6.xlarge"],
            **changes,
        }
        path = self.home / name
        path.write_text(json.dumps(values))
        return str(path)

    def start(self, *words: str, program: Sequence[str] = PROGRAM) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*program, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.home,
        )

    def call(self, *words: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=PATIENCE_S)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def ok(self, *words: str) -> str:
        """What a command printed that must succeed."""
        done = self.call(*words)
        assert done.returncode == 0, (
            f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
        )
        return done.stdout

    def json(self, *words: str) -> Any:
        return json.loads(self.ok(*words, "--json"))

    def state(self, run_id: str) -> RunState:
        return Run(open_storage(str(self.storage)), run_id).journal().refresh()

    def fleet(self) -> Fleet:
        return load_fleet("local", {"root": str(self.home / "fleet")}, environment={})

    def interrupt(self, run_id: str) -> None:
        """Take the newest attempt's instance back, with notice."""
        fleet = self.fleet()
        assert isinstance(fleet, LocalFleet)
        assert fleet.interrupt(self.state(run_id).attempts[-1].token)

    def is_training(self, run_id: str) -> bool:
        """Whether a checkpoint is there, so that a stop has something to keep."""
        run = Run(open_storage(str(self.storage)), run_id)
        return run.exists() and bool(run.chain().refresh().commits)


@contextmanager
def a_shell(home: Path) -> Iterator[Shell]:
    """Every instance is gone afterwards."""
    shell = Shell(home)
    try:
        yield shell
    finally:
        fleet = shell.fleet()
        fleet.terminate([instance.token for instance in fleet.owned()])


def launched(at: datetime) -> list[e.Event]:
    """The events of a run whose first instance was launched then, on spot, at a dollar an hour."""
    pool = Pool(instance_type="g6.xlarge", zone="a")
    return [
        e.Created(at=at),
        e.Launching(at=at, attempt=1, token="t", market=Market.SPOT, pool=pool, reason=""),
        e.Launched(
            at=at, attempt=1, instance_id="i", started_at=at, price_usd_h=Decimal(1),
            price_source="", price_at=at, on_demand_usd_h=Decimal(1),
        ),
    ]  # fmt: skip
