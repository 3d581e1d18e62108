"""Ways to save a training state, with one interface: Spotfirst's, its peers in torch, and the bare work.

All are made durable (fsync), and each keeps one checkpoint: what is older is deleted, by the peers
outside of what is measured.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint import filesystem, state_dict_saver
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.checkpointing.limits import write_files
from benchmarks.checkpointing.training import Training
from spotfirst.checkpointer import Checkpointer
from spotfirst.checkpoints.memory import ALIGNMENT, Block, move
from spotfirst.checkpoints.packs import CHUNK_BYTES, chunk_digest
from spotfirst.checkpoints.retention import Retention

__all__ = ["WRITERS", "Bare", "DcpAsync", "Spotfirst", "TorchSave", "Writer"]


class Writer(Protocol):
    """Saves the state of one training again and again."""

    def begin(self) -> None:
        """Begin to save the step last finished; returns when training may go on."""

    def stepped(self) -> None:
        """Called after every step, as a training script would."""

    def took_s(self) -> float | None:
        """From :meth:`begin` until it was durable; ``None`` while it is not."""

    def waited_s(self) -> float:
        """How long ``optimizer.step()`` waited for the checkpoint since :meth:`begin`."""

    def tidy(self) -> None:
        """Delete what is older."""


class Spotfirst:
    """The Checkpointer, ``lazy`` or eager, in a folder or at a URL; ``keep`` checkpoints stay there."""

    def __init__(self, training: Training, place: str, *, lazy: bool = True, keep: int = 1) -> None:
        self._training = training
        self._waits: list[float] = []
        # Hooks run in the order in which they were made: these two are around the Checkpointer's.
        register_optimizer_step_pre_hook(lambda *_: self._waits.append(-time.perf_counter()))
        self.checkpointer = Checkpointer(
            model=training.model, optimizer=training.optimizer, storage=place, lazy=lazy,
            period_s=1e9, retention=Retention(last=keep),
        )  # fmt: skip
        self.checkpointer.restore()
        register_optimizer_step_pre_hook(lambda *_: self._waits.append(time.perf_counter()))
        self._seq = 0

    def begin(self) -> None:
        """See :class:`Writer`."""
        self._seq = self._newest()
        self._waits.clear()
        if not self.checkpointer.save(wait=False):
            msg = "the previous checkpoint is still being written; it should have been waited for"
            raise RuntimeError(msg)

    def stepped(self) -> None:
        """See :class:`Writer`."""
        self.checkpointer.step(self._training.done)

    def took_s(self) -> float | None:
        """See :class:`Writer`."""
        saved = self.checkpointer.last_saved
        return saved.took_s if saved is not None and saved.seq > self._seq else None

    def waited_s(self) -> float:
        """See :class:`Writer`."""
        return sum(self._waits)

    def tidy(self) -> None:
        """The Checkpointer does so by itself."""

    def save(self) -> float:
        """Save with the training stopped; the seconds from the snapshot to the commit."""
        self.checkpointer.step(self._training.done)
        self.checkpointer.save(wait=True)
        saved = self.checkpointer.last_saved
        assert saved is not None
        return saved.took_s

    def _newest(self) -> int:
        return saved.seq if (saved := self.checkpointer.last_saved) is not None else 0


class _InFolder:
    """What the others have in common: files in a folder, and no part in the steps between."""

    def __init__(self, place: str) -> None:
        self._folder = Path(place)
        self._folder.mkdir(parents=True)
        self._took_s: float | None = None

    def stepped(self) -> None:
        """See :class:`Writer`."""

    def took_s(self) -> float | None:
        """See :class:`Writer`."""
        return self._took_s

    def waited_s(self) -> float:
        """See :class:`Writer`."""
        return 0.0

    def tidy(self) -> None:
        """See :class:`Writer`."""
        _keep_newest(self._folder)


class Bare(_InFolder):
    """The least that saving beside a training on all cores takes: what the machine can do, and no more.

    One thread copies the state and hashes it, piece by piece; four write that to the
    disk. It never waits for the state to be whole, writes no manifest, and cannot be restored from.
    Its memory is as new at the first save, as it is for the others.
    """

    def __init__(self, training: Training, place: str) -> None:
        super().__init__(place)
        self._pieces: list[tuple[int, int, int]] = []
        end = 0
        for tensor in training.tensors():
            size = tensor.numel() * tensor.element_size()
            for start in range(0, size, CHUNK_BYTES):
                length = min(CHUNK_BYTES, size - start)
                self._pieces.append((end, tensor.data_ptr() + start, length))
                end += length
        self._memory = Block(end)
        self._size = -(-end // ALIGNMENT) * ALIGNMENT
        self._saves = 0
        self._began_s = 0.0

    def begin(self) -> None:
        """See :class:`Writer`."""
        self._saves += 1
        self._took_s = None
        self._began_s = time.perf_counter()
        threading.Thread(target=self._save, args=(self._folder / str(self._saves),)).start()

    def _save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        for position, address, length in self._pieces:
            move(self._memory.address + position, address, length)
            chunk_digest(self._memory.view[position : position + length])
        write_files(folder, self._memory.view[: self._size])
        self._took_s = time.perf_counter() - self._began_s


class TorchSave(_InFolder):
    """``torch.save`` to a file, then fsync. ``unsynced_s`` is what it took without the latter."""

    def __init__(self, training: Training, place: str) -> None:
        super().__init__(place)
        self._training = training
        self.unsynced_s: list[float] = []

    def begin(self) -> None:
        """See :class:`Writer`."""
        start = time.perf_counter()
        path = self._folder / f"{self._training.done}.pt"
        with path.open("wb") as file:
            torch.save(state_of(self._training), file)
            file.flush()
            self.unsynced_s.append(time.perf_counter() - start)
            os.fsync(file.fileno())
        self._took_s = time.perf_counter() - start


class DcpAsync(_InFolder):
    """``dcp.async_save`` in a thread, with a stager that keeps its memory, which is its best."""

    def __init__(self, training: Training, place: str) -> None:
        super().__init__(place)
        self._training = training
        on_gpu = training.device.type == "cuda"
        self._stager = DefaultStager(StagingOptions(on_gpu, False, False, False))

    def begin(self) -> None:
        """See :class:`Writer`."""
        start = time.perf_counter()
        self._took_s = None

        def done(future: Future[Any]) -> None:
            future.result()
            self._took_s = time.perf_counter() - start

        future = state_dict_saver.async_save(
            state_of(self._training),
            storage_writer=filesystem.FileSystemWriter(self._folder / str(self._training.done)),
            async_stager=self._stager,
            no_dist=True,
        )
        assert isinstance(future, Future)
        future.add_done_callback(done)


def state_of(training: Training) -> dict[str, Any]:
    """What the peers save: the same as a Checkpointer of both."""
    return {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "rng": torch.get_rng_state(),
    }


def _keep_newest(folder: Path) -> None:
    entries = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    for path in entries[:-1]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


WRITERS: dict[str, Callable[[Training, str], Writer]] = {
    "spotfirst": Spotfirst,
    "spotfirst_eager": lambda training, place: Spotfirst(training, place, lazy=False),
    "bare": Bare,
    "dcp_async": DcpAsync,
    "torch_save": TorchSave,
}
"""By name."""
