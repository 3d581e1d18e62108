"""Which checkpoint a run goes on from: its newest whole one, or the one that it was started from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.errors import CorruptObject, InvalidSpec, ObjectMissing, UnknownRun
from spotfirst.run import Run
from spotfirst.spec import ResumeFrom
from spotfirst.storage import Storage

__all__ = ["Restored", "load_newest"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Restored(Generic[_T]):
    """What was loaded, from which entry of the chain (``None``: of another run's)."""

    value: _T
    commit: Commit
    seq: int | None


def load_newest(
    run: Run,
    chain: CheckpointChain,
    load: Callable[[Storage, Commit], _T],
    *,
    content: Literal["state", "files"],
    resume_from: ResumeFrom | None = None,
    warn: Callable[[str], None] = lambda _: None,
) -> Restored[_T] | None:
    """Load the newest checkpoint that is whole; ``None`` when the run is to start from nothing.

    ``load`` gets the storage of the packs and the chain's entry. A checkpoint with missing or
    damaged bytes is passed over, with a warning. With checkpoints but none that is whole, raises
    :class:`CorruptObject`: to start anew would be a silent loss. Without any, loads the checkpoint
    ``resume_from``; that one or none.
    """
    for seq, commit in reversed(chain.commits):
        _check_content(run, seq, commit, content)
        try:
            return Restored(load(run.packs(), commit), commit, seq)
        except (CorruptObject, ObjectMissing) as error:
            message = (
                f"checkpoint {seq} of step {commit.step} cannot be read, going back to the one "
                f"before: {error}"
            )
            _log.warning("%s", message)
            warn(message)
    if chain.commits:
        msg = (
            f"none of the {len(chain.commits)} checkpoints of {run.url} is whole; start a new run, "
            "or restore the packs that the log names from a backup of the storage"
        )
        raise CorruptObject(msg)
    if resume_from is None:
        return None
    parent = Run(run.root, resume_from.run_id)
    commit = _parents_commit(parent, resume_from)
    _check_content(parent, resume_from.seq, commit, content)
    return Restored(load(parent.packs(), commit), commit, None)


def _parents_commit(parent: Run, resume_from: ResumeFrom) -> Commit:
    chain = parent.chain().refresh()
    # One that is pruned is there as long as it is pinned, which the replay has done.
    commit = dict(chain.commits).get(resume_from.seq) or chain.pruned.get(resume_from.seq)
    if commit is not None and resume_from.digest not in {"", commit.digest}:
        msg = (
            f"checkpoint {resume_from.seq} of {parent.url} is another than the one that this run "
            "was made to start from: somebody replaced it. Restore the object from an older "
            "version, or replay from a checkpoint that is there"
        )
        raise CorruptObject(msg)
    if commit is not None:
        return commit
    msg = (
        f"run {resume_from.run_id!r} has no checkpoint {resume_from.seq} (step {resume_from.step}) "
        f"in {parent.root.url}; `spotfirst show` lists those it has"
    )
    raise UnknownRun(msg)


def _check_content(run: Run, seq: int, commit: Commit, content: str) -> None:
    if commit.content != content:
        msg = (
            f"checkpoint {seq} of {run.url} holds {commit.content}, and here {content} is asked "
            "for; keep to one checkpoint mode within a run and its replays"
        )
        raise InvalidSpec(msg)
