"""Which checkpoints stay, and how the bytes of the others go: safe beside a writer, after any kill.

Two steps. First an entry in the chain says which checkpoints are no longer kept (:func:`prune`):
only the holder of the claim can write it, so nobody builds on one of them afterwards. Then objects
are removed (:func:`collect`) by one rule:

    garbage is what no kept or pinned checkpoint names, and what is older than the newest commit.

Objects are named by claim and save, in that order, so *older* is a comparison of names. A save that
is under way is newer than the newest commit; one of a fenced writer never will be committed.
A collection that was cut short leaves objects that the next one finds.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection
from typing import Literal

from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.checkpoints.manifest import read_manifest
from spotfirst.errors import CorruptObject, FormatError, InvalidSpec, ObjectMissing, StorageError
from spotfirst.storage import Storage
from spotfirst.wire import Record

__all__ = ["Retention", "best_first", "collect", "garbage", "kept", "prune", "tidy"]

_log = logging.getLogger(__name__)

_OBJECT = re.compile(r"(\d{8})/(\d{6})\b.*")


class Retention(Record):
    """Which checkpoints to keep: the union of what its fields say. The newest one always stays.

    Of several checkpoints of one step the newest counts. ``last``: so many of the newest; ``None`` keeps all. ``every_steps``: the first one in each so
    many steps. ``best``: so many with the lowest (``mode="min"``) or highest ``metric``.
    """

    last: int | None = 5
    every_steps: int | None = None
    best: int = 0
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"

    def check(self) -> None:
        """Raise :class:`InvalidSpec` for numbers that keep nothing."""
        wrong = (
            (self.last is not None and self.last < 1)
            or (self.every_steps is not None and self.every_steps < 1)
            or self.best < 0
            or (self.best and not self.metric)
        )
        if wrong:
            msg = (
                f"retention has last={self.last}, every_steps={self.every_steps}, best={self.best}: last and "
                "every_steps are 1 or more (or None), best is 0 or more and needs the name of a "
                "metric"
            )
            raise InvalidSpec(msg)


def kept(commits: Collection[tuple[int, Commit]], retention: Retention) -> set[int]:
    """The sequence numbers to keep of ``commits`` (oldest first)."""
    commits = list(commits)
    if retention.last is None:
        return {seq for seq, _ in commits}
    # Else several that differ only in their logs would displace the one to go back to.
    newest = {commit.step: seq for seq, commit in commits}
    different = [(seq, commit) for seq, commit in commits if newest[commit.step] == seq]
    keep = {seq for seq, _ in different[-max(1, retention.last) :]}
    if retention.every_steps:
        buckets: dict[int, int] = {}
        for seq, commit in different:
            buckets.setdefault(commit.step // retention.every_steps, seq)
        keep |= set(buckets.values())
    if retention.best:
        keep |= set(best_first(commits, retention)[: retention.best])
    return keep


def best_first(commits: Collection[tuple[int, Commit]], retention: Retention) -> list[int]:
    """The sequence numbers of those that have the metric (and not NaN), the best one first."""
    sign = 1 if retention.mode == "min" else -1
    measured = [
        (sign * commit.metrics[retention.metric], seq)
        for seq, commit in commits
        if not math.isnan(commit.metrics.get(retention.metric, math.nan))
    ]
    return [seq for _, seq in sorted(measured)]


def prune(chain: CheckpointChain, attempt: int, retention: Retention) -> bool:
    """Say in the chain which checkpoints are no longer kept; whether there were any.

    Raises :class:`ClaimLost`.
    """
    keep = kept(chain.commits, retention)
    gone = [seq for seq, _ in chain.commits if seq not in keep]
    if gone:
        chain.prune(attempt, gone)
    return bool(gone)


def collect(
    packs: Storage,
    chain: CheckpointChain,
    pinned: Collection[int] = (),
    names: dict[str, frozenset[str]] | None = None,
) -> tuple[int, int]:
    """Remove garbage; how many objects and bytes that were. Asks and raises as :func:`garbage`."""
    found = garbage(packs, chain, pinned, names)
    packs.delete_many([name for name, _ in found])
    return len(found), sum(size for _, size in found)


def tidy(
    packs: Storage,
    chain: CheckpointChain,
    attempt: int,
    retention: Retention,
    *,
    pinned: Callable[[], Collection[int]],
    names: dict[str, frozenset[str]] | None = None,
) -> None:
    """Let go of checkpoints that are not to be kept. What fails here is done the next time.

    Raises :class:`ClaimLost`.
    """
    try:
        if prune(chain, attempt, retention):
            collect(packs, chain, pinned(), names)
    except (StorageError, FormatError) as error:
        _log.warning("could not remove old checkpoints, will try again: %s", error)


def garbage(
    packs: Storage,
    chain: CheckpointChain,
    pinned: Collection[int] = (),
    names: dict[str, frozenset[str]] | None = None,
) -> list[tuple[str, int]]:
    """What may go, as (name, size in bytes).

    ``names`` remembers what each manifest names, by its digest: reading one again takes the
    interpreter's time from the training.

    ``chain`` has been read *before* ``pinned`` was: who pins looks at the chain afterwards. Reads
    the manifests that stay. One that is damaged names nothing that could be restored; when it is
    the newest one's, it stops the collection with the error of :func:`read_manifest`.
    """
    newest = chain.newest()
    if newest is None:
        return []
    staying = [commit for _, commit in chain.commits]
    staying += [commit for seq, commit in chain.pruned.items() if seq in pinned]
    names = {} if names is None else names
    named: set[str] = set()
    for commit in staying:
        if commit.digest not in names:
            try:
                manifest = read_manifest(packs, commit.manifest, commit.digest)
            except (CorruptObject, ObjectMissing):
                if commit is newest[1]:
                    raise
                continue  # it cannot be restored, so what it named is of no use
            names[commit.digest] = frozenset(pack.name for pack in manifest.packs)
        named.add(commit.manifest)
        named |= names[commit.digest]
    for digest in names.keys() - {commit.digest for commit in staying}:
        del names[digest]
    limit = _age(newest[1].manifest) or (0, 0)
    return [
        (name, size)
        for name, size in packs.walk("")
        if name not in named and (age := _age(name)) is not None and age < limit
    ]


def _age(name: str) -> tuple[int, int] | None:
    match = _OBJECT.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None
