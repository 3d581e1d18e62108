"""Become the user's command, tied to the life of the agent. Run by path; only the standard library.

``_exec.py AGENT_PID PROGRAM ARGUMENTS…`` A child program rather than a ``preexec_fn``, which may
deadlock in a process that has threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    agent, program = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != agent:  # it died before the kernel was told
        os._exit(1)
    # Python ignores it, and an ignored signal stays ignored: `yes | head` would not end.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execv(program, sys.argv[2:])  # noqa: S606 - this is the user's command
    except OSError as error:
        sys.stderr.write(f"[spotfirst] cannot run {program}: {error.strerror}\n")
        os._exit(126)


if __name__ == "__main__":
    main()
