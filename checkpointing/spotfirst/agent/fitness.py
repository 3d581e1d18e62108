"""Whether the agent can work on this instance, and how it says that it cannot.

Only the standard library is imported here, and no name that Python 3.9 lacks: this is what still
works when nothing else does.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import platform
import sys
from pathlib import Path

__all__ = ["UNFIT", "environment_problem", "import_problem", "say_unfit"]

UNFIT = 78
"""The agent's exit status when it cannot work here: ``EX_CONFIG`` of ``sysexits.h``.

Whatever started the agent then finds the reason in ``unfit.txt`` in ``$SPOTFIRST_WORKDIR``, and
reports it for the attempt: the agent may be unable to reach the storage.
"""

_LASTING_ERRNOS = {
    errno.EACCES, errno.EDQUOT, errno.ENOEXEC, errno.ENOSPC, errno.EPERM, errno.EROFS,
}  # fmt: skip


def import_problem() -> str:
    """Why the agent's code cannot be imported, as a sentence; empty when it can."""
    if sys.version_info < (3, 10):  # noqa: UP036 - an image's Python may be any
        return f"{_place()}: the agent needs Python 3.10 or newer"
    try:
        importlib.import_module("spotfirst.agent.program")
    except Exception as error:  # noqa: BLE001 - a library may fail in any way when imported
        return _sentence(error)
    return ""


def environment_problem(error: Exception) -> str:
    """Why the next instance would fail like this one, as a sentence; empty when it might not.

    Meant for errors before the training begins. Errors of the network, of memory and of the disk's
    hardware may pass; a missing function, a missing library or a full disk do not.
    """
    if isinstance(error, OSError):
        return _sentence(error) if error.errno in _LASTING_ERRNOS else ""
    if isinstance(error, MemoryError):
        return ""
    return _sentence(error)


def say_unfit(problem: str) -> None:
    """Leave the reason on standard error, and where whatever started the agent looks for it."""
    sys.stderr.write(f"spotfirst.agent: {problem}\n")
    workdir = os.environ.get("SPOTFIRST_WORKDIR")
    if workdir:
        # An unwritable folder may be the very problem; the exit status still says that there is one.
        with contextlib.suppress(OSError):
            Path(workdir).mkdir(parents=True, exist_ok=True)
            (Path(workdir) / "unfit.txt").write_text(problem, encoding="utf-8")


def _sentence(error: Exception) -> str:
    return f"{_place()}: {type(error).__name__}: {error}"


def _place() -> str:
    version = platform.python_version()
    return f"the agent cannot work with this image (Python {version}, {sys.executable})"
