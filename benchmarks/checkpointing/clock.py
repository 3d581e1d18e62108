"""Time, and the processor's time on both sides: what tells a limit of the machine from a wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import psutil

__all__ = ["Clock", "Took", "medians"]


_LOOK_S = 0.2
_LOOKS = 100
_STILL = 0.2
"""Of a core: what a server does by itself is less."""


class Took(NamedTuple):
    """Seconds: by the wall, and of the processor in this process and in the server's."""

    wall_s: float
    here_s: float
    server_s: float

    @property
    def busy_share(self) -> float:
        """How much of all cores these two used; near 1 the processor is the limit."""
        return (self.here_s + self.server_s) / (self.wall_s * (os.cpu_count() or 1))


class Clock:
    """Times actions that use a server, once it has done what was left of the one before."""

    def __init__(self, server_pid: int) -> None:
        self._server = psutil.Process(server_pid)

    def __call__(self, action: Callable[[], object]) -> Took:
        """What ``action`` takes."""
        self._settle()
        here, server, start = time.process_time(), self._server_s(), time.perf_counter()
        action()
        wall_s = time.perf_counter() - start
        return Took(wall_s, time.process_time() - here, self._server_s() - server)

    def _settle(self) -> None:
        for _ in range(_LOOKS):
            before = self._server_s()
            time.sleep(_LOOK_S)
            if self._server_s() - before < _STILL * _LOOK_S:
                return

    def _server_s(self) -> float:
        spent = [p.cpu_times() for p in (self._server, *self._server.children(recursive=True))]
        return sum(each.user + each.system for each in spent)


def medians(took: Sequence[Took]) -> Took:
    """Of each."""
    return Took(*(median(values) for values in zip(*took, strict=True)))
