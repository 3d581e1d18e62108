"""How fast a state comes back: into a model that was just built, from files that are in no cache.

Spotfirst fills the memory of the model and makes new memory for the optimizer's state; torch.load
makes new memory for all and copies; ``dcp.load`` gets an optimizer whose state is made before, which
is not counted. The bare read goes into memory that is warm.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver

from benchmarks.checkpointing.limits import direct_read_s, forget, warm
from benchmarks.checkpointing.training import Size, Training
from benchmarks.checkpointing.writers import Spotfirst, state_of
from spotfirst.checkpointer import Checkpointer
from spotfirst.checkpoints.tensors import bytes_of

__all__ = ["compare", "fingerprint", "restore"]


def compare(size: Size, folder: Path, *, rounds: int) -> dict[str, list[float]]:
    """Seconds by way, each ``rounds`` times by turns. Raises when one is not bit-exact."""
    training = Training(size)
    training.step()
    ours, file, parts = folder / "spotfirst", folder / "state.pt", folder / "dcp"
    Spotfirst(training, str(ours)).save()
    torch.save(state_of(training), file)
    state_dict_saver.save(
        state_of(training), storage_writer=filesystem.FileSystemWriter(parts), no_dist=True
    )
    expected = fingerprint(training)
    os.sync()
    packs = sorted(path for path in (ours / "runs" / "local" / "packs").rglob("*-*"))
    memory = warm(sum(path.stat().st_size for path in packs) + 4096 * len(packs))

    def load_file(built: Training) -> None:
        state = torch.load(file, weights_only=True)
        built.model.load_state_dict(state["model"])
        built.optimizer.load_state_dict(state["optimizer"])

    def load_parts(built: Training) -> None:
        state = state_of(built)
        state_dict_loader.load(
            state, storage_reader=filesystem.FileSystemReader(parts), no_dist=True
        )
        built.model.load_state_dict(state["model"])
        built.optimizer.load_state_dict(state["optimizer"])

    ways: dict[str, Callable[[Training], object]] = {
        "spotfirst": lambda built: restore(built, str(ours)),
        "torch_load": load_file,
        "dcp_load": load_parts,
    }
    del training
    found: dict[str, list[float]] = {"direct_read": [], **{name: [] for name in ways}}
    for _ in range(rounds):
        found["direct_read"].append(direct_read_s(packs, memory.view))
        for name, load in ways.items():
            built = Training(size)
            if name == "dcp_load":
                built.step()
            forget(folder)
            start = time.perf_counter()
            load(built)
            found[name].append(time.perf_counter() - start)
            if fingerprint(built) != expected:
                msg = f"{name} restored another state than was saved"
                raise RuntimeError(msg)
            del built
    return found


def restore(built: Training, place: str) -> Checkpointer:
    """Restore a training with a Checkpointer."""
    checkpointer = Checkpointer(
        model=built.model, optimizer=built.optimizer, storage=place, period_s=1e9
    )
    checkpointer.restore()
    return checkpointer


def fingerprint(training: Training) -> str:
    """A hash of all bytes of the state."""
    digest = xxhash.xxh3_128()
    for tensor in training.tensors():
        digest.update(bytes_of(tensor))
    return digest.hexdigest()
