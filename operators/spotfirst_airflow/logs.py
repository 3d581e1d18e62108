"""A run's training output, followed over all of its attempts.

Output comes as the script wrote it: progress bars that never end their line, lines of a hundred
megabytes, binary data. So each call reads and returns a bounded amount, a line that is not finished
is shown from time to time as a terminal would show it, and one that is too long comes in pieces.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from spotfirst.run import Run

__all__ = ["LogFollower", "shown_lines"]

_CHARACTERS_PER_CALL = 8 << 20
_LINES_PER_CALL = 20_000
_LINE_CHARACTERS = 4096
_SHOW_AFTER_S = 10.0
_SHOW_AFTER_CHARACTERS = 64 * 1024
_KEPT_SEGMENTS = 4
_SEGMENT = re.compile(r"\d{8}")


class LogFollower:
    """Gives each line of output once, in order within an attempt. Not thread-safe."""

    def __init__(self, run: Run, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._run = run
        self._monotonic = monotonic
        self._next: dict[int, int] = {}
        self._lines: dict[int, _Terminal] = {}
        self.is_behind = False
        """Whether there is more than the last call gave: call again at once."""

    def skip_to_end(self, attempts: int, *, keep: int = 0) -> bool:
        """Leave out what has been shipped so far, but for ``keep`` segments; whether there was any.

        For a follower that comes back, and not a new one. Costs two listings.
        """
        skipped = False
        for attempt in range(max(1, attempts - 1), attempts + 1):
            names = self._run.storage.list(self._run.attempt_path(attempt, "log"))
            newest = max((int(name) for name in names if _SEGMENT.fullmatch(name)), default=0)
            before = self._next.get(attempt, 1)
            self._next[attempt] = max(before, newest + 1 - keep)
            if self._next[attempt] > before:
                skipped = True
                self._lines.pop(attempt, None)
        return skipped or attempts > 2

    def new_lines(self, attempts: int) -> list[tuple[int, str]]:
        """(attempt, line) for what was shipped since the last call, by attempts 1 … ``attempts``.

        Bounded; see :attr:`is_behind`. Costs one small call per attempt that may still write: the
        two newest.
        """
        self.is_behind = False
        lines: list[tuple[int, str]] = []
        for attempt in range(max(1, attempts - 1) if self._next else 1, attempts + 1):
            lines.extend((attempt, line) for line in self._read(attempt))
        return lines

    def newest_lines(self, attempts: int, *, is_last: bool = False) -> list[tuple[int, str]]:
        """The same for who cannot show everything: of very much output, its end.

        With ``is_last`` also an unfinished last line.
        """
        lines = self.new_lines(attempts)
        if self.is_behind and self.skip_to_end(attempts, keep=_KEPT_SEGMENTS):
            note = f"[spotfirst] (output left out here; `spotfirst logs {self._run.run_id}` has it)"
            lines = [(attempts, note), *self.new_lines(attempts)]
        return lines + self.rest() if is_last else lines

    def rest(self) -> list[tuple[int, str]]:
        """Last lines that did not end with a newline; call once, when the run is done."""
        lines, self._lines = self._lines, {}
        return [
            (number, text) for number, line in sorted(lines.items()) if (text := line.unfinished())
        ]

    def _read(self, attempt: int) -> list[str]:
        line = self._lines.setdefault(attempt, _Terminal())
        number = self._next.get(attempt, 1)
        found: list[str] = []
        characters = 0
        while (segment := self._run.log_segment(attempt, number)) is not None:
            number += 1
            self._next[attempt] = number
            found += line.feed(segment)
            characters += len(segment)
            if characters >= _CHARACTERS_PER_CALL or len(found) >= _LINES_PER_CALL:
                self.is_behind = True
                break
        self._next[attempt] = number
        return found + line.glimpse(self._monotonic())


def shown_lines(text: str) -> list[str]:
    """A piece of output as lines, each as a terminal would show it, and of a bounded length."""
    return [_visible(line)[:_LINE_CHARACTERS] for line in text.removesuffix("\n").split("\n")]


class _Terminal:
    """The line that is being written: what a carriage return overwrites is gone."""

    def __init__(self) -> None:
        self._text = ""
        self._shown = ""
        self._since_s: float | None = None
        """When the unfinished line began, or was shown last."""
        self._unseen = 0

    def feed(self, text: str) -> list[str]:
        """Take output; the lines that it ends, each of a bounded length."""
        *ended, half = (self._text + text).split("\n")
        lines = [piece for line in ended for piece in _pieces(_visible(line))]
        if ended:
            if self._shown and lines[0] == self._shown:  # a glimpse of it was all of it
                del lines[0]
            self._shown, self._since_s, self._unseen = "", None, 0
        self._unseen += len(half) if ended else len(text)
        visible = _visible(half)
        *full, rest = _pieces(visible)
        # A return at the end overwrites with what comes next, and so does one before all the rest.
        self._text = f"{rest}\r" if half.endswith("\r") else rest
        return lines + full

    def glimpse(self, now_s: float) -> list[str]:
        """The unfinished line, when it is time to show it and there is something new in it."""
        text = self.unfinished()
        if not text:
            return []
        if self._since_s is None:
            self._since_s = now_s
        is_due = now_s - self._since_s >= _SHOW_AFTER_S or self._unseen >= _SHOW_AFTER_CHARACTERS
        if text == self._shown or not is_due:
            return []
        self._shown, self._since_s, self._unseen = text, now_s, 0
        return [text]

    def unfinished(self) -> str:
        return _visible(self._text)


def _visible(line: str) -> str:
    """What a terminal would show of a line at its end."""
    return line.rstrip("\r").rpartition("\r")[2]


def _pieces(line: str) -> list[str]:
    """A line in pieces of a bounded length: one, also of an empty line."""
    starts = range(0, max(1, len(line)), _LINE_CHARACTERS)
    return [line[start : start + _LINE_CHARACTERS] for start in starts]
