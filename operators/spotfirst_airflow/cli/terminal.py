"""Text of others on a terminal: shown, and never a command to it.

Output of trainings, metric names, messages and file names come from whoever can write to the
storage. A terminal acts on some characters: it sets its title, moves the cursor over what was
printed before, fills the clipboard, or reverses the direction of the text.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment

__all__ = ["PlainConsole", "PlainFormatter", "indented", "plain", "plain_json"]

_COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
_C0 = [code for code in range(0x20) if chr(code) not in "\t\n"]
_OTHERS = [*range(0x80, 0xA0), *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
"""C1 controls; separators of lines; what changes the direction of text."""
_SHOWN = (
    {code: chr(0x2400 + code) for code in _C0} | {0x7F: "\u2421"} | dict.fromkeys(_OTHERS, "\ufffd")
)
_UNSAFE = re.compile(f"[{re.escape(''.join(map(chr, _SHOWN)))}]")


def plain(text: str) -> str:
    """The text without colours, and with a picture for each other control character."""
    if _UNSAFE.search(text) is None:
        return text
    return _COLOUR.sub("", text).translate(_SHOWN)


def plain_json(text: str) -> str:
    """The same for JSON, in which each of them is escaped: it means what it meant."""
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def indented(text: str) -> str:
    """A message whose further lines cannot be taken for other messages."""
    return text.replace("\n", "\n    ")


class PlainConsole(Console):
    """A console on which only its own styles and controls reach the terminal."""

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of anything, with :func:`plain` texts."""
        return _plain_segments(super().render(renderable, options))


class PlainFormatter(logging.Formatter):
    """For log messages."""

    def format(self, record: logging.LogRecord) -> str:
        """The message as a line, or several with a traceback."""
        return plain(super().format(record))


def _plain_segments(segments: Iterable[Segment]) -> Iterator[Segment]:
    for segment in segments:
        if segment.control or _UNSAFE.search(segment.text) is None:
            yield segment
        else:
            yield Segment(plain(segment.text), segment.style)
