"""Lightning alone: a checkpoint after each epoch, the CSV logger, and ckpt_path="last" to go on."""

import logging
import os
import time
import warnings
from pathlib import Path

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F

PACE_S = float(os.environ["PACE_S"])

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)
FOLDER = Path(os.environ["SPOTFIRST_CHECKPOINT_DIR"])


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(16, 32),
            torch.nn.BatchNorm1d(32),
            torch.nn.ReLU(),
            torch.nn.Linear(32, 4),
        )

    def training_step(self, batch, number):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        time.sleep(PACE_S)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)]


class Batches(torch.utils.data.Dataset):
    """In a fixed order: Lightning's own checkpoints do not hold the random numbers of an epoch."""

    def __init__(self):
        chance = torch.Generator().manual_seed(7)
        self.x = torch.randn(320, 16, generator=chance)
        self.y = (self.x[:, :2] > 0).long() @ torch.tensor([1, 2])

    def __len__(self):
        return len(self.x)

    def __getitem__(self, number):
        return self.x[number], self.y[number]


seed_everything(7, verbose=False)
module = Module()
trainer = Trainer(
    max_epochs=10,
    accelerator="cpu",
    logger=CSVLogger(FOLDER, "logs"),
    log_every_n_steps=5,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[ModelCheckpoint(FOLDER / "checkpoints", save_last=True, save_top_k=1)],
)
trainer.fit(module, torch.utils.data.DataLoader(Batches(), 16), ckpt_path="last")
torch.save({"weights": module.state_dict(), "steps": trainer.global_step}, FOLDER / "final.pt")
time.sleep(0.5)
