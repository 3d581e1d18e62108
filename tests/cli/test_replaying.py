"""The replay in the README: another learning rate from a checkpoint on."""

from __future__ import annotations

import sys

import pytest

from tests.cli.shell import Shell

TRAINING = """
import os
import torch
from spotfirst import Checkpointer

torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=float(os.environ.get("LR", "0.1")))
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
checkpointer = Checkpointer(model=model, optimizer=optimizer, scheduler=scheduler, period_s=0)
for step in checkpointer.steps(6):
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    checkpointer.save()
    print("step", step, "rate", optimizer.param_groups[0]["lr"])
"""


@pytest.mark.torch
def test_a_replay_trains_with_the_learning_rate_that_was_set(shell: Shell) -> None:
    (shell.home / "code" / "train.py").write_text(TRAINING)
    spec = shell.spec(command=[sys.executable, "train.py"], checkpoint_mode="trainer")
    base = shell.ok("run", spec, "--run-id", "base")
    assert "step 2 rate 0.1\n" in base
    assert "step 5 rate 0.05\n" in base
    replay = shell.ok("replay", "base@3", "--run-id", "slow", "--set", "env.LR=0.0001")
    assert "step 2 " not in replay
    assert "step 3 rate 5e-05\n" in replay
    assert "step 5 rate 5e-05\n" in replay
    same = shell.ok("replay", "base@3", "--run-id", "same")
    assert "step 5 rate 0.05\n" in same
