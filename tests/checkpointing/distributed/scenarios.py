"""What the ranks of a process group do in the tests; run by `server.py`."""

from __future__ import annotations

import hashlib
import os
import signal
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from spotfirst.distributed import SpotfirstReader, SpotfirstWriter

WIDTH = 37
"""Not divisible by 2 or 4: shards are uneven."""


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 50)
        self.norm = torch.nn.BatchNorm1d(50)
        self.down = torch.nn.Linear(50, 3, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.down(self.norm(self.up(inputs)).relu())
        return result


def wrapped(kind: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    net = Net()
    if kind == "fsdp" and dist.is_initialized():
        fully_shard(net)
    elif kind == "hsdp" and dist.is_initialized():
        shape = (2, dist.get_world_size() // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard"))
        fully_shard(net, mesh=mesh)
    elif kind == "ddp" and dist.is_initialized():
        return DistributedDataParallel(net)
    elif kind == "tp" and dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        net.norm = torch.nn.Identity()  # type: ignore[assignment]
        parallelize_module(net, mesh, plan)
    elif kind == "tp":
        net.norm = torch.nn.Identity()  # type: ignore[assignment]
    return net


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    torch.manual_seed(7)  # all ranks see the same, so that the world size does not matter
    for _ in range(steps):
        loss = net(torch.randn(8, WIDTH)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def built(kind: str, seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    net = wrapped(kind, seed)
    return net, torch.optim.AdamW(net.parameters(), lr=0.01)


def digest(state: dict[str, Any]) -> str:
    """Of all values in a nested state, put together from all ranks."""
    hasher = hashlib.sha256()

    def add(path: str, value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                add(f"{path}.{key}", value[key])
        elif isinstance(value, (list, tuple)):
            for position, item in enumerate(value):
                add(f"{path}.{position}", item)
        else:
            if isinstance(value, DTensor):
                value = value.full_tensor()
            if isinstance(value, torch.Tensor):
                value = (str(value.dtype), tuple(value.shape), value.detach().numpy().tobytes())
            hasher.update(repr((path, value)).encode())

    add("", state)
    return hasher.hexdigest()


def full_state(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(net, optimizer)
    return {
        "model": model_state,
        "optimizer": optimizer_state,
        "extra": {"epoch": 3, "history": [0.5, float("inf")], "name": "über", "pair": (1, b"x")},
    }


def save(storage: str, kind: str, step: int = 1, asynchronous: bool = False) -> str:
    net, optimizer = built(kind)
    train(net, optimizer)
    state = full_state(net, optimizer)
    writer = SpotfirstWriter(storage)
    if asynchronous:
        dcp.async_save(state, checkpoint_id=step, storage_writer=writer).result()
    else:
        dcp.save(state, checkpoint_id=step, storage_writer=writer)
    return digest(state)


def load(storage: str, kind: str, step: int | None = None) -> str:
    net, optimizer = built(kind, seed=1)
    reader = SpotfirstReader(storage)
    assert reader.step is not None
    state = full_state(net, optimizer)
    state["extra"] = {"epoch": 0, "history": [], "name": "", "pair": None}
    dcp.load(state, checkpoint_id=step, storage_reader=reader)
    set_state_dict(
        net, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    return digest(full_state(net, optimizer) | {"extra": state["extra"]})


def save_twice(storage: str) -> None:
    """The second time with one tensor changed."""
    torch.manual_seed(0)
    state = {f"w{n}": torch.randn(1000, 100) for n in range(4)} | {"n": 1}
    dcp.save(state, checkpoint_id=1, storage_writer=SpotfirstWriter(storage))
    state["w2"] += 1
    dcp.save(state, checkpoint_id=2, storage_writer=SpotfirstWriter(storage))


def die_while_saving(storage: str) -> None:
    torch.manual_seed(0)
    state = {f"w{n}": torch.randn(1000, 100) for n in range(4)}
    dcp.save(state, checkpoint_id=1, storage_writer=SpotfirstWriter(storage))

    class Dying(SpotfirstWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            future = super().write_data(plan, planner)
            if dist.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return future

    for value in state.values():
        value.add_(1)
    dcp.save(state, checkpoint_id=2, storage_writer=Dying(storage))
