"""Restoring a checkpoint of a script that has changed since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spotfirst.checkpointer import Checkpointer, weights_sha256
from spotfirst.errors import StateMismatch
from spotfirst.heartbeat import ExitReport
from spotfirst.run import Run
from tests.checkpointing.conftest import LONG_AGO
from tests.checkpointing.training import attempt, progress


def _model(**layers: torch.nn.Module) -> torch.nn.ModuleDict:
    torch.manual_seed(1)
    return torch.nn.ModuleDict(layers)


def _train(model: torch.nn.ModuleDict, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.fixture
def stored(run: Run, tmp_path: Path) -> torch.nn.ModuleDict:
    """The model of a checkpoint, beside an optimizer and an average that is gone later."""
    model = _model(
        body=torch.nn.Linear(2, 3), head=torch.nn.Linear(3, 2), old=torch.nn.Linear(1, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = Checkpointer(
        model=model, optimizer=optimizer, ema=torch.nn.Linear(1, 1),
        context=attempt(run, 1, tmp_path),
    )  # fmt: skip
    for _ in checkpointer.steps(4):
        _train(model, optimizer)
    run.report_exit(ExitReport(attempt=1, at=LONG_AGO, cause="completed"))
    return model


def _changed() -> tuple[torch.nn.ModuleDict, torch.optim.Optimizer]:
    model = _model(
        body=torch.nn.Linear(2, 3), head=torch.nn.Linear(3, 5), new=torch.nn.Linear(1, 1).half()
    )
    return model, torch.optim.AdamW(model.parameters())


def _checkpointer(run: Run, tmp_path: Path, **options: Any) -> Checkpointer:
    return Checkpointer(context=attempt(run, 2, tmp_path), **options)


DIFFERENCES = (
    "ema is in the checkpoint, and was not given to the Checkpointer",
    "extra is not in the checkpoint",
    "model: head.bias is float32[5] here and float32[2] in the checkpoint",
    "model: head.weight is float32[5, 3] here and float32[2, 3] in the checkpoint",
    "model: new.bias is not in the checkpoint",
    "model: old.weight is not in the model",
)


def test_what_differs_is_listed_and_nothing_is_changed(
    run: Run, tmp_path: Path, stored: torch.nn.ModuleDict
) -> None:
    model, optimizer = _changed()
    before = weights_sha256(model)
    checkpointer = _checkpointer(
        run, tmp_path, model=model, optimizer=optimizer, extra=torch.nn.Linear(1, 1)
    )
    with pytest.raises(StateMismatch) as refusal:
        checkpointer.restore()
    for line in (*DIFFERENCES, "strict=False"):
        assert line in str(refusal.value)
    assert weights_sha256(model) == before


def test_what_fits_is_restored_and_the_rest_is_named_and_begins_anew(
    run: Run, tmp_path: Path, stored: torch.nn.ModuleDict
) -> None:
    model, optimizer = _changed()
    extra = torch.nn.Linear(1, 1)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    fresh_extra = weights_sha256(extra)
    checkpointer = _checkpointer(
        run, tmp_path, model=model, optimizer=optimizer, extra=extra, strict=False
    )
    assert checkpointer.restore() == 4
    now = model.state_dict()
    for name, value in now.items():
        expected = stored.state_dict()[name] if name.startswith("body") else fresh[name]
        assert torch.equal(value, expected), name
    assert weights_sha256(extra) == fresh_extra
    (warning,) = [w for w in progress(attempt(run, 2, tmp_path)).warnings if "not all" in w]
    for line in DIFFERENCES:
        assert line in warning
    _train(model, optimizer)
    checkpointer.step(5)
    checkpointer.save()
    third = attempt(run, 3, tmp_path)
    again = _changed()
    again_checkpointer = Checkpointer(
        model=again[0], optimizer=again[1], extra=torch.nn.Linear(1, 1), context=third, strict=False
    )
    run.report_exit(ExitReport(attempt=2, at=LONG_AGO, cause="completed"))
    assert again_checkpointer.restore() == 5
    assert weights_sha256(again[0]) == weights_sha256(model)
    assert not progress(third).warnings


def test_an_optimizers_state_of_a_parameter_of_another_shape_begins_anew(
    run: Run, tmp_path: Path, stored: torch.nn.ModuleDict
) -> None:
    model = _model(
        body=torch.nn.Linear(2, 3), head=torch.nn.Linear(3, 5), old=torch.nn.Linear(1, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    _checkpointer(run, tmp_path, model=model, optimizer=optimizer, strict=False).restore()
    assert model["body"].weight in optimizer.state
    assert model["old"].weight in optimizer.state
    assert model["head"].weight not in optimizer.state
    warnings = progress(attempt(run, 2, tmp_path)).warnings
    said = "optimizer: the state of model.head.weight (parameter 2) is of another shape"
    assert any(said in warning for warning in warnings)
    _train(model, optimizer)


def test_of_an_optimizer_of_fewer_parameters_those_that_are_there_are_restored(
    run: Run, tmp_path: Path, stored: torch.nn.ModuleDict
) -> None:
    model = _model(body=torch.nn.Linear(2, 3))
    optimizer = torch.optim.AdamW(model.parameters())
    _checkpointer(run, tmp_path, model=model, optimizer=optimizer, strict=False).restore()
    assert {id(p) for p in optimizer.state} == {id(p) for p in model.parameters()}
    warnings = progress(attempt(run, 2, tmp_path)).warnings
    assert any("optimizer: model.head.weight is in the checkpoint" in each for each in warnings)
    assert torch.equal(model["body"].weight, stored["body"].weight)


def test_a_checkpoint_that_fits_is_restored_without_a_warning(
    run: Run, tmp_path: Path, stored: torch.nn.ModuleDict
) -> None:
    model = _model(
        body=torch.nn.Linear(2, 3), head=torch.nn.Linear(3, 2), old=torch.nn.Linear(1, 1)
    )
    checkpointer = _checkpointer(
        run, tmp_path, model=model, optimizer=torch.optim.AdamW(model.parameters()),
        ema=torch.nn.Linear(1, 1), strict=False,
    )  # fmt: skip
    assert checkpointer.restore() == 4
    assert weights_sha256(model) == weights_sha256(stored)
    assert not progress(attempt(run, 2, tmp_path)).warnings


class Grows(torch.nn.Module):
    """Remembers all that it has seen, and knows how to load that."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.empty(0))

    def _load_from_state_dict(self, state: Any, prefix: str, *arguments: Any) -> None:
        self.seen = torch.empty_like(state[f"{prefix}seen"])
        super()._load_from_state_dict(state, prefix, *arguments)  # type: ignore[no-untyped-call]


def _renamed(_module: Any, state: dict[str, Any], *_: Any) -> None:
    if "old.weight" in state:
        state["new.weight"] = state.pop("old.weight")


@pytest.mark.parametrize("wraps", [False, True])
def test_a_module_that_knows_how_to_load_its_tensors_is_asked(
    wraps: bool, run: Run, tmp_path: Path
) -> None:
    memory, weight = Grows(), torch.nn.Linear(2, 2, bias=False)
    memory.seen = torch.arange(5.0)
    first = Checkpointer(model=_model(memory=memory, old=weight), context=attempt(run, 1, tmp_path))
    list(first.steps(1))
    run.report_exit(ExitReport(attempt=1, at=LONG_AGO, cause="completed"))
    model = _model(memory=Grows(), new=torch.nn.Linear(2, 2, bias=False))
    model.register_load_state_dict_pre_hook(_renamed)
    given = torch.compile(model) if wraps else model
    assert _checkpointer(run, tmp_path, model=given).restore() == 1
    assert torch.equal(model["memory"].seen, memory.seen)  # type: ignore[arg-type]
    assert torch.equal(model["new"].weight, weight.weight)  # type: ignore[arg-type]


def test_what_a_module_refuses_to_load_is_a_mismatch(run: Run, tmp_path: Path) -> None:
    first = Checkpointer(
        model=_model(memory=Grows(), body=torch.nn.Linear(2, 2)), context=attempt(run, 1, tmp_path)
    )
    list(first.steps(1))
    run.report_exit(ExitReport(attempt=1, at=LONG_AGO, cause="completed"))
    model = _model(memory=Grows(), body=torch.nn.Linear(2, 3))
    model.register_load_state_dict_pre_hook(_renamed)
    with pytest.raises(StateMismatch, match=r"size mismatch for body\.weight"):
        _checkpointer(run, tmp_path, model=model).restore()
