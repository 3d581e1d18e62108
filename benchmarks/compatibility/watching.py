"""Which versions of its files a script wrote, as the kernel saw them: inotify, without a look into the script."""

from __future__ import annotations

import ctypes
import hashlib
import os
import select
import struct
import threading
from pathlib import Path

__all__ = ["Watch", "digest", "digests"]

_MODIFY, _CLOSE_WRITE, _MOVED_TO, _CREATE = 0x2, 0x8, 0x80, 0x100
_IS_DIR = 0x40000000
_EVENT = struct.Struct("iIII")


def digest(path: Path) -> str:
    """The SHA-256 of a file; empty when it is gone."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def digests(folder: Path) -> dict[str, str]:
    """All files below a folder, by their path in it."""
    return {
        str(path.relative_to(folder)): digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


class Watch:
    """Follows a folder, and those below it, until it is closed.

    ``versions`` are digests of files at the moments when they were closed, or moved into place.
    """

    def __init__(self, folder: Path) -> None:
        self.versions: dict[str, set[str]] = {}
        self.changed = threading.Event()
        self._folder = folder
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self.folders: dict[int, Path] = {}
        self._ended = threading.Event()
        self._add(folder)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop following."""
        self._ended.set()
        self._thread.join()
        os.close(self._descriptor)

    def _add(self, folder: Path) -> None:
        mask = _MODIFY | _CLOSE_WRITE | _MOVED_TO | _CREATE
        number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), mask)
        if number < 0:
            return
        self.folders[number] = folder
        for path in folder.iterdir():
            if path.is_dir():
                self._add(path)
            else:  # it came before the watch
                self._note(path)

    def _note(self, path: Path) -> None:
        found = digest(path)
        if found:
            name = str(path.relative_to(self._folder))
            self.versions.setdefault(name, set()).add(found)

    def _follow(self) -> None:
        while not self._ended.is_set():
            ready, _, _ = select.select([self._descriptor], [], [], 0.1)
            if ready:
                data = os.read(self._descriptor, 1 << 16)
                self.changed.set()
                self._take(data)

    def _take(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            number, mask, _, length = _EVENT.unpack_from(data, at)
            name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
            at += _EVENT.size + length
            folder = self.folders.get(number)
            if folder is None or not name:
                continue
            path = folder / os.fsdecode(name)
            if mask & _IS_DIR:
                if mask & (_CREATE | _MOVED_TO):
                    self._add(path)
            elif mask & (_CLOSE_WRITE | _MOVED_TO) or (mask & _CREATE and _is_link(path)):
                self._note(path)


def _is_link(path: Path) -> bool:
    """Whether it is another name of a file: whole when it appears, and never closed."""
    try:
        return path.stat().st_nlink > 1
    except OSError:
        return False
