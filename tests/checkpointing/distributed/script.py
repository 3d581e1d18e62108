"""A user's script for torchrun. Rank 1 dies once; later the agent asks to leave."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from spotfirst import Checkpointer
from spotfirst.channel import CHANNEL_VARIABLE, Channel, Drain


def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = DistributedDataParallel(torch.nn.Linear(300, 300))
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def train_one_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(8, 300)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    dist.init_process_group("gloo")
    model, optimizer = build()
    checkpointer = Checkpointer(model=model, optimizer=optimizer, period_s=0)
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    for step in checkpointer.steps(1_000_000):
        train_one_step(model, optimizer)
        if step == 8 and not again and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 12 and dist.get_rank() == 0:
            Channel(Path(os.environ[CHANNEL_VARIABLE])).ask_to_drain(Drain(reason="interruption"))


if __name__ == "__main__":
    main()
