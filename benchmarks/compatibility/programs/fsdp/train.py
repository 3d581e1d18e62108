"""A transformer sharded by fully_shard over two processes (gloo); each has its own part of the data."""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from spotfirst import Checkpointer
from spotfirst.checkpointer import weights_sha256

PACE_S = float(os.environ["PACE_S"])

STEPS, BATCH, BLOCK, WIDTH, TOKENS = 60, 4, 16, 32, 64

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Sequential(
            nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.SiLU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)

    def forward(self, x):
        x = self.tokens(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


torch.manual_seed(11)
model = Model()
for layer in model.layers:
    fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
torch.manual_seed(100 + rank)  # each process its own data

checkpointer = Checkpointer(model=model, optimizer=optimizer, scheduler=scheduler)
for step in checkpointer.steps(STEPS):
    start = torch.randint(TOKENS, (BATCH, 1))
    x = (start + torch.arange(BLOCK + 1) * torch.randint(1, 5, (BATCH, 1))) % TOKENS
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    time.sleep(PACE_S)
    checkpointer.report(loss=loss)

full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
if rank == 0:
    whole = Model()
    whole.load_state_dict(full)
    print(f"weights {weights_sha256(whole)}", flush=True)
dist.destroy_process_group()
