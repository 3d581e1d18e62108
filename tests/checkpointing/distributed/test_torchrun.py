from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spotfirst.channel import Channel
from spotfirst.checkpoints.weights import state_digest
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from tests.checkpointing.conftest import LONG_AGO

SCRIPT = Path(__file__).with_name("script.py")


def torchrun(run: Run, attempt: int, folder: Path, **environment: str) -> int:
    """Run the script with two processes, as an agent would; torchrun's exit code."""
    folder.mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "--max-restarts=1", "--monitor-interval=0.1", str(SCRIPT),
    ]  # fmt: skip
    variables = {
        "SPOTFIRST_STORAGE": run.root.url,
        "SPOTFIRST_RUN": run.run_id,
        "SPOTFIRST_ATTEMPT": str(attempt),
        "SPOTFIRST_CHANNEL": str(folder),
        "OMP_NUM_THREADS": "1",
        # Without it ranks that torchrun starts again may find the addresses of those that died.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    log = (folder / "log").open("w")
    with log:
        return subprocess.run(
            command, env=os.environ | variables | environment, check=False, timeout=120,
            stdout=log, stderr=subprocess.STDOUT,
        ).returncode  # fmt: skip


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again_drains_and_another_attempt_ends_the_same(
    tmp_path: Path,
) -> None:
    runs = []
    for name in ("r", "whole"):
        spec = RunSpec(run_id=name, created_at=LONG_AGO, command=("train",))
        runs.append(create_run(open_storage(str(tmp_path / "storage")), spec))
    run, whole = runs
    assert torchrun(run, 1, tmp_path / "1", KILL="yes") == 0, (tmp_path / "1/log").read_text()
    chain = run.chain().refresh()
    assert len(chain.claims) == 2  # each start of the ranks claims for itself
    assert chain.released
    told = Channel(tmp_path / "1").progress()
    assert told is not None
    assert told.released
    assert told.start_step is not None
    assert told.start_step >= 1  # it went on from a checkpoint
    assert chain.commits[-1][1].step >= 9
    assert torchrun(run, 2, tmp_path / "2", UNTIL="12") == 0, (tmp_path / "2/log").read_text()
    assert torchrun(whole, 1, tmp_path / "3", UNTIL="12") == 0
    ended = [each.chain().refresh().commits[-1][1] for each in runs]
    assert [commit.step for commit in ended] == [12, 12]
    assert state_digest(run.packs(), ended[0]) == state_digest(whole.packs(), ended[1])
