"""How fast a state comes back: into a model that was just built, from files that are in no cache.

Spotfirst fills the memory of the model and makes new memory for the optimizer's state; torch.load
makes new memory for all and copies; ``dcp.load`` gets an optimizer whose state is made before, which
is not counted. The bare read goes into memory that is warm, and once more into such as Spotfirst's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from torch.distributed.checkpoint import filesystem, state_dict_loader, state_dict_saver

from benchmarks.checkpointing.limits import direct_read_s, forget, own_memory, partly_new, warm
from benchmarks.checkpointing.training import Size, Training
from benchmarks.checkpointing.writers import Spotfirst, state_of
from spotfirst.checkpointer import Checkpointer
from spotfirst.checkpoints.tensors import bytes_of

__all__ = ["compare", "fingerprint", "restore"]

_LOADED_TIMES = 3
"""No way to restore needs more memory: the page cache, what was read, and where it belongs."""


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
    size_bytes = sum(path.stat().st_size for path in packs) + 4096 * len(packs)
    memory = warm(size_bytes)

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

    def timed(load: Callable[[Training], object], *, begun: bool = False) -> float:
        built = Training(size)
        if begun:
            built.step()
        forget(folder)
        own_memory(_LOADED_TIMES * size_bytes)
        start = time.perf_counter()
        load(built)
        took_s = time.perf_counter() - start
        if fingerprint(built) != expected:
            msg = "another state was restored than was saved"
            raise RuntimeError(msg)
        return took_s

    ways: dict[str, Callable[[], float]] = {
        "direct_read": lambda: direct_read_s(packs, memory.view),
        "direct_read_new": lambda: direct_read_s(packs, partly_new(size_bytes).view),
        "spotfirst": lambda: timed(lambda built: restore(built, str(ours))),
        "torch_load": lambda: timed(load_file),
        "dcp_load": lambda: timed(load_parts, begun=True),
    }
    del training
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        # There and back, so that nobody always comes after the same one.
        for name in list(ways)[:: -1 if number % 2 else 1]:
            found[name].append(ways[name]())
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
