"""A training on a clock that steps, and that the storage moves: it stores 1 MB/s."""

from __future__ import annotations

import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch

from spotfirst.channel import Drain
from spotfirst.checkpointer import Checkpointer, Drained
from spotfirst.context import TrainerContext
from spotfirst.run import Run
from spotfirst.storage import Storage
from tests.checkpointing.training import attempt, progress
from tests.waiting import PATIENCE_S

BOOT = datetime(2026, 1, 1, tzinfo=timezone.utc)
BYTES_PER_S = 1_000_000
STATE_S = 2.0
"""How long the state takes to be stored."""


class World:
    """A clock, a slow storage, and a training of one step a second."""

    def __init__(self, run: Run, folder: Path, *, period_s: float | Literal["auto"] = 1e9) -> None:
        self.now_s = 0.0
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.gate.set()
        self.packs: list[str] = []
        self.committed_at_s: list[float] = []
        self.run = run
        self.context: TrainerContext = attempt(
            Run(cast("Storage", SlowStorage(run.root, self)), run.run_id), 1, folder
        )
        self.weights = torch.nn.Parameter(torch.zeros(int(STATE_S * BYTES_PER_S) // 4))
        self.checkpointer = Checkpointer(
            model=torch.nn.ParameterList([self.weights]), context=self.context, period_s=period_s,
            clock=lambda: BOOT + timedelta(seconds=self.now_s), monotonic=lambda: self.now_s,
        )  # fmt: skip
        self.checkpointer.restore()
        self.done = 0

    def train(self) -> None:
        """One step, which changes everything."""
        with self.lock:
            self.now_s += 1.0
        with torch.no_grad():
            self.weights.add_(torch.rand_like(self.weights))
        self.done += 1
        self.checkpointer.step(self.done)

    def notice(self, left_s: float) -> float:
        """When everything has to be committed."""
        assert self.context.channel is not None
        by_s = self.now_s + left_s
        by = BOOT + timedelta(seconds=by_s)
        self.context.channel.ask_to_drain(Drain(reason="interruption", by=by))
        return by_s

    def drain(self, left_s: float) -> float:
        """Notice and leave; when everything had to be committed."""
        by_s = self.notice(left_s + 1.0)  # the step takes one of them
        with pytest.raises(Drained):
            self.train()
        return by_s

    def steps(self) -> list[int]:
        return [commit.step for _, commit in self.run.chain().refresh().commits]

    def warnings(self) -> str:
        return "\n".join(progress(self.context).warnings)


class SlowStorage:
    """A storage whose packs take their time, and stop before the gate while that is shut."""

    def __init__(self, inner: Storage, world: World) -> None:
        self._inner, self._world = inner, world

    def child(self, path: str) -> SlowStorage:
        return SlowStorage(self._inner.child(path), self._world)

    def write(self, path: str, data: bytes) -> None:
        self.write_from(path, memoryview(data))

    def write_from(self, path: str, data: memoryview) -> None:
        if len(data) > BYTES_PER_S:
            self._world.packs.append(path)
            assert self._world.gate.wait(PATIENCE_S)
        with self._world.lock:
            self._world.now_s += len(data) / BYTES_PER_S
        self._inner.write_from(path, data)

    def create(self, path: str, data: bytes) -> bool:
        created = self._inner.create(path, data)
        if b"manifest" in data:
            self._world.committed_at_s.append(self._world.now_s)
        return created

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)
