"""Makes snapshots durable beside the training: packs, then the manifest, then the commit.

One thread copies what is lazy and waits for the writes; a few workers hash and write. A *tier* is a
place that a checkpoint is saved to: first the local disk, if there is one, and then the storage.

Of several ranks, each does all this for its own part of the state, and rank 0 alone commits: see
:mod:`spotfirst.checkpoints.ranks`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import msgspec

from spotfirst.checkpoints.chain import CheckpointChain
from spotfirst.checkpoints.codec import pays
from spotfirst.checkpoints.manifest import (
    ArrayRef,
    PackRef,
    Part,
    RankState,
    StateManifest,
    write_manifest,
)
from spotfirst.checkpoints.packs import (
    PACK_BYTES,
    Location,
    PackWriter,
    known_arrays,
    manifest_name,
    pack_prefix,
)
from spotfirst.checkpoints.ranks import (
    RankPart,
    Team,
    hand_in,
    merge,
    part_name,
    unlike,
    wait_for_parts,
)
from spotfirst.checkpoints.retention import Retention, tidy
from spotfirst.checkpoints.snapshot import Block, Snapshot, Torn
from spotfirst.checkpoints.statetree import ITEM_BYTES
from spotfirst.checkpoints.workers import Workers, when_all_done
from spotfirst.errors import ClaimLost, StorageError
from spotfirst.patience import Sleep, once_taken, patiently
from spotfirst.storage import Storage

__all__ = ["Saved", "Saver", "Tier"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_WORKERS = 4
_MEASURE_EVERY = 10
"""Saves from one look at whether compression pays to the next."""
_PARTS_LIMIT_S = 600.0
"""How long after its own part is written rank 0 waits for those of the others."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete. ``took_s`` counts from the snapshot to the commit."""

    seq: int
    step: int
    took_s: float
    new_bytes: int


@dataclass
class Tier:
    """A place that checkpoints are saved to; ``claim`` is the number of our claim in the chain.

    ``known`` is what its newest checkpoint holds, ``pinned`` asks which ones others start from,
    ``names`` remembers what the manifests of kept ones name. An ``expendable`` tier that fails is given up.
    """

    packs: Storage
    chain: CheckpointChain
    attempt: int
    claim: int
    expendable: bool = False
    retention: Retention = field(default_factory=Retention)
    known: dict[str, Location] = field(default_factory=dict)
    pinned: Callable[[], Collection[int]] = frozenset
    names: dict[str, frozenset[str]] = field(default_factory=dict)


class Saver:
    """Saves one snapshot at a time. The chains are the saver's own while a save is running."""

    def __init__(
        self,
        tiers: list[Tier],
        *,
        on_saved: Callable[[Saved], None],
        warn: Callable[[str], None],
        compress: bool | Literal["auto"] = False,
        team: Team | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Sleep = time.sleep,
    ) -> None:
        self._tiers = tiers
        self._on_saved = on_saved
        self._warn = warn
        self._compress = compress
        self._team = team
        self._monotonic = monotonic
        self._sleep = sleep
        self._workers = Workers(_WORKERS, "spotfirst-write")
        self._thread: threading.Thread | None = None
        self._saves = 0
        self._compressed = False
        self._snapshot: Snapshot | None = None
        self._storing: _TierSave | None = None
        self._lost: ClaimLost | None = None
        self._error: Exception | None = None
        self._abandoned = False
        self.was_torn = False
        """Whether a lazy copy met a change: from now on, copy eagerly."""
        self.newest_step: int | None = None
        """Finished steps in the newest checkpoint that is complete."""
        self.last: Saved | None = None
        """The last save of this process."""
        self.in_a_hurry = False
        """Whether to leave the removal of old checkpoints to whoever comes next."""
        self.waited_s = 0.0
        """What :meth:`wait_copied` has waited, in all."""
        self.changes_in_s: float | None = None
        """From the end of a step until the next one changes the state, as it was last."""
        self._stepped_at: float | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is running."""
        return self._thread is not None and self._thread.is_alive()

    def check(self) -> None:
        """Raise :class:`ClaimLost` when a save has found that this attempt may not commit."""
        if self._lost is not None:
            raise self._lost

    @property
    def next_number(self) -> int:
        """The number of the save that :meth:`start` begins; it is in the names of what it writes."""
        return self._saves + 1

    def start(self, snapshot: Snapshot, number: int | None = None) -> None:
        """Begin to save, as save ``number`` if that is given. Not while :attr:`busy`."""
        assert not self.busy, "a save is running, and it owns the chain and the memory"
        self._error = None
        self._snapshot = snapshot
        self._storing = None
        self._saves = number or self.next_number
        # A daemon: when the script dies, a storage that does not answer must not keep it alive.
        self._thread = threading.Thread(
            target=self._save, args=(snapshot,), name="spotfirst-save", daemon=True
        )
        self._thread.start()
        if snapshot.must_wait:
            self._warn(
                f"a copy of the state takes {snapshot.size_bytes / 1e9:.2g} GB, more than there is "
                "memory for: training waits while a checkpoint is written"
            )
            snapshot.wait_copied()

    def stepped(self) -> None:
        """A step has ended."""
        self._stepped_at = self._monotonic()

    def wait_copied(self) -> float:
        """Wait until the state may change; the seconds that took."""
        if self._stepped_at is not None:
            self.changes_in_s = self._monotonic() - self._stepped_at
            self._stepped_at = None
        snapshot = self._snapshot
        if snapshot is None or snapshot.is_copied:
            return 0.0
        start = self._monotonic()
        snapshot.wait_copied()
        took_s = self._monotonic() - start
        self.waited_s += took_s
        return took_s

    def finish(self, timeout_s: float | None = None) -> Exception | None:
        """Wait for the running save, however long it takes; what went wrong with it, if anything.

        With ``timeout_s``, a save that takes longer is abandoned: it will not commit. Raises
        :class:`ClaimLost`.
        """
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._abandoned = True
                self._thread.join(1.0)
                msg = f"the checkpoint was not written within {timeout_s:.1f} s"
                return TimeoutError(msg)
        self.check()
        return self._error

    def left_bytes(self) -> int:
        """Bytes of the running save that are not stored yet."""
        if not self.busy or self._snapshot is None:
            return 0
        stored = self._storing.stored_bytes() if self._storing is not None else 0
        return max(0, self._snapshot.size_bytes - stored)

    @property
    def may_keep_up(self) -> bool:
        """Whether all that checkpoints are saved to are disks here, which may be as fast as training."""
        return all(tier.packs.on_disk for tier in self._tiers)

    @property
    def stores_in_place(self) -> bool:
        """Whether arrays are stored as fast from where they are as from memory that is aligned."""
        if self._team is not None or self.was_torn:
            return False
        return not any(tier.packs.on_disk for tier in self._tiers)

    @property
    def size_bytes(self) -> int:
        """What the newest snapshot takes."""
        return self._snapshot.size_bytes if self._snapshot is not None else 0

    @property
    def step(self) -> int:
        """The step of the newest snapshot."""
        return self._snapshot.step if self._snapshot is not None else 0

    def release(self) -> None:
        """Release the chain. Raises :class:`ClaimLost`."""
        if self.busy or (self._team is not None and self._team.rank):
            return  # abandoned; whoever waits will see that this process has ended
        for tier in self._tiers:
            patiently(
                lambda tier=tier: tier.chain.release(tier.attempt),  # type: ignore[misc]
                what="release the run's checkpoints", sleep=self._sleep, warn=self._warn,
                denied_s=once_taken(self.last is not None),
            )  # fmt: skip

    # -- on the saving thread ---------------------------------------------------------------

    def _save(self, snapshot: Snapshot) -> None:
        try:
            self._save_all(snapshot)
        except ClaimLost as error:
            self._lost = error
        except Torn as error:
            self.was_torn = True
            self._error = error
            self._hand_in_error(snapshot, error)
            self._warn(f"{error}: checkpoints are copied at once from now on, which takes longer")
        except Exception as error:  # noqa: BLE001 - told below; the next save tries again
            self._error = error
            self._hand_in_error(snapshot, error)
            self._warn(
                f"the checkpoint of step {snapshot.step} could not be saved "
                f"({type(error).__name__}: {error}); the next one is tried at its time"
            )

    def _save_all(self, snapshot: Snapshot) -> None:
        rank = self._team.rank if self._team else 0
        saves = [_TierSave(tier, self._saves, rank, self._write) for tier in self._tiers]
        self._storing = next((save for save in saves if not save.tier.expendable), None)
        try:
            self._write_blocks(snapshot, saves)
        except BaseException:
            for save in saves:
                save.discard()
            raise
        # The storage does not wait for the disk: whichever is written first is committed first.
        beside = [
            threading.Thread(target=self._commit_expendable, args=(snapshot, save), daemon=True)
            for save in saves
            if save.tier.expendable
        ]
        for thread in beside:
            thread.start()
        try:
            for save in saves:
                if save.tier.expendable:
                    continue
                try:
                    saved = self._commit(snapshot, save)
                except Torn:
                    save.discard()
                    raise
                if saved is not None:
                    self.newest_step = snapshot.step
                    self.last = saved
                    self._on_saved(saved)
                    self._clean(save.tier)
        finally:  # the next save uses their chains
            for thread in beside:
                thread.join()

    def _commit_expendable(self, snapshot: Snapshot, save: _TierSave) -> None:
        try:
            self._commit(snapshot, save)
            self._clean(save.tier)
        except (ClaimLost, StorageError) as error:
            self._tiers.remove(save.tier)
            self._warn(f"checkpoints are no longer kept on the local disk: {error}")

    def _write_blocks(self, snapshot: Snapshot, saves: list[_TierSave]) -> None:
        compressing: bool | None = None
        for block in snapshot.blocks():
            items = [ITEM_BYTES[snapshot.leaves[leaf].dtype] for leaf in block.leaves]
            if compressing is None:
                compressing = self._is_to_compress(block, items)
            digests = _Once(block)
            tasks = []
            for priority, save in enumerate(saves):
                smaller = compressing and not save.tier.expendable
                wanted = items if smaller else None
                tasks.append(save.submit(self._workers, block, digests, priority, wanted))
            when_all_done(tasks, block.free)

    def _is_to_compress(self, block: Block, items: list[int]) -> bool:
        """What the user says; ``auto``: what the last save's throughput and this block say."""
        if self._compress != "auto":
            return self._compress
        if self.last is None or self._saves % _MEASURE_EVERY != 2 % _MEASURE_EVERY:
            return self._compressed
        (start, size), item_bytes = max(zip(block.cuts, items, strict=True), key=lambda c: c[0][1])
        stored_bytes_s = self.last.new_bytes / max(self.last.took_s, 1e-6)
        sample = block.memory[start : start + size]
        self._compressed = pays(sample, item_bytes, stored_bytes_s, threads=_WORKERS // 2)
        if self._compressed:
            _log.info("the storage takes %.3g MB/s: compressing", stored_bytes_s / 1e6)
        return self._compressed

    def _commit(self, snapshot: Snapshot, save: _TierSave) -> Saved | None:
        # The manifest is made and written while the last packs are: only the commit waits for them.
        parts = save.parts(len(snapshot.leaves))
        packs = save.close(self._workers)
        arrays = tuple(
            ArrayRef(dtype=leaf.dtype, shape=leaf.shape, parts=tuple(parts[number]))
            for number, leaf in enumerate(snapshot.leaves)
        )
        tier = save.tier
        what = f"save the checkpoint of step {snapshot.step}"
        name = manifest_name(tier.claim, self._saves)
        if self._team is None or snapshot.part is None:
            manifest = StateManifest(
                step=snapshot.step, packs=packs, arrays=arrays, objects=snapshot.objects,
                ranks=(RankState(objects=snapshot.ranked, rng=snapshot.rng),), made=snapshot.made,
            )  # fmt: skip
            digest, size_bytes = self._write_manifest(tier, what, name, manifest)
            save.wait_written()
            snapshot.prove_stored()
            new_bytes = save.writer.new_bytes
        else:
            save.wait_written()
            new_bytes = save.writer.new_bytes
            part = msgspec.structs.replace(
                snapshot.part, packs=packs, arrays=arrays, new_bytes=new_bytes
            )
            ranks = self._rank_parts(tier, what, part)
            if not ranks:
                tier.known = known_arrays(packs, arrays)
                return None
            manifest = merge(ranks)
            if odd := unlike(ranks):
                self._warn(
                    f"parameters or optimizer state of ranks {odd} are not those of rank 0, and no "
                    "DTensors: a checkpoint has one value for all ranks. Wrap the model in "
                    "DistributedDataParallel, or shard it"
                )
            new_bytes = sum(each.new_bytes for each in ranks)
            digest, size_bytes = self._write_manifest(tier, what, name, manifest)
        if self._is_abandoned():
            save.discard()
            return None
        seq = self._patiently(
            tier, what,
            lambda: tier.chain.commit(
                tier.attempt, step=snapshot.step, manifest=name, digest=digest, content="state",
                size_bytes=manifest.size_bytes + size_bytes,
                new_bytes=new_bytes + size_bytes, metrics=snapshot.metrics,
            ),
        )  # fmt: skip
        tier.known = known_arrays(packs, arrays)
        tier.names[digest] = frozenset(pack.name for pack in manifest.packs)
        self._remove_parts(tier)
        took_s = self._monotonic() - snapshot.taken_at
        return Saved(seq, snapshot.step, took_s, new_bytes + size_bytes)

    def _write_manifest(
        self, tier: Tier, what: str, name: str, manifest: StateManifest
    ) -> tuple[str, int]:
        return self._patiently(tier, what, lambda: write_manifest(tier.packs, name, manifest))

    # -- of several ranks ---------------------------------------------------------------------

    def _rank_parts(self, tier: Tier, what: str, part: RankPart) -> list[RankPart]:
        """The parts of all ranks, on rank 0; the others hand theirs in, and get none."""
        assert self._team is not None
        claim, number = tier.claim, self._saves
        if self._team.rank:
            self._patiently(tier, what, lambda: hand_in(tier.packs, claim, number, part))
            return []
        others = self._patiently(
            tier, what,
            lambda: wait_for_parts(
                tier.packs, claim, number, range(1, self._team.size if self._team else 1),
                limit_s=_PARTS_LIMIT_S, stop=self._is_abandoned, monotonic=self._monotonic,
            ),
        )  # fmt: skip
        return [part, *others]

    def _hand_in_error(self, snapshot: Snapshot, error: Exception) -> None:
        """Tell rank 0 that it need not wait."""
        if self._team is None or not self._team.rank:
            return
        part = RankPart(
            rank=self._team.rank, step=snapshot.step, error=f"{type(error).__name__}: {error}"
        )
        for tier in self._tiers:
            with contextlib.suppress(StorageError):
                hand_in(tier.packs, tier.claim, self._saves, part)

    def _remove_parts(self, tier: Tier) -> None:
        """The manifest has what they said. What is left of them is garbage that is collected."""
        if self._team is None or tier.expendable:
            return
        names = [part_name(tier.claim, self._saves, rank) for rank in range(1, self._team.size)]
        with contextlib.suppress(StorageError):
            tier.packs.delete_many(names)

    def _clean(self, tier: Tier) -> None:
        if self.in_a_hurry:
            return
        tidy(
            tier.packs,
            tier.chain,
            tier.attempt,
            tier.retention,
            pinned=tier.pinned,
            names=tier.names,
        )

    def _is_abandoned(self) -> bool:
        return self._abandoned

    def _write(self, tier: Tier, action: Callable[[], None]) -> None:
        self._patiently(tier, "write a checkpoint", action)

    def _patiently(self, tier: Tier, what: str, action: Callable[[], _T]) -> _T:
        if tier.expendable:
            return action()
        return patiently(
            action, what=what, sleep=self._sleep, warn=self._warn, stop=self._is_abandoned,
            denied_s=once_taken(self.last is not None),
        )  # fmt: skip


class _TierSave:
    """One snapshot on its way to one tier."""

    def __init__(
        self,
        tier: Tier,
        number: int,
        rank: int,
        write: Callable[[Tier, Callable[[], None]], None],
    ) -> None:
        self.tier = tier
        self.writer = PackWriter(
            tier.packs, pack_prefix(tier.claim, number, rank), tier.known,
            write=lambda action: write(tier, action),
        )  # fmt: skip
        self._placed: list[tuple[Future[list[Part]], Block]] = []
        self._tasks: list[tuple[Future[None], int]] = []

    def stored_bytes(self) -> int:
        """How much of the snapshot is stored. What is small waits for the last pack."""
        return sum(size for task, size in list(self._tasks) if task.done())

    def submit(
        self,
        workers: Workers,
        block: Block,
        digests: _Once,
        priority: int,
        items: list[int] | None,
    ) -> Future[None]:
        """Hash (once for all tiers), compress if asked to, and write a block, by a free worker."""
        placed: Future[list[Part]] = Future()

        def work() -> None:
            try:
                parts, writes = self.writer.place(block.memory, block.cuts, digests.get(), items)
            except BaseException as error:
                placed.set_exception(error)
                raise
            placed.set_result(parts)
            for write in writes:
                write()

        size = len(block.memory) if len(block.memory) >= PACK_BYTES // 8 else 0
        self._placed.append((placed, block))
        task = workers.submit(work, priority=priority)
        self._tasks.append((task, size))
        return task

    def parts(self, leaves: int) -> list[list[Part]]:
        """The parts of each leaf, known before they are written."""
        parts: list[list[Part]] = [[] for _ in range(leaves)]
        for placed, block in self._placed:
            for leaf, part in zip(block.leaves, placed.result(), strict=True):
                parts[leaf].append(part)
        return parts

    def close(self, workers: Workers) -> tuple[PackRef, ...]:
        """Have the last pack written; all packs."""
        packs, writes = self.writer.close()
        self._tasks += [(workers.submit(write), 0) for write in writes]
        return packs

    def wait_written(self) -> None:
        """Until every pack is stored; raises what went wrong with one of them."""
        for task, _ in self._tasks:
            task.result()

    def discard(self) -> None:
        """Remove what was written, when that can be; else the next collection does."""
        try:
            for task, _ in self._tasks:
                if not task.cancel():
                    task.exception()
            self.writer.discard()
        except StorageError as error:
            _log.warning("could not remove an unfinished checkpoint, will try again: %s", error)


class _Once:
    """The digests of a block's chunks, made by the first tier that needs them."""

    def __init__(self, block: Block) -> None:
        self._block = block
        self._lock = threading.Lock()
        self._digests: list[str] | None = None

    def get(self) -> list[str]:
        with self._lock:
            if self._digests is None:
                self._digests = self._block.hashed()
            return self._digests
