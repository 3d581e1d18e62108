"""The Trainer of Hugging Face."""

from __future__ import annotations

import pytest

from tests.integrations.conftest import Trainings, drained_once, killed_often, needs

SCRIPT = "huggingface_training"
pytestmark = [pytest.mark.slow, needs("transformers")]


@pytest.mark.parametrize("trainings", ["shuffled"], indirect=True)
def test_kill_9_at_any_instant_leaves_the_weights_of_the_framework_alone(
    trainings: Trainings,
) -> None:
    killed_often(trainings)


@pytest.mark.parametrize("trainings", ["two workers", "skipping", "streamed"], indirect=True)
def test_a_notice_ends_it_at_a_step_boundary_and_the_next_goes_on_from_there(
    trainings: Trainings,
) -> None:
    progress = drained_once(trainings)
    assert {"loss", "eval_loss"} <= progress.metrics.keys()


@pytest.mark.parametrize("trainings", ["refused"], indirect=True)
def test_what_was_not_restored_or_would_be_made_again_is_not_trained(trainings: Trainings) -> None:
    forgotten, made_again = trainings.uninterrupted().splitlines()
    assert "begin with trainer.train(resume_from_checkpoint=resume(trainer))" in forgotten
    assert "give it model= instead" in made_again
