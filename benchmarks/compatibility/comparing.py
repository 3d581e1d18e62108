"""Whether two results are equal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.compatibility.programs import Program
from benchmarks.compatibility.watching import digest

__all__ = ["difference", "result_line"]


def difference(program: Program, found: Path, wanted: Path) -> str:
    """Why the result in one folder is not that in the other; empty when it is."""
    if program.mode == "lines":
        return _line_difference(program, found, wanted)
    names = {p.relative_to(wanted) for glob in program.result for p in wanted.glob(glob)}
    if not names:
        return f"there is no {' or '.join(program.result)}"
    for name in sorted(names):
        if not (found / name).exists():
            return f"{name} is missing"
        if program.compare == "bytes":
            same = digest(found / name) == digest(wanted / name)
        else:  # bytes may differ without meaning, such as a zip's names and times
            same = _equal(_loaded(found / name, program), _loaded(wanted / name, program))
        if not same:
            return f"{name} differs"
    return ""


def result_line(program: Program, output: Path) -> str:
    """The last line of an output that begins as the program's result does."""
    pattern = "|".join(re.escape(start) for start in program.result)
    lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    found = next((line for line in reversed(lines) if re.match(pattern, line)), "")
    return found.partition("[spotfirst]")[0].strip()


def _line_difference(program: Program, found: Path, wanted: Path) -> str:
    mine = result_line(program, found / "output.log")
    other = result_line(program, wanted / "output.log")
    if not other:
        return "the plain run printed no result"
    return "" if mine == other else f"{mine or 'nothing'!r} instead of {other!r}"


def _loaded(path: Path, program: Program) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    import torch

    # The programs' own files, on this machine.
    found = torch.load(path, map_location="cpu", weights_only=False)
    return {key: found[key] for key in program.keys} if program.keys else found


def _equal(one: Any, other: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and one.keys() == other.keys()
            and all(_equal(one[key], other[key]) for key in one)
        )
    if isinstance(one, list | tuple):
        return (
            isinstance(other, list | tuple)
            and len(one) == len(other)
            and all(map(_equal, one, other))
        )
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):
        return repr(one) == repr(other)
