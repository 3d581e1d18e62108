"""Time, and the processor's time on both sides: what tells a limit of the machine from a wait."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import NamedTuple

import psutil

__all__ = ["Clock", "Took", "medians"]


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
    """Times actions that use a server."""

    def __init__(self, server_pid: int) -> None:
        self._server = psutil.Process(server_pid)

    def __call__(self, action: Callable[[], object]) -> Took:
        """What ``action`` takes."""
        here, server, start = time.process_time(), self._server_s(), time.perf_counter()
        action()
        wall_s = time.perf_counter() - start
        return Took(wall_s, time.process_time() - here, self._server_s() - server)

    def _server_s(self) -> float:
        spent = [p.cpu_times() for p in (self._server, *self._server.children(recursive=True))]
        return sum(each.user + each.system for each in spent)


def medians(took: Sequence[Took]) -> Took:
    """Of each."""
    return Took(*(median(values) for values in zip(*took, strict=True)))
