"""Which files have been closed by a writer since the last look, from Linux' ``inotify``.

A descriptor that is open at two looks may be one that stayed open, or two that came after each
other: a script that saves to the same file again and again usually gets the same number again.
"""

from __future__ import annotations

import ctypes
import os
import struct
import weakref
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Closings"]

_CLOSE_WRITE = 0x00000008
_QUEUE_OVERFLOW = 0x00004000
_ONLY_FOLDERS = 0x01000000
_EVENT = struct.Struct("iIII")
_READ_BYTES = 1 << 16


class Closings:
    """Watches the folders that it is given. Without inotify, ``is_watching`` is false."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._watches: dict[int, str] = {}
        self._known: set[str] = set()
        try:
            self._queue = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        except AttributeError:
            self._queue = -1
        self.is_watching = self._queue >= 0
        # Also when it is only dropped: a user may have no more than 128 queues.
        self._end = weakref.finalize(self, os.close, self._queue) if self.is_watching else None

    def watch(self, folders: Iterable[str]) -> None:
        """Watch these folders, by their paths below the first, and no others."""
        wanted = {"", *folders}
        for path in wanted - self._known if self.is_watching else ():
            number = self._libc.inotify_add_watch(
                self._queue, os.fsencode(self._folder / path), _CLOSE_WRITE | _ONLY_FOLDERS
            )
            if number >= 0:
                self._watches[number] = path
            elif (self._folder / path).is_dir():  # the limit of watches
                self.is_watching = False
        self._known = wanted

    def poll(self) -> set[str] | None:
        """The paths of files closed since the last call; ``None`` when some may be missing."""
        closed: set[str] = set()
        complete = self.is_watching
        while self._queue >= 0:
            try:
                data = os.read(self._queue, _READ_BYTES)
            except BlockingIOError:
                break
            at = 0
            while at < len(data):
                number, mask, _, size = _EVENT.unpack_from(data, at)
                name = data[at + _EVENT.size : at + _EVENT.size + size].rstrip(b"\0")
                at += _EVENT.size + size
                if mask & _QUEUE_OVERFLOW:
                    complete = False
                elif mask & _CLOSE_WRITE and number in self._watches:
                    folder = self._watches[number]
                    text = os.fsdecode(name)
                    closed.add(f"{folder}/{text}" if folder else text)
        return closed if complete else None

    def close(self) -> None:
        """Watch nothing any more."""
        if self._end is not None:
            self._end()
        self._queue, self.is_watching = -1, False
