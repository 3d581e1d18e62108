"""What Linux says about processes, and how to end exactly those that are meant.

Process ids are used again. A process is therefore named by its id *and* its start time in clock
ticks since the boot, and signals go through a pidfd, which cannot come to mean another process.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from spotfirst.wire import Record

__all__ = [
    "ProcessRef",
    "become_subreaper",
    "carrying",
    "descendants",
    "die_with_parent",
    "kill_all",
    "this_process",
]

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
# Looked up at import: nothing may take the loader's lock between fork and exec.
_prctl = ctypes.CDLL(None, use_errno=True).prctl


class ProcessRef(Record):
    """One process, for ever. ``world`` is the boot and the pid namespace that its id is from."""

    pid: int
    start_ticks: int
    world: str

    def send(self, number: signal.Signals) -> bool:
        """Signal it; whether it was there. ``False`` also for one that cannot be seen from here."""
        if self.world != _world():
            return False
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:
            return False
        try:
            # Only now is it certain that the id cannot be given to another process meanwhile.
            if _start_ticks(self.pid) != self.start_ticks:
                return False
            signal.pidfd_send_signal(descriptor, number)
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True


def this_process() -> ProcessRef:
    """The caller."""
    return _ref(os.getpid())


def become_subreaper() -> None:
    """From now on, orphaned descendants become children of this process, not of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """In a child, before exec: the kernel is to kill it when the thread that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def carrying(variable: str, value: str) -> list[ProcessRef]:
    """Other processes of this user that were started with ``variable=value``."""
    mark = f"{variable}={value}".encode()
    found = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(_ref(pid))
    return found


def descendants(of: int) -> list[ProcessRef]:
    """All living descendants of a process; zombies are dead."""
    children: dict[int, list[tuple[int, str]]] = {}
    for pid in _pids():
        with contextlib.suppress(OSError):
            fields = _stat(pid)
            children.setdefault(int(fields[1]), []).append((pid, fields[0]))
    found: list[ProcessRef] = []
    front = [of]
    while front:
        for pid, state in children.get(front.pop(), []):
            front.append(pid)
            if state not in "ZX":
                with contextlib.suppress(OSError):
                    found.append(_ref(pid))
    return found


def kill_all(find: Callable[[], Iterable[ProcessRef]], *, patience_s: float) -> bool:
    """SIGKILL whatever ``find`` finds until it finds nothing, twice; whether that was reached.

    Twice, because a process that forks and exits while the list is read can hide its child.
    """
    give_up = time.monotonic() + patience_s
    quiet = 0
    while quiet < 2:
        found = list(find())
        quiet = 0 if found else quiet + 1
        for process in found:
            process.send(signal.SIGKILL)
        if found:
            if time.monotonic() > give_up:
                return False
            time.sleep(0.01)
    return True


def _pids() -> list[int]:
    me = os.getpid()
    return [int(n) for n in os.listdir("/proc") if n.isdigit() and int(n) != me]  # noqa: PTH208


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on: state, parent and so forth."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    # The second is the command in parentheses, and may hold spaces and parentheses itself.
    return text[text.rindex(")") + 2 :].split()


def _start_ticks(pid: int) -> int:
    return int(_stat(pid)[19])


def _ref(pid: int) -> ProcessRef:
    return ProcessRef(pid=pid, start_ticks=_start_ticks(pid), world=_world())


@functools.cache
def _world() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - it links to no path
