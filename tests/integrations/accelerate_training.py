from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from spotfirst.checkpointer import weights_sha256
from spotfirst.errors import InvalidSpec
from spotfirst.integrations.accelerate import checkpointer
from spotfirst.integrations.dataloader import ResumableLoader
from tests.integrations.data import BATCH, EPOCHS, Net, Noisy, seed


class Model(Net):
    def forward(self, batch: Any) -> torch.Tensor:
        return self.loss(batch)


class Counter:
    def __init__(self) -> None:
        self.batches = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


def train(variant: str, *, resumable: bool) -> str:
    seed()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.9)
    workers = 2 if variant == "two workers" else 0
    loader: Any = DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if variant == "refused":
        try:
            checkpointer(accelerator, model=model, loader=loader)
        except InvalidSpec as error:
            return str(error)
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    saver = None
    done, first = 0, 0
    if resumable:
        loader = ResumableLoader(loader)
        saver = checkpointer(
            accelerator, model=model, optimizer=optimizer, scheduler=scheduler, loader=loader
        )
        done = saver.restore()
        first = loader.epoch
    for _ in range(first, EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            counter.batches += 1
            if saver and accelerator.sync_gradients:
                done += 1
                saver.step(done)
    if saver:
        saver.close()
    return f"{weights_sha256(accelerator.unwrap_model(model))} {counter.batches}"
