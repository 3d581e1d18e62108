"""Accelerate."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize("trainings", ["refused"], indirect=True)
def test_a_loader_that_cannot_say_where_it_is_is_refused(trainings: Trainings) -> None:
    assert "give ResumableLoader(loader)" in trainings.uninterrupted()
