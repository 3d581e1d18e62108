"""Two processes that save with torch.distributed.checkpoint into step-N, keep two, load the newest."""

import os
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

PACE_S = float(os.environ["PACE_S"])

STEPS, EVERY = 60, 8
FOLDER = Path(os.environ["SPOTFIRST_CHECKPOINT_DIR"])

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(12)
model = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16))
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)


def numbers():
    return sorted(int(path.parent.name[5:]) for path in FOLDER.glob("step-*/.metadata"))


def state():
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


first = 0
if numbers():
    first = numbers()[-1]
    loaded = state()
    dcp.load(loaded, checkpoint_id=str(FOLDER / f"step-{first}"))
    set_state_dict(
        model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"]
    )
    if rank == 0:
        print(f"going on after step {first}", flush=True)
for step in range(first, STEPS):
    chance = torch.Generator().manual_seed(1000 * step + rank)
    x = torch.randn(8, 16, generator=chance)
    loss = (model(x) - x.roll(1, 1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    time.sleep(PACE_S)
    if (step + 1) % EVERY == 0:
        dist.barrier()
        dcp.save(state(), checkpoint_id=str(FOLDER / f"step-{step + 1}"))
        if rank == 0:
            for old in numbers()[:-2]:
                shutil.rmtree(FOLDER / f"step-{old}")
full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
if rank == 0:
    torch.save(full, FOLDER / "final.pt")
    time.sleep(0.5)
dist.destroy_process_group()
