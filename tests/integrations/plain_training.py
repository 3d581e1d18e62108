from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from spotfirst.checkpointer import Checkpointer, weights_sha256
from spotfirst.integrations.dataloader import ResumableLoader
from tests.integrations.data import BATCH, EPOCHS, Net, Noisy, seed


def train(variant: str, *, resumable: bool) -> str:
    seed()
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 7, gamma=0.9)
    workers = 2 if variant == "two workers" else 0
    loader: DataLoader[Any] = DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers)

    def step(batch: dict[str, torch.Tensor]) -> None:
        loss = model.loss(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()

    if not resumable:
        for _ in range(EPOCHS):
            for batch in loader:
                step(batch)
        return weights_sha256(model)
    data = ResumableLoader(loader)
    checkpointer = Checkpointer(model=model, optimizer=optimizer, scheduler=scheduler, loader=data)
    done = checkpointer.restore()
    for _ in range(data.epoch, EPOCHS):
        for batch in data:
            step(batch)
            done += 1
            checkpointer.step(done)
    checkpointer.close()
    return weights_sha256(model)
