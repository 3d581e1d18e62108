"""A training that takes milliseconds a step, and whose every draw matters to its last weights.

``E2E_FOLDER`` is where it tells what really happened, outside of what Spotfirst knows: a line in
``trace`` per step done (attempt, step, time). A file ``pace`` says how long a step takes. With
``E2E_FILL`` it fills the disk under its feet at that step.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
from pathlib import Path

import torch
from torch import nn

from spotfirst import Checkpointer
from spotfirst.checkpointer import weights_sha256

STEPS = int(sys.argv[1])
FOLDER = Path(os.environ["E2E_FOLDER"])
PACE_S = float(os.environ.get("E2E_PACE_S", "0.02"))
ATTEMPT = os.environ.get("SPOTFIRST_ATTEMPT", "0")


def pace_s() -> float:
    with contextlib.suppress(OSError, ValueError):
        return float((FOLDER / "pace").read_text())
    return PACE_S


torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
torch.manual_seed(7)
random.seed(7)

model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 8))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

checkpointer = Checkpointer(model=model, optimizer=optimizer, scheduler=scheduler)
for step in checkpointer.steps(STEPS):
    loss = (model(torch.randn(16, 32)) * random.random() - torch.randn(16, 8)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if str(step) == os.environ.get("E2E_FILL"):
        with contextlib.suppress(OSError), Path("ballast").open("wb", buffering=0) as ballast:
            while True:
                ballast.write(bytes(4096))
    time.sleep(pace_s())
    with (FOLDER / "trace").open("a") as trace:
        trace.write(f"{ATTEMPT} {step} {time.time()}\n")
    checkpointer.report(loss=loss)
print(f"weights {weights_sha256(model)}", flush=True)
