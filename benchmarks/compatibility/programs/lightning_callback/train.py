"""A LightningModule with a scheduler, accumulation, a metric, validation, and averaged weights."""

import logging
import os
import time
import warnings

import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.nn import functional as F

from spotfirst.checkpointer import weights_sha256
from spotfirst.integrations.lightning import SpotfirstCallback

PACE_S = float(os.environ["PACE_S"])

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
torch.set_num_threads(1)


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(16, 32),
            torch.nn.BatchNorm1d(32),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.2),
            torch.nn.Linear(32, 4),
        )

    def training_step(self, batch, number):
        x, y = batch
        loss = F.cross_entropy(self.net(x + 0.1 * torch.randn_like(x)), y)
        self.log("loss", loss)
        time.sleep(PACE_S)
        return loss

    def validation_step(self, batch, number):
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 2e-2, total_steps=self.trainer.estimated_stepping_batches
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


seed_everything(6, verbose=False)
x = torch.randn(400, 16)
data = torch.utils.data.TensorDataset(x, (x[:, :2] > 0).long() @ torch.tensor([1, 2]))
train, test = torch.utils.data.random_split(data, [320, 80])
module = Module()
average = EMAWeightAveraging(decay=0.95)
trainer = Trainer(
    max_epochs=6,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    callbacks=[SpotfirstCallback(), average],
)
trainer.fit(
    module,
    torch.utils.data.DataLoader(train, 16, shuffle=True),
    torch.utils.data.DataLoader(test, 16),
)
print(f"weights {weights_sha256(module)} accuracy {float(trainer.callback_metrics['accuracy'])!r}")
