"""Spotfirst with Accelerate: what ``prepare`` returns goes to the Checkpointer.

::

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    loader = ResumableLoader(loader)  # of spotfirst.integrations.dataloader
    checkpointer = spotfirst.integrations.accelerate.checkpointer(
        accelerator, model=model, optimizer=optimizer, scheduler=scheduler, loader=loader
    )

With gradient accumulation, ``checkpointer.step`` belongs where ``accelerator.sync_gradients`` is
true: gradients that are still being collected are not part of a checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from spotfirst.checkpointer import Checkpointer

try:
    import accelerate as _  # noqa: F401 - to say at once that it is missing
except ImportError as error:
    msg = "spotfirst.integrations.accelerate needs Accelerate: pip install accelerate"
    raise ImportError(msg, name="accelerate") from error

__all__ = ["checkpointer"]


def checkpointer(accelerator: Any, **objects: Any) -> Checkpointer:
    """A Checkpointer of prepared ``objects``, the gradient scaler and the accelerator's counter.

    Models are saved without what ``prepare`` wraps around them. Options of the
    :class:`~spotfirst.checkpointer.Checkpointer` are passed on.
    """
    unwrapped = {
        name: accelerator.unwrap_model(value) if isinstance(value, torch.nn.Module) else value
        for name, value in objects.items()
    }
    if accelerator.scaler is not None:
        unwrapped["scaler"] = accelerator.scaler
    return Checkpointer(accelerator=_Counter(accelerator), **unwrapped)


class _Counter:
    """How many batches the accelerator has seen: it decides when gradients are complete."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        return {"step": self._accelerator.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._accelerator.step = state["step"]
