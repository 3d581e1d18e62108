"""Which checkpoint a run goes on from: its newest whole one, or the one that it was started from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.errors import CorruptObject, FormatError, InvalidSpec, ObjectMissing, UnknownRun
from spotfirst.heartbeat import ExitReport
from spotfirst.run import Run
from spotfirst.spec import ResumeFrom
from spotfirst.storage import Storage

__all__ = ["MOST_BACK", "Restored", "crashed_with", "load_newest"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

MOST_BACK = 2
"""How many checkpoints to go back, one at a time, when attempts crash with them."""
_MOST_REPORTS = 10
_CRASHES = {"script_failed", "killed"}


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
    warn: Callable[[str], None] = _log.warning,
) -> Restored[_T] | None:
    """Load the newest checkpoint that is whole; ``None`` when the run is to start from nothing.

    ``load`` gets the storage of the packs and the chain's entry. A checkpoint with missing or
    damaged bytes is passed over, with a warning, and so is one that attempts crashed with
    (:func:`crashed_with`). With checkpoints but none that is whole, raises
    :class:`CorruptObject`: to start anew would be a silent loss. Without any, loads the checkpoint
    ``resume_from``; that one or none.
    """
    crashed = crashed_with(run, chain)
    for seq, commit in reversed(chain.commits):
        _check_content(run, seq, commit, content)
        if seq in crashed:
            message = (
                f"attempt {crashed[seq]} crashed with checkpoint {seq} of step {commit.step} before "
                "it came any further: GOING BACK to the checkpoint before it. If the script is at "
                "fault, mend it and clear the task: then the newest checkpoint is used again"
            )
            warn(message)
            continue
        try:
            return Restored(load(run.packs(), commit), commit, seq)
        except (CorruptObject, ObjectMissing) as error:
            message = (
                f"checkpoint {seq} of step {commit.step} cannot be read, going back to the one "
                f"before: {error}"
            )
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


def crashed_with(run: Run, chain: CheckpointChain) -> dict[int, int]:
    """Checkpoints not to begin with, each with the attempt that crashed before it came further.

    At most :data:`MOST_BACK` steps with which attempts crashed one after the other since the run
    was last reopened; and what such an attempt has kept itself, which is no further. When more
    did, the checkpoints are not at fault, and the result is empty; so it is when no other
    checkpoint is left.
    """
    holder = chain.holder or 0
    try:
        state = run.journal().refresh()
        attempts = [a.number for a in state.attempts if state.reopened_after < a.number < holder]
        everything = [*chain.commits, *chain.pruned.items()]
        committed = {commit.attempt for _, commit in everything}
        step_of = {seq: commit.step for seq, commit in everything}
        found: dict[int, int] = {}
        crashes: set[int] = set()
        for number in reversed(attempts[-_MOST_REPORTS:]):
            seq = _stuck_at(run.exit_report(number))
            if seq is None:
                if number in committed:
                    break
                continue
            step = step_of.get(seq)
            crashes.add(seq if step is None else step)
            for other, commit in chain.commits:
                if other == seq or commit.step == step or commit.attempt == number:
                    found.setdefault(other, number)
    except FormatError as error:
        _log.warning("cannot read how earlier attempts ended: %s", error)
        return {}
    is_left = any(seq not in found for seq, _ in chain.commits)
    return found if is_left and len(crashes) <= MOST_BACK else {}


def _stuck_at(report: ExitReport | None) -> int | None:
    """The checkpoint that an attempt began with, if it crashed before it came any further."""
    if report is None or report.cause not in _CRASHES:
        return None
    progress = report.progress
    is_further = progress.step is not None and progress.step > (progress.start_step or 0)
    return None if is_further else progress.restored_seq


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
