"""Gradients that a loop gathers over several of its steps: they are in no checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch  # noqa: TID253 - it is about torch's optimizers; only the Checkpointer imports it

__all__ = ["MOST_STEPS", "Gathering"]

MOST_STEPS = 100
"""How many steps a checkpoint waits for what is not over. Then it never will be, as far as we know."""

_LOOKED_AT = 64
"""Gradients: a backward pass changes most of them, and a step is to cost no time."""


class Gathering:
    """Whether the loop is between a backward pass and the ``optimizer.step()`` that uses it.

    A loop that never steps its optimizer is not waited for again, once :data:`MOST_STEPS` have gone by.
    """

    def __init__(self, parts: Callable[[], Iterable[Any]]) -> None:
        """``parts`` gives the modules and optimizers of the training."""
        self._parts = parts
        self._made_step = False
        self._waited = 0
        self._seen: list[tuple[int, int]] = []

    def begin(self) -> None:
        """The loop begins: gradients that are there already are none of its own."""
        self._made_step, self._seen = False, self._gradients()

    def optimizer_steps(self) -> None:
        """Note a step of any optimizer."""
        self._made_step = True

    def is_open(self) -> bool:
        """Whether gradients are kept for a later step. Ask once, at the end of each step."""
        made_step, self._made_step = self._made_step, False
        before, self._seen = self._seen, self._gradients()
        if (made_step or not self._seen) and self._waited <= MOST_STEPS:
            self._waited = 0
        is_new = bool(self._seen) and self._seen != before
        if made_step or not (is_new or self._waited):
            return False
        self._waited += 1
        return self._waited <= MOST_STEPS

    def _gradients(self) -> list[tuple[int, int]]:
        """Some of them, and how often each was changed."""
        gradients = (
            parameter.grad
            for part in self._parts()
            if isinstance(part, torch.optim.Optimizer)
            for group in part.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        )
        seen = itertools.islice(gradients, _LOOKED_AT)
        return [(id(each), each._version) for each in seen]  # noqa: SLF001 - torch has no other
