"""How a trainer stops in the middle of its loop, at a step boundary, with nothing lost."""

from __future__ import annotations

__all__ = ["Drained", "Superseded"]


class Drained(SystemExit):
    """The agent asked for it; the last step is checkpointed and the chain is released.

    Like every :class:`SystemExit` it passes an ``except Exception`` of the training script, and
    Python leaves quietly, with code 0.
    """

    def __init__(self, step: int) -> None:
        super().__init__(0)
        self.step = step


class Superseded(SystemExit):
    """A newer attempt has taken over: what this one would still train, nobody would read.

    Code 75 (``EX_TEMPFAIL``), so that nothing takes the run for completed.
    """

    def __init__(self, holder: int) -> None:
        super().__init__(75)
        self.holder = holder
