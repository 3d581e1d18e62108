"""How the agent and the trainer talk: two small files in a folder on the instance.

Files, because they survive either side, need no thread, work for any number of processes, and a
``stat`` per step costs a microsecond. The trainer replaces ``progress.json``; the agent creates
``drain.json``, once.
"""

from __future__ import annotations

import logging
import os
import secrets
from datetime import datetime
from pathlib import Path

from spotfirst.errors import FormatError
from spotfirst.heartbeat import Progress
from spotfirst.wire import LIMIT_BYTES, Record, decode, encode

__all__ = ["CHANNEL_VARIABLE", "Channel", "Drain"]

_log = logging.getLogger(__name__)

CHANNEL_VARIABLE = "SPOTFIRST_CHANNEL"


class Drain(Record):
    """The agent asks for a last checkpoint, committed before ``by``."""

    reason: str
    by: datetime | None = None


class Channel:
    """Both ends. Reading a file that is missing or half gives ``None``; writing is atomic."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._drain = folder / "drain.json"
        self._progress = folder / "progress.json"

    @classmethod
    def from_environment(cls) -> Channel | None:
        """The trainer's end; ``None`` outside of an attempt."""
        folder = os.environ.get(CHANNEL_VARIABLE)
        return cls(Path(folder)) if folder else None

    def tell(self, progress: Progress) -> bool:
        """Replace the progress; whether that worked.

        A full disk is logged, not raised: training goes on when nobody can hear of it.
        """
        try:
            _replace(self._progress, encode(progress))
        except OSError as error:
            _log.warning("could not tell the agent about progress: %s", error)
            return False
        return True

    def progress(self) -> Progress | None:
        """What the trainer told last."""
        try:
            return decode(_read(self._progress), Progress, path=str(self._progress))
        except (OSError, FormatError):
            return None

    def ask_to_drain(self, drain: Drain) -> None:
        """The first request stands."""
        if not self._drain.exists():
            _replace(self._drain, encode(drain))

    def drain(self) -> Drain | None:
        """The agent's request; ``None`` when there is none."""
        if not self._drain.exists():
            return None
        try:
            return decode(_read(self._drain), Drain, path=str(self._drain))
        except (OSError, FormatError):
            return None


def _read(path: Path) -> bytes:
    """No more than a record may have: the training script may write here."""
    with path.open("rb") as file:
        return file.read(LIMIT_BYTES)


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
