"""A StorageWriter for ``torch.distributed.checkpoint``: all ranks write, one commit for all.

What the plan tells each rank: under which claim and save it names its packs. What each rank gives
back: its part (:class:`spotfirst.checkpoints.ranks.RankPart`), as JSON.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future as Task
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import msgspec
import torch  # noqa: TID253 - this module is torch's interface; nothing else imports it
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner  # noqa: TID253
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex  # noqa: TID253
from torch.distributed.checkpoint.planner import (  # noqa: TID253
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult  # noqa: TID253
from torch.futures import Future  # noqa: TID253

from spotfirst.checkpoints.manifest import (
    ArrayRef,
    Part,
    RankState,
    StateManifest,
    read_manifest,
    write_manifest,
)
from spotfirst.checkpoints.memory import Arena
from spotfirst.checkpoints.packs import (
    Location,
    PackWriter,
    known_arrays,
    manifest_name,
    pack_prefix,
)
from spotfirst.checkpoints.ranks import Merger, Piece, RankPart
from spotfirst.checkpoints.retention import Retention, tidy
from spotfirst.checkpoints.snapshot import Block, Planner, Snapshot
from spotfirst.checkpoints.statetree import Leaf, flatten, renumber
from spotfirst.checkpoints.tensors import TensorCollector
from spotfirst.checkpoints.workers import when_all_done
from spotfirst.distributed.session import Place, Session, session
from spotfirst.distributed.trees import Path, nest
from spotfirst.errors import (
    FormatError,
    InvalidSpec,
    SaveOvertaken,
    StateMismatch,
    StorageError,
    UnsupportedState,
)
from spotfirst.patience import patiently
from spotfirst.storage import Storage
from spotfirst.wire import Record, decode, encode

__all__ = ["SpotfirstWriter", "step_of"]

_log = logging.getLogger(__name__)

_MEMORY_BYTES = 512 << 20
"""What the copy of a rank's state takes at most, on its way to the storage."""
_WORKERS = 4


class _Order(Record):
    """What a rank has to know to write: where, and which checkpoint it may share chunks with."""

    claim: int
    save: int
    rank: int
    ranks: int
    step: int
    newest: str = ""
    digest: str = ""


@dataclasses.dataclass
class _Save:
    """A save under way. Torch makes all calls of a save in one thread, so it is kept by thread."""

    step: int
    metrics: dict[str, float]
    committed: int
    """How many commits there were when it began."""
    is_coordinator: bool = False
    order: _Order | None = None


class SpotfirstWriter(StorageWriter):
    """Give it to ``dcp.save`` or ``dcp.async_save``, with the finished steps as ``checkpoint_id``.

    Made on all ranks. ``storage`` is a folder, a URL or a :class:`~spotfirst.run.Run`; inside of an
    attempt it is left out. The first save claims the run, which waits until the attempt before has
    let go (a :class:`~spotfirst.distributed.SpotfirstReader` in the same process has done so).
    ``retention`` says which checkpoints stay, ``metrics`` what belongs to the next one.

    Saves of one process may overlap, each with a planner of its own: they are written one after
    another. One that would be committed after a save of a later step is dropped, and its future
    raises :class:`SaveOvertaken`. Of several ranks, wait for a save's future before the next one:
    their collective calls must not overlap, which is torch's own rule.

    Works with torch's default planners, whose pickling is not used: values that are no tensors are
    kept as JSON trees. A planner that is of another kind can only save tensors. A save that fails,
    on whatever rank, leaves the previous checkpoint the newest; of a claim that is lost,
    ``dcp.save`` raises a ``CheckpointException`` in which it says :class:`ClaimLost`.
    """

    def __init__(
        self,
        storage: Place = None,
        *,
        retention: Retention | None = None,
        memory_bytes: int = _MEMORY_BYTES,
    ) -> None:
        self._session = session(storage)
        self._retention = retention
        self._memory_bytes = memory_bytes
        self._arena = Arena()
        self._planner = Planner()
        self._threads = threading.local()
        self.metrics: dict[str, float] = {}
        """What was measured at the step that is saved next; for retention, and for people."""

    def __reduce__(self) -> NoReturn:
        msg = (
            "a SpotfirstWriter holds the claim of this process and cannot be sent to another; use "
            "async_checkpointer_type=AsyncCheckpointerType.THREAD"
        )
        raise InvalidSpec(msg)

    # -- torch's protocol, in its order -----------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | int | None = None) -> None:
        """``checkpoint_id`` is the number of finished steps."""
        step = step_of(checkpoint_id)
        self._threads.save = None
        if step is not None:
            self._session.turns.arrive(step)
            self._threads.save = _Save(step, dict(self.metrics), len(self._session.committed))

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **kwargs: Any) -> None:
        """Rank 0 claims the run, if this process has not."""
        if not kwargs.get("use_collectives", True):
            msg = "SpotfirstWriter makes one checkpoint of all ranks: leave use_collectives as True"
            raise InvalidSpec(msg)
        self._save.is_coordinator = is_coordinator
        if is_coordinator:
            self._session.take()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Number the save, for all ranks."""
        first = self._numbered(self._save.step, len(plans))
        orders = [msgspec.structs.replace(first, rank=rank) for rank in range(len(plans))]
        return [
            dataclasses.replace(plan, storage_data=encode(order))
            for plan, order in zip(plans, orders, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's packs."""
        is_written = False
        try:
            result = self._write_data(plan, planner)
            is_written = True
            return result
        finally:
            # A single rank keeps its turn until the save is committed.
            save: _Save | None = self._threads.save
            if not is_written or save is None or save.order is None or save.order.ranks > 1:
                self._session.turns.give()

    def _write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        save = self._save
        order = save.order = decode(plan.storage_data, _Order, path="the plan of a checkpoint")
        if not save.is_coordinator:
            self._threads.save = None
        ours = self._session
        with ours.lock:
            if (order.claim, order.save) in ours.written:
                msg = (
                    "the planner has used an old plan again: leave its enable_plan_caching as False"
                )
                raise InvalidSpec(msg)
            ours.written.add((order.claim, order.save))
        collector = TensorCollector()
        pieces, trees = _collect(plan, planner, collector)
        keeps_plan = getattr(type(planner), "finish_plan", None) is DefaultSavePlanner.finish_plan
        if keeps_plan and getattr(planner, "plan", plan) is not plan:
            msg = (
                f"the planner of the save of step {order.step} is in use for another save at the "
                "same time: give each save a planner of its own"
            )
            raise InvalidSpec(msg)
        ours.turns.take()
        if order.ranks == 1:
            order = save.order = self._numbered(order.step, 1)
        return self._write_part(order, collector, pieces, trees)

    def _numbered(self, step: int, ranks: int) -> _Order:
        """The order of the first of ``ranks``, for a save that comes after all before."""
        ours = self._session
        with ours.lock:
            ours.saves += 1
            number, newest = ours.saves, ours.chain.newest()
        commit = newest[1] if newest is not None and newest[1].content == "state" else None
        return _Order(
            claim=ours.claim, save=number, rank=0, ranks=ranks, step=step,
            newest=commit.manifest if commit else "", digest=commit.digest if commit else "",
        )  # fmt: skip

    def _write_part(
        self,
        order: _Order,
        collector: TensorCollector,
        pieces: list[Piece],
        trees: dict[str, Any],
    ) -> Future[list[WriteResult]]:
        ours = self._session
        known = self._known(order)
        writer = PackWriter(
            ours.run.packs(), pack_prefix(order.claim, order.save, order.rank), known,
            write=lambda action: patiently(action, what="write a checkpoint"),
        )  # fmt: skip
        try:
            arrays = self._write(writer, order.step, collector.leaves)
        except BaseException:
            _discard(writer)
            raise
        part = RankPart(
            rank=order.rank, step=order.step, packs=writer.finish(), arrays=arrays,
            pieces=tuple(pieces), state=RankState(objects=trees), new_bytes=writer.new_bytes,
        )  # fmt: skip
        # Valid once this save is committed, which the next plan tells.
        ours.known_of = _manifest_name(order)
        ours.known = known_arrays(part.packs, arrays)
        future: Future[list[WriteResult]] = Future()
        future.set_result([WriteResult(MetadataIndex(""), part.new_bytes, encode(part))])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Merge the ranks' parts into one manifest, and commit it."""
        try:
            self._finish(metadata, results)
        finally:
            self._session.turns.give()

    def _finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        parts = [
            decode(result.storage_data, RankPart, path="a rank's part of a checkpoint")
            for of_rank in results
            for result in of_rank
        ]
        ours, save = self._session, self._save
        self._threads.save = None
        with ours.lock:
            assert save.order is not None
            manifest = _merged(save.step, metadata, parts)
            new_bytes = sum(part.new_bytes for part in parts)
            self._commit(ours, save, save.order, manifest, new_bytes)

    def _commit(
        self,
        ours: Session,
        save: _Save,
        order: _Order,
        manifest: StateManifest,
        new_bytes: int,
    ) -> None:
        assert ours.attempt is not None
        attempt = ours.attempt
        later = [
            step
            for number, step in ours.committed[save.committed :]
            if number > order.save or step > order.step
        ]
        kept = {commit.manifest for _, commit in ours.chain.commits}
        if later or (order.newest and order.newest not in kept):
            msg = (
                f"the save of step {order.step} was overtaken by that of step "
                f"{max(later, default='another')} and is not committed; wait for a save's future "
                "before the next one to keep both"
            )
            raise SaveOvertaken(msg)
        packs = ours.run.packs()
        name = _manifest_name(order)
        what = f"save the checkpoint of step {order.step}"
        digest, size_bytes = patiently(lambda: write_manifest(packs, name, manifest), what=what)
        patiently(
            lambda: ours.chain.commit(
                attempt, step=order.step, manifest=name, digest=digest, content="state",
                size_bytes=manifest.size_bytes + size_bytes,
                new_bytes=new_bytes + size_bytes,
                metrics=save.metrics,
            ),
            what=what,
        )  # fmt: skip
        ours.committed.append((order.save, order.step))
        self._clean(ours, attempt, packs)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a number of steps."""
        try:
            return step_of(checkpoint_id) is not None
        except InvalidSpec:
            return False

    # -- how -----------------------------------------------------------------------------------

    @property
    def _save(self) -> _Save:
        save: _Save | None = getattr(self._threads, "save", None)
        if save is None:
            msg = "say which step this is: dcp.save(state, checkpoint_id=step, storage_writer=…)"
            raise InvalidSpec(msg)
        return save

    def _known(self, order: _Order) -> Mapping[str, Location]:
        ours = self._session
        if not order.newest:
            return {}
        if ours.known_of != order.newest:
            ours.known = {}
            try:
                manifest = read_manifest(ours.run.packs(), order.newest, order.digest)
            except (StorageError, FormatError) as error:
                _log.warning("cannot read the newest checkpoint, writing all anew: %s", error)
                return {}
            if isinstance(manifest, StateManifest):
                ours.known = known_arrays(manifest.packs, manifest.arrays)
                ours.known_of = order.newest
        return ours.known

    def _write(self, writer: PackWriter, step: int, leaves: list[Leaf]) -> tuple[ArrayRef, ...]:
        snapshot = Snapshot(
            step=step, objects={}, ranked={}, rng=None, leaves=leaves, metrics={}, taken_at=0.0,
            arena=self._arena, memory_bytes=self._memory_bytes,
            plan=self._planner.plan(leaves),
        )  # fmt: skip
        tasks: list[tuple[Task[list[Part]], Block]] = []
        with ThreadPoolExecutor(_WORKERS, thread_name_prefix="spotfirst-write") as pool:
            for block in snapshot.blocks():
                task = pool.submit(_add, writer, block)
                when_all_done([task], block.free)
                tasks.append((task, block))
        parts: list[list[Part]] = [[] for _ in leaves]
        for task, block in tasks:
            for leaf, part in zip(block.leaves, task.result(), strict=True):
                parts[leaf].append(part)
        return tuple(
            ArrayRef(dtype=leaf.dtype, shape=leaf.shape, parts=tuple(of_leaf))
            for leaf, of_leaf in zip(leaves, parts, strict=True)
        )

    def _clean(self, ours: Session, attempt: int, packs: Storage) -> None:
        retention = self._retention or ours.retention or Retention()
        tidy(packs, ours.chain, attempt, retention, pinned=ours.run.pinned)


def step_of(checkpoint_id: str | os.PathLike[str] | int | None) -> int | None:
    """The steps that a ``checkpoint_id`` says. Raises :class:`InvalidSpec`."""
    if checkpoint_id is None:
        return None
    text = str(checkpoint_id)
    if not text.isascii() or not text.isdigit():
        msg = (
            f"checkpoint_id={text!r} is no number of steps; give the finished ones, such as "
            "checkpoint_id=100. Where checkpoints are is told by SpotfirstWriter(storage=…)"
        )
        raise InvalidSpec(msg)
    return int(text)


def _collect(
    plan: SavePlan, planner: SavePlanner, collector: TensorCollector
) -> tuple[list[Piece], dict[str, Any]]:
    """The tensors of a rank's plan as pieces, and the trees of its other values."""
    pieces: list[Piece] = []
    trees: dict[str, Any] = {}
    tensors: list[torch.Tensor] = []  # alive until the last is taken: they are told by address
    for item in plan.items:
        name = item.index.fqn
        if item.type == WriteItemType.BYTE_IO:
            trees[name] = flatten(_value(item, planner), collector, name)
            continue
        assert item.tensor_data is not None
        tensor = planner.resolve_data(item)
        if not isinstance(tensor, torch.Tensor):
            msg = f"{name}: {type(planner).__name__} gives {type(tensor).__name__}, not a tensor"
            raise UnsupportedState(msg)
        tensors.append(tensor)
        node = collector.take(tensor.detach(), name)
        assert node is not None
        pieces.append(
            Piece(
                key=name, shape=tuple(item.tensor_data.size),
                offset=tuple(item.tensor_data.chunk.offsets), array=node["tensor"],
            )
        )  # fmt: skip
    return pieces, trees


def _value(item: WriteItem, planner: SavePlanner) -> Any:
    """What torch would pickle."""
    if isinstance(planner, DefaultSavePlanner):
        return planner.lookup_object(item.index)
    msg = (
        f"{item.index.fqn} is no tensor, and {type(planner).__name__} would pickle it, which "
        "Spotfirst does not store; use a planner that extends DefaultSavePlanner"
    )
    raise UnsupportedState(msg)


def _merged(step: int, metadata: Metadata, parts: list[RankPart]) -> StateManifest:
    merger = Merger()
    pieces: dict[str, list[tuple[RankPart, Piece]]] = {}
    values: dict[str, tuple[RankPart, Any]] = {}
    for part in parts:
        for piece in part.pieces:
            pieces.setdefault(piece.key, []).append((part, piece))
        values.update({name: (part, tree) for name, tree in part.state.objects.items()})
    nodes: dict[str, Any] = {}
    for name in metadata.state_dict_metadata:
        if name in values:
            part, tree = values[name]
            taken: dict[int, int] = {}

            def number(old: int, part: RankPart = part, taken: dict[int, int] = taken) -> int:
                if old not in taken:
                    taken[old] = merger.own(part, old)
                return taken[old]

            nodes[name] = renumber(tree, number)
        else:
            nodes[name] = {"tensor": merger.whole(name, pieces.get(name, []))}
    paths: Mapping[str, Path] = metadata.planner_data or {}
    is_flat = metadata.planner_data is not None
    try:
        objects = nest(nodes, paths)
    except (AttributeError, KeyError, TypeError) as error:
        msg = f"the planner gives no place in the state dict for its names: {error!r}"
        raise StateMismatch(msg) from error
    return StateManifest(
        step=step, packs=merger.packs, arrays=tuple(merger.arrays), objects=objects,
        ranks=tuple(RankState() for _ in parts), flat=is_flat,
    )  # fmt: skip


def _add(writer: PackWriter, block: Block) -> list[Part]:
    return writer.add(block.memory, block.cuts, block.hashed())


def _discard(writer: PackWriter) -> None:
    try:
        writer.discard()
    except StorageError as error:
        _log.warning("could not remove an unfinished checkpoint, will try again: %s", error)


def _manifest_name(order: _Order) -> str:
    return manifest_name(order.claim, order.save)
