"""What the ranks of a process group do in the tests; run by `server.py`."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import script
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from spotfirst.channel import Channel, Drain
from spotfirst.checkpointer import Checkpointer, weights_sha256
from spotfirst.checkpoints.packs import PackWriter
from spotfirst.context import TrainerContext
from spotfirst.distributed import SpotfirstReader, SpotfirstWriter
from spotfirst.distributed import reader as reader_module
from spotfirst.distributed.group import Group
from spotfirst.errors import ObjectMissing
from spotfirst.run import Run
from spotfirst.storage import Storage, open_storage

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
    elif kind == "2d":
        shape = (2, dist.get_world_size() // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
        net.norm = torch.nn.Identity()  # type: ignore[assignment]
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(net, mesh["tensor"], plan)
        fully_shard(net, mesh=mesh["data"])
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


def sharded(value: float) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(torch.full((1000, 50), value), mesh, [Shard(0)])


def save_value(storage: str, step: int) -> None:
    state = {"x": sharded(float(step))}
    dcp.save(state, checkpoint_id=step, storage_writer=SpotfirstWriter(storage))


def load_value(storage: str, blind: int | None = None) -> tuple[int | None, float]:
    """The step, and the one value that all elements have. Rank ``blind`` reads no newest manifest."""
    newest = Run(open_storage(storage), "local").chain().refresh().commits[-1][1].manifest
    read = reader_module.read_manifest

    def fail(packs: Storage, name: str, digest: str) -> Any:
        if name == newest:
            msg = f"{name} is gone"
            raise ObjectMissing(msg)
        return read(packs, name, digest)

    if rank() == blind:
        reader_module.read_manifest = fail  # type: ignore[assignment]
    reader = SpotfirstReader(storage)
    state = {"x": sharded(0.0)}
    dcp.load(state, storage_reader=reader)
    (value,) = set(state["x"].to_local().flatten().tolist())
    return reader.step, value


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


class Trainer:
    """A training under the Checkpointer, as one rank of several. Built anew, with the same seeds."""

    def __init__(self, kind: str, storage: str, folder: str = "", **options: Any) -> None:
        self.net, self.optimizer = built(kind)
        random.seed(rank())
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)
        self.order = torch.Generator().manual_seed(100 + rank())
        context = None
        if folder:
            channel = Channel(Path(folder)) if rank() == 0 else None
            context = TrainerContext(Run(open_storage(storage), "r"), 1, channel)
        self.checkpointer = Checkpointer(
            model=self.net, optimizer=self.optimizer, scheduler=self.scheduler, order=self.order,
            storage=None if folder else storage, context=context, **options,
        )  # fmt: skip

    def train_one_step(self) -> None:
        inputs = torch.randn(4, WIDTH, generator=self.order) * random.uniform(0.5, 1.5)
        loss = self.net(inputs + torch.randn(1)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()

    def digest(self) -> dict[str, Any]:
        """Of what all ranks have in common, and of what this one has of its own."""
        buffers = {name: value.tolist() for name, value in self.net.named_buffers()}
        own = [torch.get_rng_state().tolist(), random.getstate(), self.order.get_state().tolist()]
        common = full_state(self.net, self.optimizer)
        common["model"] = {k: v for k, v in common["model"].items() if "norm" not in k}
        return {
            "common": digest(common),
            "own": digest({"own": own, "scheduler": self.scheduler.state_dict()}),
            "buffers": digest(buffers),
        }


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def train_steps(
    storage: str, kind: str, steps: int, leave_after: int = 0, period_s: float = 1e9
) -> dict[str, Any]:
    """Train to ``steps``; or save after ``leave_after`` of them, and leave."""
    trainer = Trainer(kind, storage, period_s=period_s)
    done = 0
    first = None
    for step in trainer.checkpointer.steps(steps):
        first = step if first is None else first
        if leave_after and step == leave_after:
            trainer.checkpointer.save()
            break
        trainer.train_one_step()
        done += 1
    warnings = trainer.checkpointer._reporter.progress.warnings
    return trainer.digest() | {"first": first, "done": done, "warnings": list(warnings)}


def restored(storage: str, kind: str) -> dict[str, Any]:
    """What is there after restoring."""
    trainer = Trainer(kind, storage)
    step = trainer.checkpointer.restore()
    warnings = trainer.checkpointer._reporter.progress.warnings
    return trainer.digest() | {"step": step, "warnings": list(warnings)}


def meetings(storage: str, step_s: float, steps: int) -> tuple[int, float]:
    """How often the ranks met, and in how many seconds."""
    met = 0
    say = Group.say
    hear = Group.hear

    def count(group: Group, *arguments: Any) -> Any:
        nonlocal met
        met += 1
        return (say if group.leads else hear)(group, *arguments)

    Group.say = Group.hear = count  # type: ignore[method-assign,assignment]
    model = torch.nn.Linear(2, 2)
    checkpointer = Checkpointer(model=model, storage=storage, period_s=1e9)
    began = time.monotonic()
    for _ in checkpointer.steps(steps):
        time.sleep(step_s)
    return met, time.monotonic() - began


def fail_on_rank_1(storage: str) -> list[str]:
    """The second save fails on rank 1 only, the third is well."""
    trainer = Trainer("ddp", storage, period_s=1e9)
    checkpointer = trainer.checkpointer
    checkpointer.restore()
    errors = []
    for step in (1, 2, 3):
        trainer.train_one_step()
        checkpointer.step(step)
        if rank() == 1 and step == 2:
            working = PackWriter.place
            PackWriter.place = broken  # type: ignore[method-assign]
        try:
            checkpointer.save()
        except Exception as error:  # noqa: BLE001 - the test looks at it
            errors.append(f"{step}: {error}")
        if rank() == 1 and step == 2:
            PackWriter.place = working  # type: ignore[method-assign]
    return errors


def broken(*_: Any) -> Any:
    msg = "the disk is on fire"
    raise OSError(msg)


def without_a_group(storage: str) -> None:
    dist.destroy_process_group()
    try:
        Checkpointer(model=Net(), storage=storage).restore()
    finally:
        dist.init_process_group("gloo", init_method=f"file://{storage}-again", rank=rank(),
                                world_size=2)  # fmt: skip
        dist.barrier()  # the first to end removes the store's file


def drained(storage: str, folder: str, after: int) -> None:
    trainer = Trainer("ddp", storage, folder, period_s=1e9)
    for step in trainer.checkpointer.steps(100_000):
        trainer.train_one_step()
        if step == after and rank() == 0:
            Channel(Path(folder)).ask_to_drain(Drain(reason="interruption"))


def superseded(storage: str, folder: str) -> None:
    trainer = Trainer("ddp", storage, folder, period_s=0)
    for step in trainer.checkpointer.steps(100_000):
        trainer.train_one_step()
        if step == 3 and rank() == 0:
            Run(open_storage(storage), "r").chain().claim(2)


def unlike(storage: str) -> None:
    """Rank 1 has another model."""
    model = torch.nn.Linear(2, 2 + rank())
    checkpointer = Checkpointer(model=model, storage=storage)
    checkpointer.restore()
    checkpointer.step(1)
    checkpointer.save()


def train_without_a_checkpointer(steps: int) -> str:
    """The weights that `script.py` has to end with."""
    model, optimizer = script.build()
    for _ in range(steps):
        script.train_one_step(model, optimizer)
    return weights_sha256(model.module)


def each_for_itself(storage: str) -> list[str]:
    """The ranks train without talking to each other. Returns the warnings."""
    torch.manual_seed(rank())
    model = torch.nn.Linear(2, 2)
    checkpointer = Checkpointer(model=model, storage=storage)
    for _ in checkpointer.steps(1):
        pass
    return list(checkpointer._reporter.progress.warnings)


def alone_in_a_group(storage: str, local: str) -> dict[str, Any]:
    """One process with a process group, as under torchrun with one GPU, and FSDP2."""
    dist.init_process_group("gloo", init_method=f"file://{storage}-store", rank=0, world_size=1)
    trainer = Trainer("fsdp", storage, period_s=1e9, local=local)
    for _ in trainer.checkpointer.steps(trainer.checkpointer.restore() + 2):
        trainer.train_one_step()
    return trainer.digest() | {"step": trainer.checkpointer._step}
