"""The user's command as one process tree: started, signalled, and gone for sure."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from spotfirst.errors import InvalidSpec

__all__ = ["Command", "adopt_orphans", "command_environment", "find_program", "reap_orphans"]

_PROGRAM = Path(__file__).with_name("_exec.py")
_PR_SET_CHILD_SUBREAPER = 36
_GONE_S = 10.0
_PIPE_BYTES = 1 << 20


def adopt_orphans() -> None:
    """Become the parent of orphans below us, so that no process can hide by forking twice."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def command_environment(
    base: Mapping[str, str], own: Mapping[str, str], ours: Mapping[str, str]
) -> dict[str, str]:
    """The command's environment: the instance's, then the spec's, then the agent's variables.

    ``PATH`` starts with the folder of the agent's Python, so that ``python``, ``torchrun`` and
    the like are those of the environment that Spotfirst is installed in; a ``PATH`` in the spec
    stands as it is.
    """
    environment = {**base, "PYTHONUNBUFFERED": "1", **own, **ours}
    if "PATH" not in own:
        here = str(Path(sys.executable).parent)
        environment["PATH"] = os.pathsep.join([here, base.get("PATH", os.defpath)])
    environment.pop("SPOTFIRST_POWER_OFF", None)
    return environment


def find_program(word: str, folder: Path, environment: Mapping[str, str]) -> str:
    """The absolute path of the program that a command's first word names.

    A word with a slash is relative to the code folder; others are looked up on ``PATH``, where
    ``python`` and ``python3`` fall back to the agent's own. Raises :class:`InvalidSpec`.
    """
    if "/" in word:
        path = folder / word
        if not path.is_file():
            msg = f"the command {word!r} is not in the code folder; was it left out of the code?"
            raise InvalidSpec(msg)
        if not os.access(path, os.X_OK):
            msg = f"the command {word!r} may not be executed: chmod +x it, and run again"
            raise InvalidSpec(msg)
        return str(path.absolute())
    path_variable = environment.get("PATH", os.defpath)
    is_python = word in {"python", "python3"}
    # The system's Python may have only one of the two names, and another one may come first.
    if is_python and path_variable.split(os.pathsep)[0] == str(Path(sys.executable).parent):
        return sys.executable
    found = shutil.which(word, path=path_variable)
    if found is not None:
        return str(Path(found).absolute())
    if is_python:
        return sys.executable
    hint = f"; to run the file of your code, write './{word}'" if (folder / word).exists() else ""
    msg = f"no program {word!r} was found on the instance's PATH ({path_variable}){hint}"
    raise InvalidSpec(msg)


class Command:
    """A running command. Start it in the main thread: it dies with the thread that starts it."""

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        on_output: Callable[[bytes], None],
    ) -> None:
        """Children that this process has already do not belong to the command, and are spared.

        Raises :class:`InvalidSpec` when there is no such program.
        """
        program = find_program(words[0], folder, environment)
        self._spare = _children()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(_PROGRAM), str(os.getpid())),
                *(program, *words[1:]),
            ],
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        with contextlib.suppress(ImportError, AttributeError, OSError):
            import fcntl

            # Room for a burst, so that a busy agent does not make the training wait.
            fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # type: ignore[attr-defined,unused-ignore]
        self._reader = threading.Thread(
            target=self._read, args=(on_output,), name="output", daemon=True
        )
        self._reader.start()

    @property
    def group(self) -> int:
        """The process group, which is also the first process's id."""
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; ``None`` while it runs."""
        return self._process.poll()

    def signal(self, number: int) -> None:
        """Send a signal to the whole group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.group, number)

    def signal_stopped(self, number: int, pids: Collection[int]) -> None:
        """Send a signal to those of the group's processes that are among ``pids``, and stopped.

        SIGKILL goes to all of them, whatever their group.
        A process that the signal is going to end is killed instead: once it is continued, its other
        threads would run on for a moment, and open files that they never get to write.
        """
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if number == signal.SIGKILL or os.getpgid(pid) == self.group:
                    os.kill(pid, signal.SIGKILL if _dies_of(pid, number) else number)

    def is_over(self) -> bool:
        """Whether all processes of the tree have ended."""
        self._process.poll()
        reap_orphans({*self._spare, self.group})
        import psutil

        left = self._descendants()
        ended = {psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD}
        for pid in left:
            with contextlib.suppress(psutil.Error):
                if psutil.Process(pid).status() not in ended:
                    return False
        return self._process.returncode is not None

    def end(self) -> int:
        """Kill what is left of the tree and take its last output; the first process's code."""
        end = time.monotonic() + _GONE_S
        while True:
            left = self._descendants()  # before their parents go
            self.signal(signal.SIGKILL)
            code = self._process.poll()
            for pid in left:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            reap_orphans({*self._spare, self.group})
            if (code is not None and not left) or time.monotonic() >= end:
                break
            time.sleep(0.01)
        self._reader.join(timeout=2.0)
        if not self._reader.is_alive() and self._process.stdout is not None:
            self._process.stdout.close()
        # A process that the kernel does not let die (a dead disk) is as good as killed.
        return -signal.SIGKILL if code is None else code

    def _descendants(self) -> set[int]:
        """What is below this process, without the first process and what was there before."""
        import psutil

        found: set[int] = set()
        for child in psutil.Process().children():
            if child.pid not in self._spare:
                found.add(child.pid)
                with contextlib.suppress(psutil.Error):
                    found |= {below.pid for below in child.children(recursive=True)}
        return found - {self.group}

    def _read(self, on_output: Callable[[bytes], None]) -> None:
        while data := os.read(self._output, 1 << 16):
            on_output(data)


def _dies_of(pid: int, number: int) -> bool:
    """Whether a process neither catches, nor ignores, nor blocks a signal that ends it."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = dict(line.split(":", 1) for line in text.splitlines() if line.startswith("Sig"))
    return not any(
        int(masks.get(name, "0"), 16) >> (number - 1) & 1 for name in ("SigBlk", "SigIgn", "SigCgt")
    )


def reap_orphans(known: Collection[int]) -> None:
    """Take the exit codes of adopted processes that have ended; those in ``known`` are spared."""
    for child in _children():
        if child not in known:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, os.WNOHANG)


def _children() -> set[int]:
    import psutil

    return {child.pid for child in psutil.Process().children()}
