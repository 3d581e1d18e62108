"""Starts the guard process, and tells it what to end. What it does: :mod:`._guard`."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

__all__ = ["Guard"]

_PROGRAM = Path(__file__).with_name("_guard.py")


class Guard:
    """Outlives this process, and acts as soon as it is gone."""

    def __init__(self, *, life_s: float, marker: str, power_off: str = "") -> None:
        words = [sys.executable, "-I", "-S", str(_PROGRAM)]
        self._process = subprocess.Popen(
            [*words, str(os.getpid()), repr(life_s), marker, power_off],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Of the guard: a child of ours that no clean-up may touch."""
        return self._process.pid

    def watch_group(self, group: int) -> None:
        """End this process group as well; 0 when there is none any more."""
        self._tell(f"group {group}\n")

    def limit_life(self, life_s: float) -> None:
        """End everything this long after the guard was started."""
        self._tell(f"life {life_s!r}\n")

    def watch_stopped(self, pids: Collection[int]) -> None:
        """Continue these processes should this one fail to; none: they run on."""
        self._tell(f"stopped {' '.join(map(str, sorted(pids)))}\n")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        # Without its guard an attempt still trains: the fleet has a timer of its own.
        with contextlib.suppress(OSError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
