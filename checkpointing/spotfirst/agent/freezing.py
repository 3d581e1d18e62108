"""Stops the command's processes for the moment in which their files are copied.

SIGSTOP to the whole tree, with proof: every thread is seen stopped, and a second look finds no
process that was started meanwhile. What a user had stopped before stays stopped afterwards. The
guard knows what was stopped, and continues it when this process cannot.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spotfirst.errors import SpotfirstError

__all__ = ["Freezer", "NotFrozen", "is_running"]

_LIMITS_S = (0.3, 1.0, 3.0)
"""Of each try. A process between vfork and exec holds up its parent: it is let go, and tried again."""
_POLL_S = 0.001
_STOPPED = frozenset("TtZXx")
"""Stopped, stopped by a debugger, or ended."""


class NotFrozen(SpotfirstError):
    """A process did not stop: it waits for a disk, say."""


class Freezer:
    """Stops all descendants of ``root`` but those below ``spare``."""

    def __init__(
        self,
        *,
        root: int | None = None,
        spare: frozenset[int] = frozenset(),
        on_stopped: Callable[[set[int]], None] = lambda _: None,
    ) -> None:
        """``on_stopped`` is told before processes are stopped, and with none once they run on."""
        self._root = os.getpid() if root is None else root
        self._spare = spare
        self._on_stopped = on_stopped
        self._lock = threading.Lock()

    def pids(self) -> set[int]:
        """The processes that would be stopped."""
        children: dict[int, list[int]] = {}
        for name in os.listdir("/proc"):  # noqa: PTH208
            if name.isdigit() and (stat := _stat(Path("/proc", name, "stat"))) is not None:
                children.setdefault(stat[1], []).append(int(name))
        found: set[int] = set()
        waiting = [self._root]
        while waiting:
            for child in children.get(waiting.pop(), ()):
                if child not in self._spare and child not in found:
                    found.add(child)
                    waiting.append(child)
        return found

    @contextlib.contextmanager
    def frozen(self) -> Iterator[set[int]]:
        """Within it the processes stand still; it gives their ids. Raises :class:`NotFrozen`."""
        with self._lock:
            ours: set[int] = set()
            try:
                pids = self._stop(ours)
                yield pids
            finally:
                self._continue(ours)

    def _stop(self, ours: set[int]) -> set[int]:
        stubborn: set[int] = set()
        for limit_s in _LIMITS_S:
            until = time.monotonic() + limit_s
            found, stubborn = self._try_to_stop(ours, until)
            if not stubborn:
                return found
            self._continue(ours)
            time.sleep(random.uniform(0.01, 0.05))
        names = ", ".join(f"{pid} ({_name(pid)})" for pid in sorted(stubborn)[:5])
        msg = f"processes do not stop, so their files cannot be copied: {names}"
        raise NotFrozen(msg)

    def _try_to_stop(self, ours: set[int], until: float) -> tuple[set[int], set[int]]:
        """Stop what runs, until nothing does; the processes, and those that run on."""
        others: set[int] = set()
        while True:
            pids = self.pids()
            fresh = pids - ours - others
            others |= {pid for pid in fresh if _state(pid) == "T"}
            fresh -= others
            if fresh:
                ours |= fresh
                self._on_stopped(ours)
            for pid in fresh:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGSTOP)
            running = {pid for pid in pids if not _is_stopped(pid)}
            if not running and not fresh:
                return pids, set()
            if time.monotonic() > until:
                return pids, running
            if running:
                time.sleep(_POLL_S)

    def _continue(self, ours: set[int]) -> None:
        for pid in ours:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGCONT)
        if ours:
            self._on_stopped(set())
        ours.clear()


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that stands still has not."""
    return _state(pid) not in {"", "Z", "X", "x"}


def _is_stopped(pid: int) -> bool:
    """Whether no thread of a process can run any more."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208
    except OSError:
        return True
    states = (_stat(Path(f"/proc/{pid}/task/{thread}/stat")) for thread in threads)
    return all(state is None or state[0] in _STOPPED for state in states)


def _state(pid: int) -> str:
    stat = _stat(Path(f"/proc/{pid}/stat"))
    return "" if stat is None else stat[0]


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "gone"


def _stat(path: Path) -> tuple[str, int] | None:
    """State and parent of a process or thread; ``None`` when it is gone."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    words = text.rpartition(")")[2].split()  # the name before it may hold anything
    return words[0], int(words[1])
