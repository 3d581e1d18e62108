"""A Lightning training of two ranks, with DDP and gloo."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from spotfirst.checkpointer import weights_sha256
from spotfirst.integrations.lightning import SpotfirstCallback
from tests.integrations.data import BATCH, EPOCHS, Net, Noisy, seed

RANKS = 2


class Module(LightningModule):
    """Each rank draws for itself, and has its own part of the means over an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.mean = MeanMetric()
        self.means: list[float] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = self.net.loss(batch)
        self.mean(loss.detach())
        self.log("mean", self.mean, on_step=False, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, batch_size=BATCH)
        return loss

    def on_train_epoch_end(self) -> None:
        metrics = self.trainer.callback_metrics
        self.means = [float(metrics["mean"]), float(metrics["loss_epoch"])]

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.net.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def train(variant: str, *, resumable: bool) -> str:
    """The result of rank 0, with a digest of what rank 1 has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    other = os.fork()
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(int(other == 0)),
        LOCAL_RANK=str(int(other == 0)),
        WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS),
        GROUP_RANK="0",
        TORCHELASTIC_RUN_ID="tests",
    )
    if other == 0:
        try:
            of_rank(resumable=resumable)
        except SystemExit as left:
            os._exit(int(left.code or 0))
        except BaseException:  # noqa: BLE001 - a fork must not go on as its parent would
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    try:
        return of_rank(resumable=resumable)
    finally:
        if os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]):
            msg = "rank 1 has failed"
            raise RuntimeError(msg)


def of_rank(*, resumable: bool) -> str:
    warnings.simplefilter("ignore")
    seed()
    module = Module()
    torch.manual_seed(int(os.environ["RANK"]))
    stop = EarlyStopping("val_loss", patience=50)
    trainer = Trainer(
        strategy="ddp",
        devices=RANKS,
        accelerator="cpu",
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        val_check_interval=5,
        callbacks=[SpotfirstCallback(), stop] if resumable else [stop],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    trainer.fit(module, DataLoader(Noisy(), BATCH, shuffle=True), DataLoader(Noisy(), 32))
    drawn = torch.rand(1)
    drawn_by_all = trainer.strategy.all_gather(drawn).flatten().tolist()
    return f"{weights_sha256(module)} {trainer.global_step} {module.means} {drawn_by_all}"
