"""Lightning with several ranks."""

from __future__ import annotations

import pytest

from tests.integrations.conftest import Trainings, drained_once, needs

SCRIPT = "lightning_ranks_training"
pytestmark = [pytest.mark.slow, needs("lightning")]


@pytest.mark.parametrize("trainings", ["ddp"], indirect=True)
def test_two_ranks_that_are_interrupted_end_as_lightning_alone(trainings: Trainings) -> None:
    progress = drained_once(trainings)
    assert {"mean", "val_loss"} <= progress.metrics.keys()
