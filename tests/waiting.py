"""Wait for what another thread or process will have done, and see whether a process has ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import psutil

_T = TypeVar("_T")

PATIENCE_S = 900.0
"""For what takes a moment. It only ends what hangs: a test says nothing about speed, and has to
pass on one core beside ten other things."""


def wait_until(look: Callable[[], _T], what: str = "it", *, patience_s: float = PATIENCE_S) -> _T:
    """What ``look`` finds, as soon as that is true; fail after ``patience_s``."""
    give_up = time.monotonic() + patience_s
    while not (found := look()):
        assert time.monotonic() < give_up, f"waited {patience_s:g} s for {what}, in vain"
        time.sleep(0.02)
    return found


def is_gone(pid: int) -> bool:
    """Whether the process has ended, even if nothing has waited for it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
