"""Child processes that never outlive whoever started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class DevstackError(RuntimeError):
    """A server of the development stack did not start, answer or stop."""


def free_ports(count: int) -> list[int]:
    """Return `count` different TCP ports that are free on 127.0.0.1 now.

    All are held until the last is found, so they differ. Another process may still take one before
    it is used; whoever starts a server on them therefore tries again with new ones.
    """
    with contextlib.ExitStack() as held:
        ports = []
        for _ in range(count):
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            ports.append(int(probe.getsockname()[1]))
        return ports


def _die_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies; runs in the child, before exec."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


class Child:
    """A process in a session of its own, with its output in a file; as another `user` for root.

    The kernel sends it SIGTERM when the *thread* that started it ends, so start it from one that
    lives as long as the child should: in a program or a test run, the main thread.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        user: str | None = None,
    ) -> None:
        self.command = list(command)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=None if environment is None else dict(environment),
                cwd=cwd,
                start_new_session=True,
                user=user,
                preexec_fn=lambda: _die_with_parent(parent),  # noqa: PLW1509 - no threads take locks in it
            )

    @property
    def pid(self) -> int:
        """The process id, which is also that of its session and group."""
        return self.process.pid

    def is_running(self) -> bool:
        """Say whether the process itself still runs."""
        return self.process.poll() is None

    def check(self) -> None:
        """Raise a `DevstackError` with its last output if it has ended."""
        if not self.is_running():
            raise DevstackError(f"{self.command[:2]} ended by itself:\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        """Return the last lines of its output, for messages."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""

    def kill(self, *, tree: bool = True) -> None:
        """Send SIGKILL: to all its processes as if the machine died, or to itself alone."""
        if tree:
            end(self._tree(), grace_s=0)
        elif self.is_running():
            self.process.kill()
        self.process.wait()

    def stop(self, grace_s: float = 10) -> None:
        """Ask with SIGTERM, then end what is left of its processes after `grace_s` seconds."""
        family = self._tree()
        if self.is_running():
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        end(family, grace_s=0)
        end(self._tree(), grace_s=0)  # what was started in the meantime
        self.process.wait()

    def _tree(self) -> list[psutil.Process]:
        """List the process, its descendants, and orphans of its session."""
        found: dict[int, psutil.Process] = {}
        with contextlib.suppress(psutil.NoSuchProcess):
            if self.is_running():
                me = psutil.Process(self.pid)
                found = {p.pid: p for p in (me, *me.children(recursive=True))}
        for process in psutil.process_iter():
            # A session id is not reused while a member lives, so this cannot hit a stranger.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if process.pid and os.getsid(process.pid) == self.pid:
                    found[process.pid] = process
        return list(found.values())


def end(processes: Iterable[psutil.Process], *, grace_s: float) -> None:
    """End processes: SIGTERM and `grace_s` seconds of patience if there are any, then SIGKILL.

    Raises:
        DevstackError: one is still there five seconds after SIGKILL.
    """
    left = [process for process in processes if _alive(process)]
    if grace_s > 0:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        left = _still_alive(left, grace_s)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    left = _still_alive(left, 5)
    if left:
        raise DevstackError(
            f"processes {[p.pid for p in left]} survived SIGKILL; look at them with ps"
        )


def _alive(process: psutil.Process) -> bool:
    """Tell whether it runs; a zombie, which only its parent can remove, does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _still_alive(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait for processes to end, as long as `timeout_s`; return those that did not."""
    deadline = time.monotonic() + timeout_s
    while (left := [p for p in processes if _alive(p)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def carrying(variable: str, value: str) -> list[psutil.Process]:
    """List this user's other processes whose environment at start held `variable=value`."""
    mark = f"{variable}={value}".encode()
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found.append(process)
    return found


def wait_until_interrupted(check: Callable[[], None]) -> None:
    """Return on Ctrl-C or SIGTERM; call `check` twice a second, and pass on what it raises."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            check()
            time.sleep(0.5)
