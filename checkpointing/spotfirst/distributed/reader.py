"""A StorageReader for ``torch.distributed.checkpoint``: any checkpoint of a run, at any world size."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import psutil
import torch  # noqa: TID253 - this module is torch's interface; nothing else imports it
import torch.distributed as dist  # noqa: TID253
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner  # noqa: TID253
from torch.distributed.checkpoint.metadata import (  # noqa: TID253
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (  # noqa: TID253
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
)
from torch.distributed.checkpoint.storage import StorageReader  # noqa: TID253
from torch.futures import Future  # noqa: TID253

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.loading import StateReader, stored_trees
from spotfirst.checkpoints.manifest import ArrayRef, StateManifest, read_manifest
from spotfirst.checkpoints.packs import fetch
from spotfirst.checkpoints.regions import RegionPlan
from spotfirst.checkpoints.statetree import ITEM_BYTES
from spotfirst.checkpoints.streaming import pieces, stream
from spotfirst.distributed.session import Place, session
from spotfirst.distributed.trees import Path, named
from spotfirst.distributed.writer import step_of
from spotfirst.errors import (
    CorruptObject,
    InvalidSpec,
    ObjectMissing,
    StateMismatch,
    UnknownRun,
    UnsupportedState,
)
from spotfirst.patience import patiently

__all__ = ["SpotfirstReader"]

_log = logging.getLogger(__name__)

_MEMORY_SHARE = 0.5
"""Of the memory that is left, what a rank's part may take until it is verified."""
_WHOLE, _DAMAGED, _FATAL = range(3)


class SpotfirstReader(StorageReader):
    """Give it to ``dcp.load``; it reads the newest checkpoint, or that of ``checkpoint_id`` steps.

    A newest checkpoint that is damaged is passed over for the one before, with a warning; :attr:`step`
    says after ``dcp.load`` which one it was. Every byte is verified before anything of the caller's
    is changed.

    ``storage`` is as for :class:`~spotfirst.distributed.SpotfirstWriter`. Made on all ranks at
    once, unless ``no_dist``: rank 0 says which checkpoint it is. Inside of an attempt it *claims*
    the run first, which waits until the attempt before has let go, so that what is read is what
    training goes on from.

    Raises :class:`ClaimLost`, :class:`Drained`, and :class:`UnknownRun` for a step of which there
    is no checkpoint. Reading raises :class:`CorruptObject` when no checkpoint is whole, or that of
    ``checkpoint_id`` is not.
    """

    def __init__(self, storage: Place = None, *, no_dist: bool = False) -> None:
        self._session = session(storage)
        self._together = not no_dist and dist.is_available() and dist.is_initialized()
        self._manifest: StateManifest | None = None
        self._names: dict[str, tuple[Path, Any]] = {}
        self._planned: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._commits = self._find(None)
        """Those that may be read, the newest first."""

    @property
    def step(self) -> int | None:
        """The finished steps in the checkpoint that is read; ``None`` when there is none yet."""
        return self._commits[0].step if self._commits else None

    # -- torch's protocol, in its order -----------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | int | None = None) -> None:
        """``checkpoint_id`` is a number of finished steps; the newest checkpoint without."""
        self._commits = self._find(step_of(checkpoint_id))
        self._manifest = None

    def read_metadata(self) -> Metadata:
        """Made from the manifest."""
        manifest = self._read_manifest()
        known: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._planned = {}
        for name, (_, node) in self._names.items():
            array = _array(manifest, node)
            known[name] = BytesStorageMetadata() if array is None else _tensor_metadata(array)
            self._planned[name] = _form(array)
        return Metadata(
            state_dict_metadata=known,
            planner_data={name: path for name, (path, _) in self._names.items()},
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Nothing to add."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Nothing to add."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the regions that this rank needs, verify them, and then put them to their places."""
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                _check_planner(planner, item.dest_index.fqn)
        while True:
            put, error = None, None
            try:
                put = self._read(plan, planner)
            except (CorruptObject, ObjectMissing) as damage:
                if not self._commits:  # all were tried
                    self._outcomes(_FATAL)
                    raise
                error = damage
            except BaseException:
                self._outcomes(_FATAL)
                raise
            outcomes = self._outcomes(_DAMAGED if put is None else _WHOLE)
            if any(outcome == _FATAL for outcome, _ in outcomes):
                msg = "another rank cannot read its part of the checkpoint; its log says why"
                raise StateMismatch(msg)
            # A rank that could not read a manifest is at an older checkpoint already.
            oldest = min(left for _, left in outcomes)
            is_damaged = (_DAMAGED, oldest) in outcomes
            if put is not None and not is_damaged and all(left == oldest for _, left in outcomes):
                put()
                break
            keep = oldest - 1 if is_damaged else oldest
            while len(self._commits) > keep:
                self._pass_over(error)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it is a number of steps."""
        try:
            return step_of(checkpoint_id) is not None
        except InvalidSpec:
            return False

    # -- how -----------------------------------------------------------------------------------

    def _find(self, step: int | None) -> list[Commit]:
        """The checkpoints that may be read, the newest first, the same on all ranks."""
        if self._together and dist.get_world_size() > 1:
            found: list[Any] = [None, None]
            if dist.get_rank() == 0:
                try:
                    found[0] = self._look(step)
                except BaseException as error:
                    found[1] = f"{type(error).__name__}: {error}"
                    dist.broadcast_object_list(found)
                    raise
            dist.broadcast_object_list(found)
            if found[1] is not None:
                msg = f"rank 0 cannot say which checkpoint to read: {found[1]}"
                raise InvalidSpec(msg)
            commits: list[Commit] = found[0]
            return commits
        return self._look(step)

    def _look(self, step: int | None) -> list[Commit]:
        ours = self._session
        chain = ours.chain
        with ours.lock:
            if ours.attempt is not None:
                ours.take()
            else:
                chain = ours.run.chain()  # the claim's own view does not change behind its back
                patiently(chain.refresh, what="read the run")
            commits = [c for _, c in chain.commits if step is None or c.step == step]
        if not commits and step is not None:
            msg = (
                f"{ours.run.url} has no checkpoint of step {step}; it has those of "
                f"{[c.step for _, c in chain.commits]}"
            )
            raise UnknownRun(msg)
        return commits[::-1]

    def _read_manifest(self) -> StateManifest:
        while self._manifest is None:
            if not self._commits:
                msg = f"{self._session.run.url} has no checkpoint yet; look at reader.step first"
                raise UnknownRun(msg)
            commit, packs = self._commits[0], self._session.run.packs()
            try:
                manifest = patiently(
                    lambda: read_manifest(packs, commit.manifest, commit.digest),  # noqa: B023
                    what="read the checkpoint",
                )
            except (CorruptObject, ObjectMissing) as error:
                self._pass_over(error)
                continue
            if not isinstance(manifest, StateManifest):
                msg = f"the checkpoint of step {commit.step} holds files, not a training state"
                raise StateMismatch(msg)
            trees = stored_trees(manifest, dist.get_rank() if self._together else 0)
            self._names = (
                named(trees) if manifest.flat else {n: ((n,), tree) for n, tree in trees.items()}
            )
            self._manifest = manifest
        return self._manifest

    def _pass_over(self, error: Exception | None) -> None:
        """Go back to the checkpoint before. Raises :class:`CorruptObject` when there is none."""
        commit = self._commits.pop(0)
        self._manifest = None
        why = error or "another rank cannot read its part, and its log says why"
        if not self._commits:
            msg = (
                f"no checkpoint of {self._session.run.url} that may be read is whole; the last one "
                f"that was tried is that of step {commit.step}: {why}"
            )
            raise CorruptObject(msg) from error
        _log.warning(
            "the checkpoint of step %d cannot be read, going back to the one of step %d: %s",
            commit.step, self._commits[0].step, why,
        )  # fmt: skip

    def _outcomes(self, outcome: int) -> list[tuple[int, int]]:
        """Of all ranks: the outcome, and how many checkpoints are left, the one read included."""
        mine = (outcome, len(self._commits))
        if not self._together or dist.get_world_size() == 1:
            return [mine]
        found = [mine] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        return found

    def _read(self, plan: LoadPlan, planner: LoadPlanner) -> Callable[[], None]:
        """Read and verify all that a plan asks for; what puts it into its place."""
        manifest = self._read_manifest()
        packs = self._session.run.packs()
        values = StateReader(packs, manifest)
        wanted: list[tuple[ReadItem, ArrayRef, list[int]]] = []
        for item in plan.items:
            name = item.storage_index.fqn
            _, node = self._names.get(name, ((), None))
            array = _array(manifest, node)
            if name not in self._names or _form(array) != self._planned[name]:
                msg = (
                    f"{name} is not in the checkpoint of step {self.step} as it is in the newer "
                    "one, which is damaged"
                )
                raise StateMismatch(msg)
            if array is None:
                values.plan(node)
                continue
            corner = item.storage_index.offset or (0,) * len(array.shape)
            start = [a + b for a, b in zip(corner, item.storage_offsets, strict=True)]
            wanted.append((item, array, start))
        values.fetch()
        size_bytes = sum(
            math.prod(item.lengths) * ITEM_BYTES[array.dtype] for item, array, _ in wanted
        )
        aside = None
        if size_bytes < _MEMORY_SHARE * psutil.virtual_memory().available:
            aside = [
                torch.empty(tuple(item.lengths), dtype=getattr(torch, array.dtype))
                for item, array, _ in wanted
            ]
            self._fill(manifest, wanted, aside)
        else:  # it is read twice, first only to verify it
            whole = {id(array): array for _, array, _ in wanted}
            for array in whole.values():
                stream(packs, manifest, pieces(array, [0]), lambda _offset, _data: None)

        def put() -> None:
            targets = [planner.resolve_tensor(item).detach() for item, _, _ in wanted]
            if aside is None:
                self._fill(manifest, wanted, targets)
            for position, (item, _, _) in enumerate(wanted):
                if aside is not None:
                    targets[position].copy_(aside[position])
                planner.commit_tensor(item, targets[position])
            for item in plan.items:
                if item.type == LoadItemType.BYTE_IO:
                    _, node = self._names[item.storage_index.fqn]
                    _set_value(planner, item.dest_index.fqn, values.value(node))

        return put

    def _fill(
        self,
        manifest: StateManifest,
        wanted: list[tuple[ReadItem, ArrayRef, list[int]]],
        targets: list[torch.Tensor],
    ) -> None:
        regions = RegionPlan(manifest.packs)
        for (_, array, start), target in zip(wanted, targets, strict=True):
            regions.add(array, start, target)
        fetch(self._session.run.packs(), regions.wanted)
        regions.finish()


def _array(manifest: StateManifest, node: Any) -> ArrayRef | None:
    """The array of a tensor's node; ``None`` for any other value."""
    if isinstance(node, dict) and "tensor" in node:
        return manifest.arrays[node["tensor"]]
    return None


def _form(array: ArrayRef | None) -> tuple[str, tuple[int, ...]]:
    return ("", ()) if array is None else (array.dtype, array.shape)


def _tensor_metadata(array: ArrayRef) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=getattr(torch, array.dtype)),
        size=torch.Size(array.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(region.offset), torch.Size(region.shape))
            for region in array.regions
        ],
    )


def _check_planner(planner: LoadPlanner, name: str) -> None:
    """Refuse a planner that would have to unpickle a value that is no tensor."""
    own = type(planner).load_bytes
    if not isinstance(planner, DefaultLoadPlanner) or own is not DefaultLoadPlanner.load_bytes:
        msg = (
            f"{name} is no tensor, and {type(planner).__name__}.load_bytes would unpickle it, "
            "which Spotfirst does not store; use DefaultLoadPlanner, or extend it elsewhere"
        )
        raise UnsupportedState(msg)


def _set_value(planner: Any, name: str, value: Any) -> None:
    """Put a value that is no tensor where a default planner would, without unpickling."""
    if not planner.flatten_state_dict:
        planner.state_dict[name] = value
        planner.original_state_dict[name] = value  # the planner may work on a copy
        return
    *path, last = planner.mappings[name]
    container: Any = planner.original_state_dict
    for key in path:
        container = container[_key(container, key)]
    container[_key(container, last)] = value


def _key(container: Any, key: str | int) -> Any:
    """A key as it is in the user's own state dict: torch makes text of numbers."""
    if isinstance(container, dict) and key not in container and str(key).lstrip("-").isdigit():
        return int(key) if int(key) in container else key
    return key
