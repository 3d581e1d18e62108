from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from spotfirst.checkpoints.weights import state_digest, weights_sha256
from spotfirst.errors import StateMismatch
from spotfirst.storage import Storage
from tests.checkpointing.states import save
from tests.waiting import PATIENCE_S


def _module() -> torch.nn.Module:
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    module.register_buffer("scales", torch.ones(3, dtype=torch.bfloat16))
    module.register_buffer("empty", torch.empty(0))
    return module


def test_the_stored_and_the_live_weights_have_the_same_digest(packs: Storage) -> None:
    module = _module()
    assert state_digest(packs, save(packs, module.state_dict())) == weights_sha256(module)


def test_the_digest_tells_values_names_shapes_and_types_apart() -> None:
    class Holder:
        def __init__(self, **tensors: torch.Tensor) -> None:
            self.tensors = tensors

        def state_dict(self) -> dict[str, torch.Tensor]:
            return self.tensors

    zeros = torch.zeros(4)
    kinds = [
        {"a": zeros}, {"b": zeros}, {"a": zeros.view(2, 2)}, {"a": zeros.int()},
        {"a": torch.ones(4)}, {"a": zeros[:2], "b": zeros[2:]},
    ]  # fmt: skip
    assert len({weights_sha256(Holder(**kind)) for kind in kinds}) == len(kinds)
    assert weights_sha256(Holder(a=zeros, b=zeros)) == weights_sha256(Holder(b=zeros, a=zeros))


def test_an_object_that_is_not_in_the_checkpoint_is_named(packs: Storage) -> None:
    with pytest.raises(StateMismatch, match="ema"):
        state_digest(packs, save(packs, {}), "ema")


def test_what_the_agent_and_the_command_line_import_needs_no_torch() -> None:
    modules = (
        "chain", "claiming", "files", "manifest", "memory", "packs", "restoring", "retention",
        "statetree", "weights", "workers",
    )  # fmt: skip
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"import {', '.join(f'spotfirst.checkpoints.{name}' for name in modules)}\n"
        "import spotfirst.context, spotfirst.leaving, spotfirst.patience, spotfirst.reporting\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)
