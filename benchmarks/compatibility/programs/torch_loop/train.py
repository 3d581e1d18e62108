"""A small GPT on characters: batches by chance, dropout, AdamW, warm-up and cosine, clipping."""

import math
import os
import time

import torch
from torch import nn
from torch.nn import functional as F

from spotfirst import Checkpointer
from spotfirst.checkpointer import weights_sha256

PACE_S = float(os.environ["PACE_S"])

STEPS, BATCH, BLOCK, WIDTH = 80, 8, 32, 32

torch.manual_seed(1)
torch.set_num_threads(1)
text = "the quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 50
letters = sorted(set(text))
data = torch.tensor([letters.index(letter) for letter in text])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.attention = nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(0.1)
        )
        self.register_buffer("mask", torch.triu(torch.ones(BLOCK, BLOCK, dtype=torch.bool), 1))

    def forward(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, attn_mask=self.mask, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(len(letters), WIDTH)
        self.positions = nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, len(letters), bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        return self.head(self.blocks(self.tokens(x) + self.positions.weight))


def lr(step):
    return (step + 1) / 10 if step < 10 else 0.5 * (1 + math.cos(math.pi * step / STEPS))


model = GPT()
decay = [p for p in model.parameters() if p.dim() >= 2]
rest = [p for p in model.parameters() if p.dim() < 2]
optimizer = torch.optim.AdamW(
    [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=3e-3
)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lr)

checkpointer = Checkpointer(model=model, optimizer=optimizer, scheduler=scheduler)
for step in checkpointer.steps(STEPS):
    starts = torch.randint(len(data) - BLOCK - 1, (BATCH,))
    x = torch.stack([data[i : i + BLOCK] for i in starts])
    y = torch.stack([data[i + 1 : i + BLOCK + 1] for i in starts])
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    time.sleep(PACE_S)
    checkpointer.report(loss=loss)
print(f"weights {weights_sha256(model)}")
