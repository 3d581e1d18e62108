"""Accelerate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.conftest import Trainings, drained_once, killed_often, needs

SCRIPT = "accelerate_training"
pytestmark = [pytest.mark.slow, needs("accelerate")]


@pytest.mark.parametrize("trainings", ["shuffled"], indirect=True)
def test_kill_9_at_any_instant_leaves_the_weights_of_the_framework_alone(
    trainings: Trainings,
) -> None:
    killed_often(trainings)


@pytest.mark.parametrize("trainings", ["two workers"], indirect=True)
def test_a_notice_ends_it_at_a_step_boundary_and_the_next_goes_on_from_there(
    trainings: Trainings,
) -> None:
    progress = drained_once(trainings)
    assert progress.released is not None


@pytest.mark.parametrize("is_scheduled", [False, True])
def test_a_learning_rate_that_the_script_sets_now_is_trained_with(
    is_scheduled: bool, tmp_path: Path
) -> None:
    from accelerate import Accelerator

    from spotfirst.integrations.accelerate import checkpointer

    def train(lr: float, steps: int, storage: Path) -> float:
        accelerator = Accelerator(cpu=True)
        model: Any = torch.nn.Linear(2, 1)
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=lr)
        scheduler: Any = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        scheduled = {"scheduler": scheduler} if is_scheduled else {}
        saver = checkpointer(
            accelerator, model=model, optimizer=optimizer, storage=str(storage), **scheduled
        )
        for _ in saver.steps(steps):
            accelerator.backward(model(torch.ones(4, 2)).square().mean())
            optimizer.step()
            if is_scheduled:
                scheduler.step()
            optimizer.zero_grad()
        return float(optimizer.param_groups[0]["lr"])

    train(0.1, 5, tmp_path / "run")
    again = train(0.001, 7, tmp_path / "run")
    assert again == pytest.approx(train(0.001, 7, tmp_path / "alone"))


@pytest.mark.parametrize("trainings", ["refused"], indirect=True)
def test_a_loader_that_cannot_say_where_it_is_is_refused(trainings: Trainings) -> None:
    assert "give ResumableLoader(loader)" in trainings.uninterrupted()
