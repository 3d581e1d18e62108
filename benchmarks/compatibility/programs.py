"""A program to try: how it is run, what its result is, and what that must be equal to.

A program is a folder with a ``program.yaml`` and whatever it needs. Ours lie in ``programs/``, each
written the way its users write them. Other people's programs stay outside; ``--program DIR`` names one.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["Program", "load", "ours"]

_HERE = Path(__file__).parent / "programs"


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``program.yaml`` says.

    ``mode`` is ``lines`` (the script uses Spotfirst) or ``files`` (it only writes files into
    ``$SPOTFIRST_CHECKPOINT_DIR``). ``result`` names files in that folder (globs), or the word with
    which the line of output begins that has the result, where there is no such folder.

    ``equals`` is ``uninterrupted``, or ``restarted`` for a program that does not resume exactly by
    itself: its result is compared with that of a plain restart from what the last attempt found.
    Of dictionaries of tensors, ``keys`` are compared: others hold paths and times. ``nearly_done`` is a
    pattern for the line of output with which the end is near; without it that is when there is a result.
    ``held_open`` are files (globs) that the script does not close between writes, so that nobody can
    say which versions it wrote. ``changes`` says for people what was changed in the script.
    """

    title: str
    mode: Literal["lines", "files"]
    command: tuple[str, ...]
    result: tuple[str, ...]
    source: str = ""
    changes: str = "none"
    needs: tuple[str, ...] = ()
    code: str = "."
    equals: Literal["uninterrupted", "restarted"] = "uninterrupted"
    compare: Literal["bytes", "tensors"] = "bytes"
    keys: tuple[str, ...] = ()
    held_open: tuple[str, ...] = ()
    nearly_done: str = ""
    period_s: float = 1.0
    env: dict[str, str] = {}
    name: str = ""
    folder: Path = Path()

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages that it needs and that are not installed."""
        return tuple(name for name in self.needs if importlib.util.find_spec(name) is None)

    @property
    def code_folder(self) -> Path:
        """What is sent to the instances."""
        return (self.folder / self.code).resolve()


def load(folder: Path) -> Program:
    """Read a folder's ``program.yaml``. Raises ``OSError`` and msgspec's errors."""
    path = folder / "program.yaml"
    found = msgspec.yaml.decode(path.read_bytes(), type=Program)
    return msgspec.structs.replace(found, name=folder.resolve().name, folder=folder.resolve())


def ours() -> tuple[Program, ...]:
    """The programs that come along, by name."""
    return tuple(load(path.parent) for path in sorted(_HERE.glob("*/program.yaml")))
