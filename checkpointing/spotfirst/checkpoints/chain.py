"""The checkpoint chain of a run: who may write, and which checkpoints are complete.

The chain is one append-only sequence of *claims*, *commits*, *releases* and *prunings*. An attempt
claims before it writes. From then on every entry of its own goes right behind the last entry that
it knows, so a newer claim takes the place of the older attempt's next commit: **at most one process
can commit**, and the older one learns of it by failing (:class:`ClaimLost`). That also holds for
two processes of one attempt: each claims for itself.

A commit is the last write of a checkpoint: its manifest and packs are there before it.

An entry carries a checksum: one with a flipped bit stops everyone who reads it, since nobody knows
any more whether it was a claim.

Every call may be repeated after :class:`StorageUnavailable`, when nobody knows whether it was
applied: an entry that is there already is found, not written again.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection
from datetime import datetime
from typing import Literal

import msgspec
import xxhash

from spotfirst.errors import ClaimLost, CorruptObject
from spotfirst.sequence import Sequence
from spotfirst.storage import Storage
from spotfirst.wire import Claimed, Clock, decode, encode, utc_now

__all__ = ["CheckpointChain", "Claim", "Commit", "Prune", "Release"]


class _Entry(Claimed, tag_field="kind"):
    attempt: int
    at: datetime
    nonce: str
    check: str = ""


class Claim(_Entry, tag="claim"):
    """From here on only ``attempt`` may commit, and of it only the process called ``writer``."""

    writer: str = ""


class Commit(_Entry, tag="commit"):
    """A complete checkpoint after ``step`` finished steps.

    ``manifest`` is the name of the object that describes it, below the run's ``packs/``, and
    ``digest`` the BLAKE3 of its bytes; ``content`` says what the manifest is of: the tensors of a
    training state, or a directory's files. ``size_bytes`` is what a restore reads, ``new_bytes``
    what this checkpoint wrote.
    """

    step: int
    manifest: str
    digest: str
    content: Literal["state", "files"]
    size_bytes: int = 0
    new_bytes: int = 0
    metrics: dict[str, float] = {}


class Release(_Entry, tag="release"):
    """``attempt`` will commit no more: whoever waits may claim at once."""


class Prune(_Entry, tag="prune"):
    """The checkpoints with these sequence numbers are no longer kept."""

    commits: tuple[int, ...]


_AnyEntry = Claim | Commit | Release | Prune


class CheckpointChain:
    """One process's view of the chain. Not thread-safe."""

    def __init__(
        self, storage: Storage, prefix: str = "checkpoints", clock: Clock = utc_now
    ) -> None:
        self._entries = Sequence(storage, prefix)
        self._url = storage.url
        self._clock = clock
        self._writer = _nonce()
        self._claimed_by = ""
        self.holder: int | None = None
        """The attempt that claimed last."""
        self.claims: list[int] = []
        """The sequence numbers of all claims; writers name what they write by the newest."""
        self.released = True
        """Whether the holder has said that it is done; true when nobody has claimed."""
        self.commits: list[tuple[int, Commit]] = []
        """(sequence number, commit) of those that are kept, oldest first."""
        self.pruned: dict[int, Commit] = {}
        """By sequence number, those that are not."""

    def refresh(self) -> CheckpointChain:
        """Read what is new.

        Raises :class:`CorruptObject` or :class:`NewerFormat` at an entry that cannot be read,
        each time: what comes behind it may be a claim, and is not guessed.
        """
        for path, data in self._entries.unread():
            self._take(self._entries.length + 1, _decode(data, f"{self._url}/{path}"))
        return self

    def claim(self, attempt: int) -> None:
        """Become the only one that may commit, whoever holds the chain now.

        Nothing happens when this very process holds it already for this attempt. An older holder,
        and another process of this attempt, need not have released: they are fenced. Raises
        :class:`ClaimLost` when a newer attempt has claimed.
        """
        while True:
            self.refresh()
            if self._is_ours(attempt):
                return
            if self.holder is not None and self.holder > attempt:
                raise self._lost(attempt)
            entry = Claim(attempt=attempt, at=self._clock(), nonce=_nonce(), writer=self._writer)
            if self._write(entry):
                return

    def commit(
        self,
        attempt: int,
        *,
        step: int,
        manifest: str,
        digest: str,
        content: Literal["state", "files"],
        size_bytes: int = 0,
        new_bytes: int = 0,
        metrics: dict[str, float] | None = None,
    ) -> int:
        """Make a checkpoint complete; its sequence number. All that it names must be there.

        Safe to repeat: when the newest commit is this attempt's, of the same step and manifest,
        its number is returned. Raises :class:`ClaimLost` when the attempt does not hold the
        claim (any more).
        """
        entry = Commit(
            attempt=attempt, at=self._clock(), nonce=_nonce(), step=step,
            manifest=manifest, digest=digest, content=content, size_bytes=size_bytes, new_bytes=new_bytes,
            metrics=metrics or {},
        )  # fmt: skip
        while True:
            number = self._same_commit(entry)
            if number is not None:
                return number
            if not self._is_ours(attempt):
                raise self._lost(attempt)
            if self._write(entry):
                return self._entries.length
            self.refresh()  # a newer claim; or an entry of ours whose answer was lost

    def release(self, attempt: int) -> None:
        """Say that no commit of this attempt will follow. Nothing happens when that is said.

        Raises :class:`ClaimLost` when another attempt, or another process of it, holds the claim.
        """
        while not (self.released and self.holder == attempt):
            if not self._is_ours(attempt):
                raise self._lost(attempt)
            if not self._write(Release(attempt=attempt, at=self._clock(), nonce=_nonce())):
                self.refresh()

    def prune(self, attempt: int, commits: Collection[int]) -> None:
        """Say that these checkpoints are no longer kept: from now on nobody restores them.

        Raises :class:`ClaimLost`.
        """
        while gone := sorted(set(commits) & {seq for seq, _ in self.commits}):
            if not self._is_ours(attempt):
                raise self._lost(attempt)
            entry = Prune(attempt=attempt, at=self._clock(), nonce=_nonce(), commits=tuple(gone))
            if not self._write(entry):
                self.refresh()

    def newest(self) -> tuple[int, Commit] | None:
        """The newest complete checkpoint that has been read."""
        return self.commits[-1] if self.commits else None

    def _is_ours(self, attempt: int) -> bool:
        return self.holder == attempt and not self.released and self._claimed_by == self._writer

    def _same_commit(self, entry: Commit) -> int | None:
        if not self.commits:
            return None
        number, newest = self.commits[-1]
        same = (newest.attempt, newest.step, newest.manifest, newest.digest)
        wanted = (entry.attempt, entry.step, entry.manifest, entry.digest)
        return number if same == wanted else None

    def _write(self, entry: _AnyEntry) -> bool:
        """Append right behind what has been read; false when something else is there."""
        number = self._entries.length + 1
        data = _encode(entry)
        # As every other reader will see it; and never one that they cannot read.
        entry = _decode(data, f"{self._url}/{self._entries.path(number)}")
        if not self._entries.append(data):
            return False
        self._take(number, entry)
        return True

    def _lost(self, attempt: int) -> ClaimLost:
        if self.holder is None:
            why = "nobody has claimed the chain; claim it first"
        elif self.holder == attempt and self.released:
            why = "it has released the chain; claim it again first"
        elif self.holder == attempt:
            why = "another process of this attempt has claimed the chain; stop, it goes on"
        else:
            why = f"attempt {self.holder} has claimed the chain; stop, it goes on from here"
        msg = (
            f"attempt {attempt} may not write to "
            f"{self._url}/{self._entries.path(self._entries.length)}: {why}"
        )
        return ClaimLost(msg, holder=self.holder or 0)

    def _take(self, number: int, entry: _AnyEntry) -> None:
        if isinstance(entry, Claim):
            self.holder, self.released = entry.attempt, False
            self._claimed_by = entry.writer
            self.claims.append(number)
        elif isinstance(entry, Release):
            self.released = self.released or entry.attempt == self.holder
        elif isinstance(entry, Prune):
            gone = set(entry.commits)
            self.pruned.update((seq, commit) for seq, commit in self.commits if seq in gone)
            self.commits = [(seq, commit) for seq, commit in self.commits if seq not in gone]
        else:
            self.commits.append((number, entry))


_CHECK = re.compile(rb'"check":"([0-9a-f]{32})"')
_ZEROS = b"0" * 32


def _encode(entry: _AnyEntry) -> bytes:
    """An entry as JSON whose ``check`` is the XXH3-128 of it with zeros in that place."""
    data = encode(msgspec.structs.replace(entry, check=_ZEROS.decode()))
    check = xxhash.xxh3_128_hexdigest(data).encode()
    return _CHECK.sub(lambda _: b'"check":"%s"' % check, data, count=1)


def _decode(data: bytes, path: str) -> _AnyEntry:
    found = _CHECK.search(data)
    if found is not None:
        bare = data[: found.start(1)] + _ZEROS + data[found.end(1) :]
        if xxhash.xxh3_128_hexdigest(bare) != found[1].decode():
            msg = (
                f"{path} is damaged: its checksum is of another content. Restore it from a backup "
                "of the storage, or start a new run"
            )
            raise CorruptObject(msg)
    entry: _AnyEntry = decode(data, _AnyEntry, path=path)  # type: ignore[arg-type]
    return entry


def _nonce() -> str:
    return secrets.token_hex(8)
