"""How many bytes of checkpoints a run's attempts read and write, by its checkpoint chain.

Asked only where a pool's offer has a price for them, which is between regions. The chain knows what
every commit wrote, all ranks together, and what restoring it reads. Not known to it: what was read
or written for a checkpoint that came to nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal

import msgspec

from spotfirst import events as e
from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.errors import FormatError
from spotfirst.heartbeat import Heartbeat
from spotfirst.run import Run
from spotfirst.spec import ResumeFrom
from spotfirst.state import Attempt
from spotfirst_airflow.costs import egress_usd
from spotfirst_airflow.fleets import Offer

__all__ = ["Traffic", "is_priced"]

_log = logging.getLogger(__name__)


class Traffic:
    """One controller's view of a run's checkpoints. Not thread-safe.

    Calls raise :class:`~spotfirst.errors.StorageError`. A chain that cannot be read (any more)
    counts as far as it can be.
    """

    def __init__(self, run: Run, resume_from: ResumeFrom | None) -> None:
        self._run = run
        self._chain = run.chain()
        self._resume_from = resume_from
        self._parent_bytes: int | None = None

    def newest_bytes(self) -> int:
        """What the next attempt will have to read."""
        commits = self._commits()
        return commits[-1].size_bytes if commits else self._from_parent()

    def written_bytes_h(self) -> float:
        """What an hour of training writes, by the last attempt that tells; 0 while none does."""
        by_attempt: dict[int, list[Commit]] = {}
        for commit in self._commits():
            by_attempt.setdefault(commit.attempt, []).append(commit)
        for _, (first, *more) in sorted(by_attempt.items(), reverse=True):
            lasted_s = (more[-1].at - first.at).total_seconds() if more else 0.0
            if lasted_s > 0:
                return 3600 * sum(commit.new_bytes for commit in more) / lasted_s
        return 0.0

    def ended(self, ended: e.Ended, launched: e.Launched) -> e.Ended:
        """The end of an attempt with its bytes, where they cost anything."""
        if not is_priced(launched):
            return ended
        commits = self._commits()
        restored = 0 if ended.start_step is None else self._restored(commits, ended.attempt)
        written = _written(commits, ended.attempt)
        return msgspec.structs.replace(ended, restored_bytes=restored, written_bytes=written)

    def open_usd(
        self, attempts: Iterable[Attempt], beats: Mapping[int, Heartbeat]
    ) -> tuple[Decimal, Decimal]:
        """What open attempts have cost between regions, and what one more checkpoint of each does.

        From its launch on an attempt counts with what it will restore.
        """
        so_far_usd = last_usd = Decimal(0)
        priced = [(a.number, a.launched) for a in attempts if a.launched and is_priced(a.launched)]
        commits = self._commits() if priced else []
        newest_bytes = commits[-1].new_bytes if commits else 0
        for number, launched in priced:
            beat = beats.get(number)
            read = (beat.moved_bytes if beat else 0) + self._restored(commits, number)
            written = _written(commits, number)
            so_far_usd += egress_usd(launched, read_bytes=read, written_bytes=written)
            last_usd += egress_usd(launched, read_bytes=0, written_bytes=newest_bytes)
        return so_far_usd, last_usd

    def _restored(self, commits: Sequence[Commit], attempt: int) -> int:
        """What an attempt reads that goes on from what those before it have committed."""
        before = [commit for commit in commits if commit.attempt < attempt]
        return before[-1].size_bytes if before else self._from_parent()

    def _commits(self) -> list[Commit]:
        """All there ever were, oldest first."""
        _refresh(self._chain)
        found = dict(self._chain.commits) | self._chain.pruned
        return [found[seq] for seq in sorted(found)]

    def _from_parent(self) -> int:
        """What is read of the run that this one was started from."""
        origin = self._resume_from
        if self._parent_bytes is None and origin is not None:
            chain = Run(self._run.root, origin.run_id).chain()
            _refresh(chain)
            commit = (dict(chain.commits) | chain.pruned).get(origin.seq)
            self._parent_bytes = commit.size_bytes if commit else 0
        return self._parent_bytes or 0


def is_priced(priced: e.Launched | Offer) -> bool:
    """Whether bytes between such an instance and the storage cost anything."""
    return bool(priced.read_usd_gb or priced.write_usd_gb)


def _written(commits: Sequence[Commit], attempt: int) -> int:
    """What the commits of an attempt have written, also those that are no longer kept."""
    return sum(commit.new_bytes for commit in commits if commit.attempt == attempt)


def _refresh(chain: CheckpointChain) -> None:
    try:
        chain.refresh()
    except FormatError as error:
        _log.warning("What checkpoints cost between regions is counted in part: %s", error)
