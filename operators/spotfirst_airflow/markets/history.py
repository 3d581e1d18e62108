"""What an account saw of its spot market, as it is recorded for later: JSON Lines, append-only.

One file is of one instance type. A line is a :class:`Price`, a :class:`Score` or a :class:`Seen`;
the first says the format. A line that was torn by a crash is the last one, and counts as not
written. Recording again appends only what the file lacks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from pathlib import Path

import msgspec

from spotfirst.errors import InvalidSpec, NewerFormat

__all__ = ["Line", "Price", "Score", "Seen", "append", "read", "steps", "zones"]

FORMAT_VERSION = 1


class _Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True):
    at: datetime


class Header(_Line, frozen=True, tag="header"):
    """The first line."""

    instance_type: str
    v: int = FORMAT_VERSION


class Price(_Line, frozen=True, tag="price"):
    """From then on an hour cost that much: on spot in ``zone``; without one, on demand."""

    usd_h: Decimal
    zone: str = ""


class Score(_Line, frozen=True, tag="score"):
    """How likely AWS then thought a launch to succeed, 1 to 10. ``place``: a region or a zone id."""

    place: str
    score: int


class Seen(_Line, frozen=True, tag="seen"):
    """A run of ours got an instance there then (``there``), was refused, or lost one."""

    zone: str
    there: bool


Line = Header | Price | Score | Seen
_decoder = msgspec.json.Decoder(Line)


def append(path: Path, lines: Iterable[Line], *, instance_type: str, now: datetime) -> int:
    """Add those lines that the file lacks, oldest first; how many. Makes the file if need be.

    Raises :class:`InvalidSpec` for a file of another type, or of another kind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known = set(read(path)) if path.exists() else set()
    types = {line.instance_type for line in known if isinstance(line, Header)}
    if types and types != {instance_type}:
        msg = f"{path} is a recording of {', '.join(types)}, not of {instance_type}"
        raise InvalidSpec(msg)
    fresh: list[Line] = sorted(set(lines) - known, key=lambda each: each.at)
    if not known:
        fresh.insert(0, Header(at=now, instance_type=instance_type))
    data = b"".join(msgspec.json.encode(line) + b"\n" for line in fresh)
    with path.open("ab+") as file:
        _cut_torn_line(file.fileno())
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return len(fresh) - (not known)


def read(path: Path) -> list[Line]:
    """All whole lines. Raises :class:`InvalidSpec` and :class:`NewerFormat`."""
    try:
        whole, newline, _torn = path.read_bytes().rpartition(b"\n")
    except OSError as error:
        msg = f"recording {path} cannot be read: {error.strerror}"
        raise InvalidSpec(msg) from error
    lines: list[Line] = []
    for number, text in enumerate((whole + newline).splitlines(), start=1):
        try:
            lines.append(_decoder.decode(text))
        except msgspec.DecodeError as error:
            msg = f"recording {path}, line {number}: {error}"
            raise InvalidSpec(msg) from error
    if lines and not isinstance(lines[0], Header):
        msg = f"recording {path} does not begin with a header; is it one of `spotfirst market record`?"
        raise InvalidSpec(msg)
    if lines and isinstance(lines[0], Header) and lines[0].v > FORMAT_VERSION:
        msg = f"recording {path} has format {lines[0].v}, and this version reads {FORMAT_VERSION}"
        raise NewerFormat(msg)
    return lines


def zones(lines: Iterable[Line]) -> tuple[str, ...]:
    """The zones with a spot price, or in which a run was."""
    return tuple(
        sorted({each.zone for each in lines if isinstance(each, (Price, Seen)) if each.zone})
    )


def steps(lines: Iterable[Line], zone: str) -> list[tuple[float, bool, float | None]]:
    """(seconds since the recording's first line, whether there was spot, its price) of a zone.

    Where nobody had asked yet, there is spot: prices alone do not tell.
    """
    dated = [each for each in lines if isinstance(each, (Price, Seen))]
    began = min((each.at for each in dated), default=None)
    there, usd_h = True, None
    found: list[tuple[float, bool, float | None]] = []
    for each in sorted(dated, key=lambda line: line.at):
        if each.zone != zone:
            continue
        if isinstance(each, Price):
            usd_h = float(each.usd_h)
        else:
            there = each.there
        assert began is not None
        at_s = (each.at - began).total_seconds()
        if found and found[-1][0] == at_s:
            found.pop()
        found.append((at_s, there, usd_h))
    return found


def _cut_torn_line(fd: int) -> None:
    size = os.lseek(fd, 0, os.SEEK_END)
    data = os.pread(fd, size, 0)
    os.ftruncate(fd, data.rfind(b"\n") + 1)
