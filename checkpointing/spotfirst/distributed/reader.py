"""A StorageReader for ``torch.distributed.checkpoint``: any checkpoint of a run, at any world size."""

from __future__ import annotations

import os
from typing import Any

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
)
from torch.distributed.checkpoint.storage import StorageReader  # noqa: TID253
from torch.futures import Future  # noqa: TID253

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.loading import StateReader, stored_trees
from spotfirst.checkpoints.manifest import ArrayRef, StateManifest, read_manifest
from spotfirst.checkpoints.packs import fetch
from spotfirst.checkpoints.regions import RegionPlan
from spotfirst.distributed.session import Place, session
from spotfirst.distributed.trees import Path, named
from spotfirst.distributed.writer import step_of
from spotfirst.errors import InvalidSpec, StateMismatch, UnknownRun, UnsupportedState
from spotfirst.patience import patiently

__all__ = ["SpotfirstReader"]


class SpotfirstReader(StorageReader):
    """Give it to ``dcp.load``; it reads the newest checkpoint, or that of ``checkpoint_id`` steps.

    ``storage`` is as for :class:`~spotfirst.distributed.SpotfirstWriter`. Made on all ranks at
    once, unless ``no_dist``: rank 0 says which checkpoint it is. Inside of an attempt it *claims*
    the run first, which waits until the attempt before has let go, so that what is read is what
    training goes on from.

    Raises :class:`ClaimLost`, :class:`Drained`, and :class:`UnknownRun` for a step of which there
    is no checkpoint. Reading raises :class:`CorruptObject` for bytes that are not those written.
    """

    def __init__(self, storage: Place = None, *, no_dist: bool = False) -> None:
        self._session = session(storage)
        self._together = not no_dist and dist.is_available() and dist.is_initialized()
        self._manifest: StateManifest | None = None
        self._names: dict[str, tuple[Path, Any]] = {}
        self._commit = self._find(None)

    @property
    def step(self) -> int | None:
        """The finished steps in the checkpoint that is read; ``None`` when there is none yet."""
        return self._commit.step if self._commit is not None else None

    # -- torch's protocol, in its order -----------------------------------------------------

    def reset(self, checkpoint_id: str | os.PathLike[str] | int | None = None) -> None:
        """``checkpoint_id`` is a number of finished steps; the newest checkpoint without."""
        self._commit = self._find(step_of(checkpoint_id))
        self._manifest = None

    def read_metadata(self) -> Metadata:
        """Made from the manifest."""
        manifest = self._read_manifest()
        known: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        for name, (_, node) in self._names.items():
            array = _array(manifest, node)
            known[name] = BytesStorageMetadata() if array is None else _tensor_metadata(array)
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
        """Read the regions that this rank needs, right to their places where that can be."""
        manifest = self._read_manifest()
        packs = self._session.run.packs()
        regions = RegionPlan(manifest.packs)
        values = StateReader(packs, manifest)
        tensors = []
        for item in plan.items:
            _, node = self._names[item.storage_index.fqn]
            if item.type == LoadItemType.BYTE_IO:
                values.plan(node)
                continue
            array = _array(manifest, node)
            assert array is not None
            target = planner.resolve_tensor(item).detach()
            corner = item.storage_index.offset or (0,) * len(array.shape)
            start = [a + b for a, b in zip(corner, item.storage_offsets, strict=True)]
            regions.add(array, start, target)
            tensors.append((item, target))
        fetch(packs, regions.wanted)
        regions.finish()
        values.fetch()
        for item, target in tensors:
            planner.commit_tensor(item, target)
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                _, node = self._names[item.storage_index.fqn]
                _set_value(planner, item.dest_index.fqn, values.value(node))
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

    def _find(self, step: int | None) -> Commit | None:
        """The checkpoint to read, the same on all ranks."""
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
            commit: Commit | None = found[0]
            return commit
        return self._look(step)

    def _look(self, step: int | None) -> Commit | None:
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
        return commits[-1] if commits else None

    def _read_manifest(self) -> StateManifest:
        if self._manifest is None:
            if self._commit is None:
                msg = f"{self._session.run.url} has no checkpoint yet; look at reader.step first"
                raise UnknownRun(msg)
            commit, packs = self._commit, self._session.run.packs()
            manifest = patiently(
                lambda: read_manifest(packs, commit.manifest, commit.digest),
                what="read the checkpoint",
            )
            if not isinstance(manifest, StateManifest):
                msg = f"the checkpoint of step {commit.step} holds files, not a training state"
                raise StateMismatch(msg)
            rank = dist.get_rank() if self._together else 0
            self._names = named(stored_trees(manifest, rank))
            self._manifest = manifest
        return self._manifest


def _array(manifest: StateManifest, node: Any) -> ArrayRef | None:
    """The array of a tensor's node; ``None`` for any other value."""
    if isinstance(node, dict) and "tensor" in node:
        return manifest.arrays[node["tensor"]]
    return None


def _tensor_metadata(array: ArrayRef) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=getattr(torch, array.dtype)),
        size=torch.Size(array.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(region.offset), torch.Size(region.shape))
            for region in array.regions
        ],
    )


def _set_value(planner: LoadPlanner, name: str, value: Any) -> None:
    """Put a value that is no tensor where a default planner would, without unpickling."""
    own = type(planner).load_bytes
    if not isinstance(planner, DefaultLoadPlanner) or own is not DefaultLoadPlanner.load_bytes:
        msg = (
            f"{name} is no tensor, and {type(planner).__name__}.load_bytes would unpickle it, "
            "which Spotfirst does not store; use DefaultLoadPlanner, or extend it elsewhere"
        )
        raise UnsupportedState(msg)
    if not planner.flatten_state_dict:
        planner.state_dict[name] = value
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
