"""Steps and batches need not come in pairs; loaders may be read that no step is made with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.integrations.test_positions import EPOCHS, Loaders, Step, World


def several_steps_with_each_batch(loaders: Loaders, step: Step) -> None:
    loader = loaders[0]
    for _ in range(getattr(loader, "epoch", 0), EPOCHS):
        for batch in loader:
            for _ in range(3):
                step(batch)


def a_validation_in_the_body_after_the_step(loaders: Loaders, step: Step) -> None:
    loader, validation, *_ = loaders
    for _ in range(getattr(loader, "epoch", 0), EPOCHS):
        for batch in loader:
            step(batch)
            for _ in validation:
                torch.rand(())


def a_count_of_batches_that_begins_with_the_used_ones(loaders: Loaders, step: Step) -> None:
    loader = loaders[0]
    for _ in range(getattr(loader, "epoch", 0), EPOCHS):
        for number, batch in enumerate(loader, getattr(loader, "used", 0)):
            step(batch, torch.tensor(number))
            if number == 1:
                break


@pytest.mark.parametrize("kind", ["shuffled", "augmented", "streamed"])
@pytest.mark.parametrize(
    "shape",
    [
        several_steps_with_each_batch,
        a_validation_in_the_body_after_the_step,
        a_count_of_batches_that_begins_with_the_used_ones,
    ],
)
def test_wherever_the_notice_comes_the_loop_leaves_where_it_can_be_resumed(
    kind: str, shape: Callable[[Loaders, Step], None], tmp_path: Path
) -> None:
    samples = (6, 3, 3)
    whole = World(tmp_path, kind, samples).alone(shape)
    for step in range(1, len(whole)):
        folder = tmp_path / str(step)
        folder.mkdir()
        world = World(folder, kind, samples)
        seen = world.attempt(shape, left_after=step)
        if len(seen) < len(whole):
            seen += world.attempt(shape)
        assert seen == whole, f"step {step}"
