"""A training that is killed. Run as a script it imports torch once, and forks one for each order.

An order is a line ``storage attempt steps`` on its input; the answers are the process's id, and
``ended`` with its exit status.
"""

from __future__ import annotations

import os
import sys

import torch

from spotfirst.checkpointer import Checkpointer


def main() -> None:
    torch.set_num_threads(1)  # a fork inherits no thread pool
    for order in sys.stdin:
        process = os.fork()
        if process == 0:
            train(*order.split())
            os._exit(0)
        print(process, flush=True)  # noqa: T201
        print("ended", os.waitpid(process, 0)[1], flush=True)  # noqa: T201


def train(storage: str, attempt: str, steps: str) -> None:
    os.environ |= {
        "SPOTFIRST_STORAGE": storage,
        "SPOTFIRST_RUN": "r",
        "SPOTFIRST_ATTEMPT": attempt,
    }
    torch.manual_seed(0)
    # Large enough that a save is many writes, small enough that there are many saves.
    model = torch.nn.ModuleList(torch.nn.Linear(300, 300) for _ in range(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    checkpointer = Checkpointer(model=model, optimizer=optimizer, period_s=0)
    for _ in checkpointer.steps(int(steps)):
        inputs = torch.randn(4, 300)
        for layer in model:
            inputs = layer(inputs).relu()
        optimizer.zero_grad()
        inputs.square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


if __name__ == "__main__":
    main()
