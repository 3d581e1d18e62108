"""One tensor that is larger than any 32-bit offset, and than the memory for its copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spotfirst.checkpointer import Checkpointer
from spotfirst.run import Run
from spotfirst.storage import open_storage

ELEMENTS = 3_000_000_000
"""6 GB of int16. Mostly zeros, whose pages cost nothing before somebody writes to them."""
MARKED = [0, 2**31 - 1, 2**31, 2**31 + 1, ELEMENTS - 1, *range(1, ELEMENTS, 123_456_789)]


class Table:
    """An object with state of its own."""

    def __init__(self, values: torch.Tensor | None = None) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return {} if self.values is None else {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


@pytest.mark.slow
def test_a_tensor_of_6_gb_is_saved_with_256_mb_of_memory_and_restored(tmp_path: Path) -> None:
    values = torch.from_numpy(np.zeros(ELEMENTS, dtype=np.int16))
    for number, place in enumerate(MARKED, start=1):
        values[place] = number
    checkpointer = Checkpointer(table=Table(values), storage=str(tmp_path), memory_bytes=256 << 20)
    checkpointer.restore()
    checkpointer.step(1)
    assert checkpointer.save()
    newest = Run(open_storage(str(tmp_path)), "local").chain().refresh().newest()
    assert newest is not None
    assert newest[1].size_bytes > 2 * ELEMENTS
    del values, checkpointer

    restored = Table()
    assert Checkpointer(table=restored, storage=str(tmp_path)).restore() == 1
    assert restored.values is not None
    assert restored.values.shape == (ELEMENTS,)
    assert [int(restored.values[place]) for place in MARKED] == list(range(1, len(MARKED) + 1))
    assert int(np.count_nonzero(restored.values.numpy())) == len(MARKED)
