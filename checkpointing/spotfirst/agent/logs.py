"""A command's output: shipped as numbered segments, kept in a local file, and its tail at hand.

Whoever writes never waits: what the storage does not take yet is kept in memory up to a bound,
and the oldest is dropped beyond it, with a line in its place that says so.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["LogShipper"]

_log = logging.getLogger(__name__)

SEGMENT_BYTES = 256 * 1024
BACKLOG_BYTES = 16 * 1024 * 1024
LOCAL_BYTES = 256 * 1024 * 1024
TAIL_LINES = 50
TAIL_BYTES = 8 * 1024


class LogShipper:
    """``put(number, data)`` stores one segment; a call that failed is repeated with equal bytes.

    ``feed`` may be called from any thread; ``ship`` from one at a time.
    """

    def __init__(
        self,
        put: Callable[[int, bytes], None],
        *,
        local: Path | None = None,
        segment_bytes: int = SEGMENT_BYTES,
        backlog_bytes: int = BACKLOG_BYTES,
        local_bytes: int = LOCAL_BYTES,
    ) -> None:
        self._put = put
        self._segment_bytes = segment_bytes
        self._backlog_bytes = backlog_bytes
        self._local_left_bytes = local_bytes
        self._local: IO[bytes] | None = None
        if local is not None:
            with contextlib.suppress(OSError):
                self._local = local.open("ab", buffering=0)
        self._lock = threading.RLock()  # a warning from inside comes back as a note
        self._notes = bytearray()
        self._notes_waited = False
        self._at_line_start = True
        self._shipping = threading.Lock()
        self._backlog = bytearray()
        self._dropped_bytes = 0
        self._pending = b""
        self._held_back = False
        self._tail = bytearray()
        self.segments = 0
        """Segments that the storage has; they are numbered from 1."""

    def feed(self, data: bytes) -> None:
        """Take output of the command."""
        with self._lock:
            self._tail += data
            del self._tail[: -2 * TAIL_BYTES]
            line_end = data.find(b"\n") + 1
            if self._notes and line_end:
                self._take(data[:line_end])
                self._take_notes()
                data = data[line_end:]
            self._take(data)

    def note(self, line: str) -> None:
        """Add a line of the agent's own: shipped like the rest, but not part of the tail.

        It waits for the end of the command's line: an unbuffered ``print`` writes the text and the
        line's end apart. After one shipment it waits no more, and begins a new line.
        """
        with self._lock:
            self._notes += f"[spotfirst] {line}\n".encode()
            if self._at_line_start:
                self._take_notes()

    def ship(self, *, rest: bool = False) -> None:
        """Store what is new, in whole lines; with ``rest`` also an unfinished last line.

        Raises what ``put`` raises; nothing is lost by it.
        """
        with self._shipping:
            with self._lock:
                if self._notes and (rest or self._notes_waited):
                    self._take_notes()
                self._notes_waited = bool(self._notes)
            while self._pending or self._cut(rest=rest):
                self._put(self.segments + 1, self._pending)
                self.segments += 1
                self._pending = b""

    def finish(self, *, within_s: float) -> bool:
        """Ship everything, trying again for at most ``within_s``; whether all of it is stored."""
        end = time.monotonic() + within_s
        while True:
            try:
                self.ship(rest=True)
                return True
            except Exception as error:  # noqa: BLE001 - the exit report must follow, log or not
                if time.monotonic() >= end:
                    _log.warning("the end of the log could not be stored: %s", error)
                    return False
                time.sleep(0.2)

    def tail(self) -> tuple[str, ...]:
        """The last lines of the command's output, at most 50 and 8 KiB."""
        with self._lock:
            kept = bytes(self._tail)
        if len(kept) > TAIL_BYTES:
            kept = kept[len(kept) - TAIL_BYTES :]
            kept = kept[_first_character(kept) :]
        lines = kept.decode("utf-8", "replace").rstrip("\n").split("\n")
        # A progress bar rewrites its line: what a terminal would show last.
        shown = [line.rstrip("\r").rpartition("\r")[2] for line in lines[-TAIL_LINES:]]
        return tuple(shown) if any(shown) else ()

    def _take_notes(self) -> None:
        notes = bytes(self._notes)
        self._notes.clear()
        self._notes_waited = False
        self._take(notes if self._at_line_start else b"\n" + notes)

    def _take(self, data: bytes) -> None:
        if data:
            self._at_line_start = data.endswith(b"\n")
        self._write_local(data)
        self._backlog += data
        excess = len(self._backlog) - self._backlog_bytes
        if excess > 0:
            line_end = self._backlog.find(b"\n", excess)
            cut = line_end + 1 if 0 <= line_end < excess + 4096 else excess
            del self._backlog[:cut]
            self._dropped_bytes += cut

    def _write_local(self, data: bytes) -> None:
        if self._local is None:
            return
        self._local_left_bytes -= len(data)
        problem = "it is long enough"
        try:
            if self._local_left_bytes >= 0:
                self._local.write(data)
                return
        except OSError as error:
            problem = str(error)
        # What is left of the disk is for checkpoints; the output goes on to the storage.
        file, self._local = self._local, None
        with contextlib.suppress(OSError):
            file.close()
        _log.warning("the local copy of the log ends here: %s", problem)

    def _cut(self, *, rest: bool) -> bool:
        """Move the next segment from the backlog to ``_pending``; whether there is one."""
        with self._lock:
            if self._dropped_bytes:
                lost = f"[spotfirst] {self._dropped_bytes} bytes of output were dropped here\n"
                self._backlog[:0] = lost.encode()
                self._dropped_bytes = 0
            window = bytes(self._backlog[: self._segment_bytes])
            size = window.rfind(b"\n") + 1
            if not size and window:
                # An unfinished line, such as a progress bar: it may wait for one more call.
                if not (rest or self._held_back or len(window) == self._segment_bytes):
                    self._held_back = True
                    return False
                size = _last_character(window)
                if not size and not rest and len(window) < self._segment_bytes:
                    return False  # the rest of the character is on its way
                size = size or len(window)
            if rest and len(window) < self._segment_bytes:
                size = len(window)
            self._held_back = False
            self._pending = window[:size]
            del self._backlog[:size]
            return size > 0


def _first_character(data: bytes) -> int:
    """Where the first whole UTF-8 character of ``data`` starts."""
    return next((i for i in range(min(4, len(data))) if data[i] & 0xC0 != 0x80), 0)


def _last_character(data: bytes) -> int:
    """Where the last whole UTF-8 character of ``data`` ends; all of it when it is not UTF-8."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        needed = 1 if byte < 0x80 else 2 if byte >> 5 == 6 else 3 if byte >> 4 == 14 else 4
        return len(data) if back >= needed else len(data) - back
    return len(data)
