"""A user's script for torchrun. It dies once on rank 1, and is asked to leave at step 8 later."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from spotfirst import Checkpointer
from spotfirst.channel import CHANNEL_VARIABLE, Channel, Drain

dist.init_process_group("gloo")
torch.manual_seed(0)
torch.set_num_threads(1)
model = DistributedDataParallel(torch.nn.Linear(300, 300))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
checkpointer = Checkpointer(model=model, optimizer=optimizer, period_s=0)
again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
for step in checkpointer.steps(1_000_000 if "UNTIL" not in os.environ else 12):
    model(torch.randn(8, 300)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if step == 4 and dist.get_rank() == 1 and not again and "KILL" in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)
    if step == 8 and dist.get_rank() == 0 and again:
        Channel(Path(os.environ[CHANNEL_VARIABLE])).ask_to_drain(Drain(reason="interruption"))
