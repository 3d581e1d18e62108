"""A loop that gathers gradients over several steps is not cut between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spotfirst.channel import Channel, Drain
from spotfirst.checkpointer import Checkpointer, Drained, weights_sha256
from spotfirst.checkpoints.gathering import MOST_STEPS
from spotfirst.context import TrainerContext
from spotfirst.run import Run
from spotfirst.storage import open_storage

STEPS = 9


class Training:
    """Steps its optimizer every ``gathered`` steps; 0 for never."""

    def __init__(self, folder: Path | None, gathered: int) -> None:
        torch.manual_seed(0)
        self._gathered = gathered
        self._model = torch.nn.Linear(4, 1)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=0.1)
        self._channel = self._context = None
        if folder is not None:
            place = folder / f"channel-{len(list(folder.glob('channel-*')))}"
            place.mkdir()
            self._channel = Channel(place)
            run = Run(open_storage(str(folder / "s")), "r")
            self._context = TrainerContext(run, None, self._channel)

    def train(self, notice_after: int = 0, steps: int = STEPS, **options: Any) -> str | int:
        """The weights' digest; or the step after which it left."""
        checkpointer = Checkpointer(
            model=self._model, optimizer=self._optimizer, context=self._context, **options
        )
        try:
            for step in checkpointer.steps(steps):
                self._model(torch.randn(3, 4)).square().mean().backward()  # type: ignore[no-untyped-call]
                if self._gathered and (step + 1) % self._gathered == 0:
                    self._optimizer.step()
                    self._optimizer.zero_grad()
                if step + 1 == notice_after:
                    assert self._channel is not None
                    self._channel.ask_to_drain(Drain(reason="interruption"))
        except Drained as left:
            return left.step
        return weights_sha256(self._model)


@pytest.mark.parametrize("gathered", [1, 2, 4])
def test_a_notice_between_backward_and_optimizer_step_waits_for_that_step(
    gathered: int, tmp_path: Path
) -> None:
    whole = Training(None, gathered).train()
    for step in range(1, STEPS):
        folder = tmp_path / str(step)
        folder.mkdir()
        left = Training(folder, gathered).train(notice_after=step)
        if isinstance(left, int):
            assert left % gathered == 0
            left = Training(folder, gathered).train()
        assert left == whole, f"step {step}"


def test_a_periodic_checkpoint_waits_as_well(tmp_path: Path) -> None:
    Training(tmp_path, 4).train(steps=8, period_s=0)
    chain = Run(open_storage(str(tmp_path / "s")), "r").chain().refresh()
    assert {commit.step for _, commit in chain.commits} <= {4, 8}


def test_an_optimizer_that_never_steps_is_not_waited_for_without_end(tmp_path: Path) -> None:
    steps = MOST_STEPS + 20
    assert Training(tmp_path, 0).train(notice_after=10, steps=steps) == MOST_STEPS + 1
