"""The last line of defence, in a process of its own. Run by path; only the standard library.

``_guard.py AGENT_PID LIFE_S MARKER POWER_OFF``, with a pipe from the agent as its input. It acts
when the pipe closes, which a dead agent cannot prevent, or when the life is over, which a hung
agent cannot delay: it ends the agent, the command's process group, and every process that has
MARKER in its environment; then it powers the instance off, when it was told how.

Lines that it understands: ``group PGID`` (0: there is none any more), ``life SECONDS``, and
``stopped PID…``: these were stopped with SIGSTOP for a moment (none: they run on). When the agent
is gone, or that moment is too long, it continues them, so that nothing stands still for ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

_SLICE_S = 5.0
_PATIENCE_S = 10.0
_STOPPED_S = 60.0
"""The agent itself gives up much earlier."""


def main() -> None:
    agent, life_s, marker, power_off = int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:5]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a service manager tells the whole service
    group, stopped = _watch(agent, life_s)
    _end_all(group, marker.encode())
    _continue(stopped)
    if power_off:
        subprocess.run(power_off, shell=True, check=False)  # noqa: S602 - the fleet's command


def _watch(agent: int, life_s: float) -> tuple[int, list[int]]:
    """Wait for the end of the agent or of its time; the group to end, and what is stopped."""
    start, group, rest = _now(), 0, b""
    stopped: list[int] = []
    stopped_at = start
    while True:
        if stopped and _now() - stopped_at > _STOPPED_S:
            _continue(stopped)
            stopped = []
        left_s = start + life_s - _now()
        if left_s <= 0:
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent, signal.SIGKILL)
            return group, stopped
        # In slices: the clock that we read goes on while a hibernated instance sleeps.
        if not select.select([0], [], [], min(left_s, _SLICE_S))[0]:
            continue
        data = os.read(0, 4096)
        if not data:
            return group, stopped
        *lines, rest = (rest + data).split(b"\n")
        for word, _, value in (line.partition(b" ") for line in lines):
            if word == b"group":
                group = int(value)
            elif word == b"life":
                life_s = float(value)
            elif word == b"stopped":
                stopped, stopped_at = [int(pid) for pid in value.split()], _now()


def _continue(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGCONT)


def _end_all(group: int, marker: bytes) -> None:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        alive = False
        if group:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        for pid in _marked(marker):
            alive = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not alive:
            return
        time.sleep(0.05)


def _marked(marker: bytes) -> list[int]:
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc") else []:  # noqa: PTH112, PTH208
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:  # noqa: PTH123
                if marker in file.read().split(b"\0"):
                    found.append(int(name))
    return found


def _now() -> float:
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


if __name__ == "__main__":
    main()
