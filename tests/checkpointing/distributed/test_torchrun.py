from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spotfirst.channel import Channel
from spotfirst.checkpoints.weights import state_digest
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from tests.checkpointing.conftest import LONG_AGO
from tests.checkpointing.distributed.conftest import Ranks
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.torch

COMMAND = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
    "--max-restarts=1", "--monitor-interval=0.1", str(Path(__file__).with_name("script.py")),
]  # fmt: skip


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again_and_leaves_with_0_when_asked(
    ranks: Ranks, tmp_path: Path
) -> None:
    spec = RunSpec(run_id="r", created_at=LONG_AGO, command=("train",))
    run = create_run(open_storage(str(tmp_path / "storage")), spec)
    environment = {
        "SPOTFIRST_STORAGE": run.root.url,
        "SPOTFIRST_RUN": "r",
        "SPOTFIRST_ATTEMPT": "1",
        "SPOTFIRST_CHANNEL": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        # Without it ranks that torchrun starts again may find the addresses of those that died.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    with (tmp_path / "log").open("w") as log:
        ended = subprocess.run(
            COMMAND, env=os.environ | environment, check=False, timeout=PATIENCE_S,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    assert ended.returncode == 0, (tmp_path / "log").read_text()
    chain = run.chain().refresh()
    assert len(chain.claims) == 2  # each start of the ranks claims for itself
    assert {commit.attempt for _, commit in chain.commits} == {1}
    assert chain.released
    told = Channel(tmp_path).progress()
    assert told is not None
    assert told.released
    assert told.start_step  # it went on from a checkpoint
    _, last = chain.commits[-1]
    assert last.step >= 13
    expected = ranks.run("train_without_a_checkpointer", 2, steps=last.step)
    assert state_digest(run.packs(), last) == expected[0] == expected[1]
