"""Which parameters are trained, where training has changed that: frozen, or no longer frozen.

torch keeps it in no ``state_dict()``. A loop that unfreezes its backbone at step 1000 would train
frozen when it is restored at step 1500.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch  # noqa: TID253 - it is about torch's parameters; only the Checkpointer imports it

from spotfirst.checkpoints.manifest import Made
from spotfirst.checkpoints.wrappers import parameter_names

__all__ = ["Trainable"]


class Trainable:
    """What the script makes trainable, seen before anything is restored."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._modules = {n: v for n, v in objects.items() if isinstance(v, torch.nn.Module)}
        self._made = {
            (name, own): parameter.requires_grad
            for name in self._modules
            for own, parameter in self._parameters(name).items()
        }

    def changed(self) -> dict[str, Made]:
        """What training has changed, by module: for the next checkpoint."""
        found = {}
        for name in self._modules:
            now = {own: p.requires_grad for own, p in self._parameters(name).items()}
            flipped = {
                n: flag for n, flag in now.items() if flag != self._made.get((name, n), flag)
            }
            if flipped:
                found[name] = Made(values={"dict": [[n, flag] for n, flag in flipped.items()]})
        return found

    def restore(self, made: Mapping[str, Made]) -> None:
        """Change it as a checkpoint's training did. What the script itself has changed stays."""
        for name in self._modules.keys() & made.keys():
            flags = dict((made[name].values or {}).get("dict", ()))
            for own, parameter in self._parameters(name).items():
                if isinstance(flags.get(own), bool) and parameter.is_floating_point():
                    parameter.requires_grad_(flags[own])

    def _parameters(self, name: str) -> dict[str, torch.nn.Parameter]:
        names = parameter_names({name: self._modules[name]})
        return {names[id(p)][0]: p for p in self._modules[name].parameters()}
