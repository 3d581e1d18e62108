"""Counts steps, and shouts when two of it train the same run at once. Not torch: it must be quick."""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import time
from pathlib import Path

EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--step-s", type=float, default=0.1)
    parser.add_argument("--fail-at", type=int, default=-1, help="fail at this step, but only once")
    parser.add_argument("--trace", type=Path, required=True)
    options = parser.parse_args()
    folder = Path(os.environ["SPOTFIRST_CHECKPOINT_DIR"])
    options.trace.mkdir(parents=True, exist_ok=True)
    trace = options.trace / os.environ["SPOTFIRST_RUN"]
    attempt = os.environ["SPOTFIRST_ATTEMPT"]
    with trace.with_suffix(".lock").open("w") as lock, trace.open("a", buffering=1) as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.write(f"DOUBLE attempt {attempt}\n")
            sys.exit("another attempt is training this run")
        step = max((int(file.name) for file in folder.glob("[0-9]*")), default=0)
        log.write(f"start {attempt} {step} {os.getpid()}\n")
        print(f"training from step {step}", flush=True)  # noqa: T201
        while step < options.steps:
            failed = trace.with_suffix(".failed")
            if step == options.fail_at and not failed.exists():
                failed.touch()
                sys.exit("the script fails on purpose")
            time.sleep(options.step_s)
            step += 1
            if step % EVERY == 0:
                (folder / f"{step}").write_text("weights")
                (folder / f"{step - 5 * EVERY}").unlink(missing_ok=True)
            print(f"step {step} done", flush=True)  # noqa: T201
        log.write(f"end {attempt} {step}\n")


main()
