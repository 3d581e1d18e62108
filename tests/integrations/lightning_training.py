from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins import MixedPrecision
from torch.utils.data import DataLoader

from spotfirst.checkpointer import weights_sha256
from spotfirst.errors import InvalidSpec
from spotfirst.integrations.lightning import SpotfirstCallback
from tests.integrations.data import BATCH, EPOCHS, Net, Noisy, Streamed, seed


class Module(LightningModule):
    def __init__(self, *, sized: bool) -> None:
        super().__init__()
        self.sized = sized
        self.net = Net()

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        loss = self.net.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val_loss", self.net.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        steps = self.trainer.estimated_stepping_batches if self.sized else 100  # makes the loader
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, int(steps))
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def train(variant: str, *, resumable: bool) -> str:
    warnings.simplefilter("ignore")
    seed()
    streamed = variant == "streamed"
    module = Module(sized=not streamed)
    data: Any = Streamed() if streamed else Noisy()
    loader: DataLoader[Any] = DataLoader(
        data, BATCH, shuffle=not streamed, num_workers=2 if variant == "two workers" else 0
    )
    validation = DataLoader(Noisy(), 32)
    stop = EarlyStopping("val_loss", patience=50)
    scaler = torch.amp.GradScaler("cpu", init_scale=8, growth_interval=7)
    trainer = Trainer(
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if streamed else None,
        max_epochs=EPOCHS,
        accelerator="cpu",
        accumulate_grad_batches=1 if streamed else 2,
        val_check_interval=1.0 if streamed else 8,
        callbacks=[SpotfirstCallback(), stop] if resumable or variant == "refused" else [stop],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    if variant == "refused":
        trainer.strategy.connect(module)
        path = f"{tempfile.mkdtemp()}/some.ckpt"
        trainer.save_checkpoint(path)
        try:
            trainer.fit(module, loader, ckpt_path=path)
        except InvalidSpec as error:
            return str(error)
    trainer.fit(module, loader, validation)
    # What a callback has counted belongs to the result.
    return f"{weights_sha256(module)} {trainer.global_step} {stop.wait_count} {scaler.get_scale()}"
