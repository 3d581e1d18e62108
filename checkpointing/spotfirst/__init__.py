"""Spotfirst, the side that runs on the instance: checkpoints, datasets, and the run's files.

A training script needs three lines::

    from spotfirst import Checkpointer

    checkpointer = Checkpointer(model=model, optimizer=optimizer)
    for step in checkpointer.steps(total_steps):
        loss = train_one_step(step)
        checkpointer.report(loss=loss)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spotfirst.checkpointer import Checkpointer
    from spotfirst.errors import SpotfirstError

__version__ = "0.1.0"
__all__ = ["Checkpointer", "SpotfirstError", "__version__"]

_HOMES = {"Checkpointer": "spotfirst.checkpointer", "SpotfirstError": "spotfirst.errors"}


def __getattr__(name: str) -> Any:
    # Lazy: the agent must start without waiting for torch, which the Checkpointer imports.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    msg = f"module 'spotfirst' has no attribute {name!r}"
    raise AttributeError(msg)
