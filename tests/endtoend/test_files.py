"""A script that knows nothing of Spotfirst comes to the same result, however often it is killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

from spotfirst.checkpoints.mirroring import mirror
from spotfirst.state import Phase
from tests.endtoend.driving import SCRIPTS, Place, driving

STEPS = 120
PLAN = "knk"


def uninterrupted(folder: Path) -> bytes:
    """The result of the script alone."""
    folder.mkdir()
    (folder / "pace").write_text("0")
    subprocess.run(
        [sys.executable, str(SCRIPTS / "unmodified.py"), str(STEPS), str(folder)],
        env={**os.environ, "E2E_FOLDER": str(folder)}, check=True,
    )  # fmt: skip
    return (folder / "result").read_bytes()


def test_a_script_that_only_writes_files_ends_with_the_same_file(
    place: Place, chance: random.Random, tmp_path: Path
) -> None:
    expected = uninterrupted(tmp_path / "alone")
    command = f'exec python unmodified.py {STEPS} "$SPOTFIRST_CHECKPOINT_DIR"'
    request = place.request(
        code="unmodified.py", command=("sh", "-c", command), checkpoint_mode="files",
        checkpoint_period_s=0.3,
    )  # fmt: skip
    with driving(place, request) as drive:
        for attempt, kind in enumerate(PLAN, start=1):
            began = drive.until_training(attempt)
            drive.until_step(attempt, step := began + chance.randint(0, 30))
            drive.slow(True)  # the replacement's start must not outlast the training
            print(f"attempt {attempt}, step {step}: {kind}")
            drive.interrupt(attempt, notice=kind == "n")
            drive.until_training(attempt + 1)
            drive.slow(False)
        assert drive.until_over().phase is Phase.SUCCEEDED, drive.story()
        assert len(drive.state.attempts) == len(PLAN) + 1, drive.story()
    assert {done.step for done in drive.trace()} == set(range(STEPS))
    assert len(drive.repeated()) < STEPS, "nothing was ever resumed"
    _, newest = drive.run.chain().refresh().commits[-1]
    mirror(drive.run.packs(), newest, tmp_path / "kept")
    assert (tmp_path / "kept" / "result").read_bytes() == expected
    assert len(list((tmp_path / "kept").glob("save-*.json"))) == 2
