"""Lightning."""

from __future__ import annotations

import pytest

from tests.integrations.conftest import Trainings, drained_once, killed_often, needs

SCRIPT = "lightning_training"
pytestmark = [pytest.mark.slow, needs("lightning")]


@pytest.mark.parametrize("trainings", ["two workers"], indirect=True)
def test_kill_9_at_any_instant_leaves_the_weights_of_the_framework_alone(
    trainings: Trainings,
) -> None:
    killed_often(trainings)


@pytest.mark.parametrize("trainings", ["streamed"], indirect=True)
def test_a_notice_ends_it_at_a_step_boundary_and_the_next_goes_on_from_there(
    trainings: Trainings,
) -> None:
    progress = drained_once(trainings)
    assert {"train_loss", "val_loss"} <= progress.metrics.keys()


@pytest.mark.parametrize("trainings", ["refused"], indirect=True)
def test_a_checkpoint_of_lightning_does_not_overwrite_what_is_restored(
    trainings: Trainings,
) -> None:
    assert "load those weights into the module instead" in trainings.uninterrupted()
