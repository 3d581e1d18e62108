"""No torch: does what its first word says, and tells each time it is started."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

what = sys.argv[1]
with (Path(os.environ["E2E_FOLDER"]) / "trace").open("a") as trace:
    trace.write(f"{os.environ['SPOTFIRST_ATTEMPT']} 0 {time.time()}\n")
print("this is the first line", flush=True)
if what == "fail" or (what == "fail-once" and os.environ["SPOTFIRST_ATTEMPT"] == "1"):
    print("Traceback: the disk of the moon is full", file=sys.stderr, flush=True)
    raise SystemExit(3)
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
