"""A tiny training that draws from every generator, and what an uninterrupted one ends with."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spotfirst.channel import Channel, Drain
from spotfirst.checkpointer import Checkpointer, Drained, weights_sha256
from spotfirst.context import TrainerContext
from spotfirst.heartbeat import Progress
from spotfirst.run import Run

STEPS = 12


class Trainer:
    """One process's worth: everything is built anew, with the same seeds."""

    def __init__(self, context: TrainerContext | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global generator is what is under test
        self.model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5),
            torch.nn.Linear(8, 1),
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 0.1, STEPS + 1)
        self.order = torch.Generator().manual_seed(7)
        self.checkpointer = Checkpointer(
            model=self.model, optimizer=self.optimizer, scheduler=self.scheduler,
            order=self.order, context=context, **options,
        )  # fmt: skip

    def train_one_step(self) -> torch.Tensor:
        inputs = torch.randn(6, 4, generator=self.order) * random.uniform(0.5, 1.5)
        inputs += float(np.random.standard_normal())  # noqa: NPY002 - as above
        loss: torch.Tensor = self.model(inputs).square().mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.scheduler.step()
        return loss

    def train(self, steps: int = STEPS, *, at_step: Callable[[int], None] = lambda _: None) -> str:
        """Train to the end; the weights' digest."""
        for step in self.checkpointer.steps(steps):
            at_step(step)
            self.checkpointer.report(loss=self.train_one_step())
        return weights_sha256(self.model)


def uninterrupted() -> str:
    """The weights' digest of a training without any Checkpointer's doing."""
    return Trainer().train()


def attempt(run: Run, number: int, folder: Path) -> TrainerContext:
    """What the agent would have set up for an attempt."""
    channel = folder / f"channel-{number}"
    channel.mkdir(parents=True, exist_ok=True)
    return TrainerContext(run, number, Channel(channel))


def ask_to_drain(context: TrainerContext) -> None:
    assert context.channel is not None
    context.channel.ask_to_drain(Drain(reason="interruption"))


def progress(context: TrainerContext) -> Progress:
    assert context.channel is not None
    told = context.channel.progress()
    assert told is not None
    return told


def train_until(context: TrainerContext, step: int, **options: Any) -> Trainer:
    """Train, and leave after ``step`` finished steps because the agent asks for it."""
    trainer = Trainer(context, **options)
    with pytest.raises(Drained) as left:
        trainer.train(at_step=lambda now: ask_to_drain(context) if now == step - 1 else None)
    assert (left.value.step, left.value.code) == (step, 0)
    return trainer
