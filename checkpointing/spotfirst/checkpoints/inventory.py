"""What a folder holds at one moment, and what of it cannot be kept."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from spotfirst.checkpoints.manifest import FolderRef, LinkRef, stays_inside

__all__ = ["Inventory", "link_goes_to", "list_folder", "warn_of_losses"]

_KEPT_MODE = 0o777
_LONGEST_PATH_BYTES = 3072
"""Linux takes 4096 with the folder's own path, which is another one on the next instance."""
_HARMLESS = {"security.selinux"}


@dataclass
class Inventory:
    """By path below the folder: regular files, links and folders."""

    files: dict[str, os.stat_result] = field(default_factory=dict)
    links: dict[str, LinkRef] = field(default_factory=dict)
    folders: dict[str, FolderRef] = field(default_factory=dict)


def list_folder(folder: Path, warn: Callable[[str], None]) -> Inventory:
    """All that is in ``folder``, sorted by path. ``warn`` is told what cannot be kept."""
    found = Inventory()
    waiting = [""]
    while waiting:
        parent = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / parent), key=lambda entry: entry.name)
        except FileNotFoundError:
            continue  # gone since it was listed
        except OSError as error:
            warn(f"{parent!r} cannot be read, so nothing in it is kept: {error.strerror}")
            continue
        for entry in entries:
            path = f"{parent}/{entry.name}" if parent else entry.name
            if _has_strange_name(path, warn):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    _add_link(found, folder, path, status, warn)
                    continue
            except OSError:
                continue
            if stat.S_ISDIR(status.st_mode):
                warn_of_losses(path, None, status, warn)
                mode = status.st_mode & _KEPT_MODE
                found.folders[path] = FolderRef(
                    path=path, mode=mode, mtime_ns=status.st_mtime_ns
                )  # fmt: skip
                waiting.append(path)
            elif stat.S_ISREG(status.st_mode):
                found.files[path] = status
            else:
                warn(f"{path!r} is left out of checkpoints: it is a {_kind(status.st_mode)}")
    found.files = dict(sorted(found.files.items()))
    return found


def warn_of_losses(
    path: str, descriptor: int | None, status: os.stat_result, warn: Callable[[str], None]
) -> None:
    """Say what of a folder, or of an open file, a checkpoint cannot keep."""
    if status.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX):
        warn(f"{path!r} has special permissions (set-uid, set-gid or sticky), which are not kept")
    if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
        warn(f"{path!r} belongs to another user or group; it comes back as the agent's own")
    if descriptor is None:
        return
    try:
        names = set(os.listxattr(descriptor)) - _HARMLESS
    except (AttributeError, OSError):
        return
    if names:
        warn(f"{path!r} has extended attributes, which are not kept: {', '.join(sorted(names))}")


def link_goes_to(path: str, target: str) -> str:
    """The path that a link leads to, by its text alone."""
    return os.path.normpath(os.path.join(os.path.dirname(path), target))  # noqa: PTH118, PTH120


def _add_link(
    found: Inventory, folder: Path, path: str, status: os.stat_result,
    warn: Callable[[str], None],
) -> None:  # fmt: skip
    target = os.readlink(folder / path)  # noqa: PTH115 - as it is written
    if target.startswith("/"):
        inside = os.path.relpath(target, (folder / path).parent)
        if target.startswith(f"{folder}/") and stays_inside(path, inside):
            warn(
                f"the link {path!r} is kept as a relative one, because the folder's own path is "
                "another one on each instance"
            )
            target = inside
    if not stays_inside(path, target) or _is_not_text(target):
        warn(f"{path!r} is left out of checkpoints: the link leads out of the folder")
        return
    found.links[path] = LinkRef(path=path, target=target, mtime_ns=status.st_mtime_ns)


def _has_strange_name(path: str, warn: Callable[[str], None]) -> bool:
    if _is_not_text(path):
        warn(f"{path!a} is left out of checkpoints: its name is not UTF-8")
        return True
    if len(path.encode()) > _LONGEST_PATH_BYTES:
        warn(f"{path[:80]!r}… is left out of checkpoints: its path is too long")
        return True
    if "\\" in path:
        warn(f"{path!r} is left out of checkpoints: its name has a backslash")
        return True
    return False


def _is_not_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return True
    return False


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "named pipe"
    return "socket" if stat.S_ISSOCK(mode) else "device"
