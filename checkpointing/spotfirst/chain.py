"""The checkpoint chain of a run: who may write, and which checkpoints are complete.

The chain is one append-only sequence of *claims*, *commits* and *releases*. An attempt claims
before it writes. From then on every entry of its own goes right behind the last entry that it
knows, so a newer claim takes the place of the older attempt's next commit: **at most one attempt
can commit**, and the older one learns of it by failing (:class:`ClaimLost`).

A commit is the last write of a checkpoint: its manifest and blobs are there before it.
"""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Literal, Union

from spotfirst.errors import ClaimLost
from spotfirst.sequence import Sequence
from spotfirst.storage import Storage
from spotfirst.wire import Clock, Record, decode, encode, utc_now

__all__ = ["CheckpointChain", "Claim", "Commit", "Release"]


class _Entry(Record, tag_field="kind"):
    attempt: int
    at: datetime
    nonce: str


class Claim(_Entry, tag="claim"):
    """From here on only ``attempt`` may commit."""


class Commit(_Entry, tag="commit"):
    """A complete checkpoint after ``step`` finished steps.

    ``manifest`` is the BLAKE3 digest of the blob that describes it; ``content`` says what the
    manifest is of: the tensors of a training state, or a directory's files.
    """

    step: int
    manifest: str
    content: Literal["state", "files"]
    size_bytes: int = 0
    new_bytes: int = 0
    metrics: dict[str, float] = {}


class Release(_Entry, tag="release"):
    """``attempt`` will commit no more: whoever waits may claim at once."""


_AnyEntry = Union[Claim, Commit, Release]


class CheckpointChain:
    """One process's view of the chain. Not thread-safe."""

    def __init__(
        self, storage: Storage, prefix: str = "checkpoints", clock: Clock = utc_now
    ) -> None:
        self._entries = Sequence(storage, prefix)
        self._clock = clock
        self.holder: int | None = None
        """The attempt that claimed last."""
        self.released = True
        """Whether the holder has said that it is done; true when nobody has claimed."""
        self.commits: list[tuple[int, Commit]] = []
        """(sequence number, commit), oldest first."""

    def refresh(self) -> CheckpointChain:
        """Read what is new."""
        first = self._entries.length + 1
        for offset, (path, data) in enumerate(self._entries.read_new()):
            self._take(first + offset, decode(data, _AnyEntry, path=path))  # type: ignore[arg-type]
        return self

    def claim(self, attempt: int) -> None:
        """Become the only attempt that may commit. Call when :meth:`may_claim`, or to steal.

        Raises :class:`ClaimLost` when a newer attempt has claimed already.
        """
        while True:
            self.refresh()
            if self.holder == attempt:
                return
            if self.holder is not None and self.holder > attempt:
                raise self._lost(attempt)
            entry = Claim(attempt=attempt, at=self._clock(), nonce=secrets.token_hex(8))
            if self._entries.append(encode(entry)):
                self._take(self._entries.length, entry)
                return

    def commit(
        self,
        attempt: int,
        *,
        step: int,
        manifest: str,
        content: Literal["state", "files"],
        size_bytes: int = 0,
        new_bytes: int = 0,
        metrics: dict[str, float] | None = None,
    ) -> int:
        """Make a checkpoint complete; its sequence number. The manifest's blob must be there.

        Raises :class:`ClaimLost` when the attempt does not hold the claim (any more).
        """
        entry = Commit(
            attempt=attempt, at=self._clock(), nonce=secrets.token_hex(8), step=step,
            manifest=manifest, content=content, size_bytes=size_bytes, new_bytes=new_bytes,
            metrics=metrics or {},
        )  # fmt: skip
        return self._append(attempt, entry)

    def release(self, attempt: int) -> None:
        """Say that no commit of this attempt will follow. Raises :class:`ClaimLost`."""
        self._append(
            attempt, Release(attempt=attempt, at=self._clock(), nonce=secrets.token_hex(8))
        )

    def newest(self) -> tuple[int, Commit] | None:
        """The newest complete checkpoint that has been read."""
        return self.commits[-1] if self.commits else None

    def _append(self, attempt: int, entry: _AnyEntry) -> int:
        if self.holder != attempt or self.released:
            raise self._lost(attempt)
        if not self._entries.append(encode(entry)):
            self.refresh()
            raise self._lost(attempt)
        self._take(self._entries.length, entry)
        return self._entries.length

    def _lost(self, attempt: int) -> ClaimLost:
        holder = self.holder or 0
        msg = f"attempt {attempt} may not write checkpoints: attempt {holder} holds the claim"
        return ClaimLost(msg, holder=holder)

    def _take(self, number: int, entry: _AnyEntry) -> None:
        if isinstance(entry, Claim):
            self.holder, self.released = entry.attempt, False
        elif isinstance(entry, Release):
            self.released = self.released or entry.attempt == self.holder
        else:
            self.commits.append((number, entry))
