"""Data and a model that draw from every generator: an inexact resume ends with other weights."""

from __future__ import annotations

import itertools
import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spotfirst.channel import Channel

FEATURES = 16
SAMPLES = 92  # not a multiple of the batch
BATCH = 4
EPOCHS = 2


class Noisy(torch.utils.data.Dataset[Any]):
    """The same samples for everyone, with noise from the generators of whoever reads them."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = random.random() + float(torch.rand(())) + float(np.random.random())  # noqa: NPY002
        x = torch.linspace(0, index % 7, FEATURES) + noise
        return {"x": x, "labels": x.sum()}


class Quiet(Noisy):
    """Nothing random: its samples may be skipped without reading them."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.linspace(0, index % 7, FEATURES)
        return {"x": x, "labels": x.sum()}


class Streamed(torch.utils.data.IterableDataset[Any]):
    """The same without a length."""

    def __iter__(self) -> Any:
        samples = Noisy()
        return (samples[index] for index in range(SAMPLES))


class Net(torch.nn.Module):
    """Dropout draws in the forward pass; BatchNorm has buffers. Large enough for lazy copies."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, 320),
            torch.nn.BatchNorm1d(320),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(320, 320),
            torch.nn.Linear(320, 1),
        )

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        _pace()
        result: torch.Tensor = (
            (self.layers(batch["x"]).squeeze(1) - batch["labels"]).square().mean()
        )
        return result


_passes = itertools.count(1)


def _pace() -> None:
    """Take ``STEP_S``. After ``HOLD_AFTER`` passes, wait to be killed, or to be asked to leave.

    So a training that is to be interrupted is not over before, however late that comes.
    """
    time.sleep(float(os.environ.get("STEP_S", "0")))
    if str(next(_passes)) == os.environ.get("HOLD_AFTER"):
        Path(os.environ["HELD_FILE"]).touch()
        channel = Channel.from_environment()
        assert channel is not None
        while channel.drain() is None:
            time.sleep(0.02)


def seed() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 - the global generator is what is under test
    torch.manual_seed(1)
