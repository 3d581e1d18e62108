"""Which files of a folder processes can still write, from Linux' ``/proc``; elsewhere none is seen."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Inode", "Writers", "find_writers", "inode_of"]

Inode = tuple[int, int]
"""Device and number: what a file is, whatever it is called."""

_PROC = Path("/proc")


class Writers(NamedTuple):
    """Who can write one file. ``handles`` are process ids with descriptor numbers.

    ``appending``: every descriptor only appends. ``mapped``: it is shared memory of a process, so
    its time of change says nothing. ``in_place``: a descriptor can read as well as write.
    """

    handles: frozenset[tuple[int, int]] = frozenset()
    appending: bool = True
    mapped: bool = False


def inode_of(status: os.stat_result) -> Inode:
    """Which file this is the status of."""
    return status.st_dev, status.st_ino


def find_writers(folder: Path, pids: Collection[int] | None = None) -> dict[Inode, Writers]:
    """The files below ``folder`` that one of ``pids`` has open for writing, or mapped to be written.

    ``None`` looks at all processes of this user, which takes some 0.1 s. A process that has ended,
    or belongs to another user, is passed over.
    """
    root = f"{folder.resolve()}/".encode()
    found: dict[Inode, Writers] = {}
    for pid in _all_pids() if pids is None else pids:
        for inode, more in (*_descriptors(pid, root), *_mappings(pid, root)):
            known = found.get(inode, Writers())
            found[inode] = Writers(
                known.handles | more.handles,
                known.appending and more.appending,
                known.mapped or more.mapped,
            )
    return found


def _all_pids() -> list[int]:
    try:
        return [int(name) for name in os.listdir(_PROC) if name.isdigit()]  # noqa: PTH208
    except OSError:
        return []


def _descriptors(pid: int, root: bytes) -> Iterator[tuple[Inode, Writers]]:
    place = f"/proc/{pid}/fd"
    try:
        numbers = os.listdir(place)  # noqa: PTH208
    except OSError:
        return
    for number in numbers:
        # Each on its own: one that is closed meanwhile must not hide those behind it.
        with contextlib.suppress(OSError, IndexError, ValueError):
            if not os.readlink(f"{place}/{number}".encode()).startswith(root):  # noqa: PTH115
                continue
            info = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
            flags = int(info.split("flags:", 1)[1].split(maxsplit=1)[0], 8)
            if flags & os.O_ACCMODE == os.O_RDONLY:
                continue
            status = os.stat(f"{place}/{number}")  # noqa: PTH116
            writers = Writers(
                frozenset({(pid, int(number))}),
                appending=bool(flags & os.O_APPEND),
            )
            yield inode_of(status), writers


def _mappings(pid: int, root: bytes) -> Iterator[tuple[Inode, Writers]]:
    try:
        data = Path(f"/proc/{pid}/maps").read_bytes()
    except OSError:
        return
    if root not in data:
        return
    for line in data.splitlines():
        words = line.split(maxsplit=5)  # range, permissions, offset, device, inode, path
        if len(words) < 6 or not words[5].startswith(root) or words[1][1:2] != b"w":
            continue
        if words[1][3:4] == b"s":
            with contextlib.suppress(OSError):
                # By path: the device number of some file systems differs from that of stat.
                status = os.stat(os.fsdecode(words[5]))  # noqa: PTH116
                yield inode_of(status), Writers(appending=True, mapped=True)
