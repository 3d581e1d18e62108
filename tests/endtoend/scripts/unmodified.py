"""A training that knows nothing of Spotfirst: it keeps its state in a folder, its own way.

It saves by writing beside and renaming, keeps two saves, goes on from the newest that it finds, and
appends to a log. ``trace`` and ``pace`` are as in ``train.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path

STEPS, FOLDER = int(sys.argv[1]), Path(sys.argv[2])
TOLD = Path(os.environ["E2E_FOLDER"])

step, value = 0, 1
saves = sorted(FOLDER.glob("save-*.json"))
if saves:
    step, value = json.loads(saves[-1].read_text())
while step < STEPS:
    value = (value * 6364136223846793005 + step) % 2**64
    with (FOLDER / "log").open("a") as log:
        log.write(f"{step} {value}\n")
    pace_s = 0.02
    with contextlib.suppress(OSError, ValueError):
        pace_s = float((TOLD / "pace").read_text())
    time.sleep(pace_s)
    with (TOLD / "trace").open("a") as trace:
        trace.write(f"{os.environ.get('SPOTFIRST_ATTEMPT', '0')} {step} {time.time()}\n")
    step += 1
    if step % 5 == 0:
        partial = FOLDER / ".partial"
        partial.write_text(json.dumps([step, value]))
        partial.replace(FOLDER / f"save-{step:06d}.json")
        for old in sorted(FOLDER.glob("save-*.json"))[:-2]:
            old.unlink()
(FOLDER / "result").write_text(f"{value}\n")
