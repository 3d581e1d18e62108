"""Spotfirst with Accelerate: what ``prepare`` returns goes to the Checkpointer.

::

    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    loader = ResumableLoader(loader)  # of spotfirst.integrations.dataloader
    checkpointer = spotfirst.integrations.accelerate.checkpointer(
        accelerator, model=model, optimizer=optimizer, scheduler=scheduler, loader=loader
    )

With gradient accumulation, ``checkpointer.step`` belongs where ``accelerator.sync_gradients`` is
true: gradients that are still being collected are not part of a checkpoint. ``skip_first_batches``
is not needed: a ResumableLoader begins where it was.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from spotfirst.checkpointer import Checkpointer
from spotfirst.errors import InvalidSpec

if importlib.util.find_spec("accelerate") is None:
    msg = "spotfirst.integrations.accelerate needs Accelerate: pip install accelerate"
    raise ImportError(msg, name="accelerate")

__all__ = ["checkpointer"]


def checkpointer(accelerator: Any, **objects: Any) -> Checkpointer:
    """A Checkpointer of prepared ``objects``, the gradient scaler and the accelerator's counter.

    What was given to ``accelerator.register_for_checkpointing`` is part of it as well. Models are saved without what ``prepare`` wraps around them. Options of the
    :class:`~spotfirst.checkpointer.Checkpointer` are passed on. Raises :class:`InvalidSpec` for a
    loader: its position would be lost.
    """
    for name, value in objects.items():
        if isinstance(value, torch.utils.data.DataLoader):
            msg = f"{name} is a DataLoader: give ResumableLoader({name}), and train with that"
            raise InvalidSpec(msg)
    unwrapped = {
        name: accelerator.unwrap_model(value) if isinstance(value, torch.nn.Module) else value
        for name, value in objects.items()
    }
    if accelerator.scaler is not None:
        unwrapped["scaler"] = accelerator.scaler
    registered = [
        o for o in accelerator._custom_objects if all(o is not v for v in objects.values())
    ]
    unwrapped |= {f"registered_{number}": value for number, value in enumerate(registered)}
    return Checkpointer(accelerator=_Counter(accelerator), **unwrapped)


class _Counter:
    """How many batches the accelerator has seen: it decides when gradients are complete."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def state_dict(self) -> dict[str, int]:
        return {"step": self._accelerator.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._accelerator.step = state["step"]
