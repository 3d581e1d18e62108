"""A loop with Accelerate: prepared objects, accumulation, clipping, shuffled data."""

import os
import time

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F

from spotfirst.checkpointer import weights_sha256
from spotfirst.integrations.accelerate import checkpointer as checkpointer_of
from spotfirst.integrations.dataloader import ResumableLoader

EPOCHS = 4

set_seed(10)
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
x = torch.randn(320, 12)
data = torch.utils.data.TensorDataset(x, x.cumsum(1))
model = torch.nn.Sequential(
    torch.nn.Linear(12, 32), torch.nn.GELU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 12)
)

PACE_S = float(os.environ["PACE_S"])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)
loader = torch.utils.data.DataLoader(data, 8, shuffle=True)
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
loader = ResumableLoader(loader)

checkpointer = checkpointer_of(
    accelerator, model=model, optimizer=optimizer, scheduler=scheduler, loader=loader
)
checkpointer.expect(EPOCHS * len(loader) // 2)
done = checkpointer.restore()
for _ in range(loader.epoch, EPOCHS):
    for inputs, targets in loader:
        with accelerator.accumulate(model):
            loss = F.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        time.sleep(PACE_S)
        if accelerator.sync_gradients:
            done += 1
            checkpointer.step(done, loss=loss)
checkpointer.close()
print(f"weights {weights_sha256(accelerator.unwrap_model(model))}")
