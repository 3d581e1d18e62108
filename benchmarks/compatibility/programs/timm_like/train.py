"""Image classification as timm's train.py does it, in little: an epoch, an evaluation, the best score."""

import os
import random
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from spotfirst import Checkpointer
from spotfirst.checkpointer import weights_sha256
from spotfirst.integrations.dataloader import ResumableLoader

PACE_S = float(os.environ["PACE_S"])

EPOCHS, BATCH, CLASSES = 4, 16, 5

random.seed(3)
np.random.seed(3)
torch.manual_seed(3)
torch.set_num_threads(1)


class Pictures(torch.utils.data.Dataset):
    """Stripes whose width is the class; cropped and flipped at random, with three sources of chance."""

    def __init__(self, count, train):
        self.count, self.train = count, train

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        label = number % CLASSES
        x = torch.arange(20) + number
        picture = ((x // (label + 1)) % 2).float().expand(3, 20, 20).clone()
        left = top = 2
        if self.train:
            left, top = random.randint(0, 4), int(np.random.randint(5))
            picture += 0.3 * torch.randn(3, 20, 20)
            if torch.rand(()) < 0.5:
                picture = picture.transpose(1, 2)
        return picture[:, top : top + 16, left : left + 16], label


class Best:
    """The best score so far; what a script would keep in a variable."""

    def __init__(self):
        self.score, self.epoch = -1.0, -1

    def state_dict(self):
        return {"score": self.score, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.score, self.epoch = state["score"], state["epoch"]


model = nn.Sequential(
    nn.Conv2d(3, 16, 3, 2, 1),
    nn.BatchNorm2d(16),
    nn.ReLU(),
    nn.Dropout2d(0.1),
    nn.Conv2d(16, 32, 3, 2, 1),
    nn.BatchNorm2d(32),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Dropout(0.2),
    nn.Linear(32, CLASSES),
)
ema = torch.optim.swa_utils.AveragedModel(
    model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.95), use_buffers=True
)
optimizer = torch.optim.SGD(
    model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4
)
train = ResumableLoader(
    torch.utils.data.DataLoader(
        Pictures(250, train=True), BATCH, shuffle=True, drop_last=True, num_workers=2
    )
)
test = torch.utils.data.DataLoader(Pictures(50, train=False), 25)
updates = EPOCHS * len(train)
scheduler = torch.optim.lr_scheduler.SequentialLR(
    optimizer,
    [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10),
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates - 10),
    ],
    milestones=[10],
)
best = Best()


def validate(network):
    network.eval()
    with torch.no_grad():
        right = sum((network(x).argmax(1) == y).sum().item() for x, y in test)
    network.train()
    return right / 50


checkpointer = Checkpointer(
    model=model, ema=ema, optimizer=optimizer, scheduler=scheduler, train=train, best=best
)
checkpointer.expect(updates)
done = checkpointer.restore()
for epoch in range(train.epoch, EPOCHS):
    for number, (x, y) in enumerate(train, start=train.fetched):
        share = np.random.beta(0.4, 0.4)  # mixup
        other = torch.randperm(len(x))
        output = model(share * x + (1 - share) * x[other])
        loss = share * F.cross_entropy(output, y, label_smoothing=0.1)
        loss = loss + (1 - share) * F.cross_entropy(output, y[other], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
        ema.update_parameters(model)
        if number == len(train) - 1:
            score = validate(ema)
            if score > best.score:
                best.score, best.epoch = score, epoch
        time.sleep(PACE_S)
        done += 1
        checkpointer.step(done, loss=loss)
checkpointer.close()
print(f"weights {weights_sha256(model)} {weights_sha256(ema)} best {best.score!r} in {best.epoch}")
