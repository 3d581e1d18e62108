"""How long a script in files mode stands still for a capture: ``python -m benchmarks.filepause``.

A process with a file that is mapped to memory changes a share of its pages between captures. The
pause is from the first SIGSTOP to the last SIGCONT, the median of five captures. Nothing is uploaded
within it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

from spotfirst.agent.freezing import Freezer
from spotfirst.checkpoints.files import FileCheckpoints
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage

SCRIPT = """
import mmap, sys
path, size, share = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with open(path, "w+b") as file:
    for _ in range(size >> 20):
        file.write(b"x" * (1 << 20))
    file.flush()
    with mmap.mmap(file.fileno(), 0) as mapped:
        number = 0
        print("ready", flush=True)
        for _ in sys.stdin:
            number += 1
            for at in range(0, int(size * share), 1 << 20):
                mapped[at : at + 8] = number.to_bytes(8, "little")
            print("changed", flush=True)
"""


def measure(folder: Path, size_bytes: int, share: float) -> float:
    """The median pause in seconds."""
    work = folder / "work"
    work.mkdir(parents=True)
    spec = RunSpec(
        run_id="r", created_at=datetime.now(timezone.utc), command=("x",), checkpoint_mode="files"
    )
    run = create_run(open_storage(str(folder / "store")), spec)
    files = FileCheckpoints(run, 1, work, freeze=Freezer().frozen)
    files.restore()
    pauses = []
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(work / "table"), str(size_bytes), str(share)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as script:  # fmt: skip
        assert script.stdin is not None
        assert script.stdout is not None
        script.stdout.readline()
        files.capture()
        for _ in range(5):
            script.stdin.write("\n")
            script.stdin.flush()
            script.stdout.readline()
            files.capture()
            pauses.append(files.pause_s)
            time.sleep(0.1)
        script.stdin.close()
    return median(pauses)


def main() -> None:
    """Measure and print."""
    rows = [(1 << 20, 1.0), (256 << 20, 0.0), (256 << 20, 0.1), (256 << 20, 1.0), (1 << 30, 0.1)]
    found = []
    for size_bytes, share in rows:
        with tempfile.TemporaryDirectory() as folder:
            pause_s = measure(Path(folder), size_bytes, share)
        found.append({"size_mb": size_bytes >> 20, "changed": share, "pause_ms": 1000 * pause_s})
        print(f"{size_bytes >> 20:6} MiB, {share:4.0%} changed: {1000 * pause_s:7.1f} ms")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
