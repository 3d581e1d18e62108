"""What training has frozen or unfrozen is so again, unless the script makes it otherwise now."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spotfirst.checkpointer import Checkpointer


def a_model(*frozen: str) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return model


def frozen_in(model: torch.nn.Module) -> set[str]:
    return {name for name, each in model.named_parameters() if not each.requires_grad}


@pytest.mark.parametrize(
    ("made", "trained", "made_now", "restored"),
    [
        ({"0.weight", "0.bias"}, {"0.bias"}, {"0.weight", "0.bias"}, {"0.bias"}),
        (set(), {"1.weight"}, set(), {"1.weight"}),
        ({"0.weight"}, {"0.weight"}, set(), set()),  # the script does not freeze it any more
        (set(), set(), {"0.weight"}, {"0.weight"}),  # it does so now
    ],
)
def test_parameters_are_frozen_as_they_were(
    made: set[str],
    trained: set[str],
    made_now: set[str],
    restored: set[str],
    tmp_path: Path,
) -> None:
    model = a_model(*made)
    checkpointer = Checkpointer(model=model, storage=str(tmp_path))
    checkpointer.restore()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in trained)
    checkpointer.step(1)
    checkpointer.close()
    for wrapped in (True, False):  # a restored training that is interrupted itself
        again = a_model(*made_now)
        given = torch.compile(again, backend="eager") if wrapped else again
        checkpointer = Checkpointer(model=given, storage=str(tmp_path))
        done = checkpointer.restore()
        assert frozen_in(again) == restored
        checkpointer.step(done + 1)
        checkpointer.close()
