"""Which checkpoint ``RUN@STEP`` means; the operator and the command line read it alike."""

from __future__ import annotations

import re
from typing import NamedTuple

from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.checkpoints.retention import Retention, best_first
from spotfirst.errors import InvalidSpec, UnknownRun
from spotfirst.run import Run
from spotfirst.storage import Storage

__all__ = ["Selected", "kept_steps", "retention_of", "select", "split"]

_WHICH = re.compile(r"latest|best|\d{1,18}|seq:\d{1,8}")
_SHOWN = 20


class Selected(NamedTuple):
    """A checkpoint of a run: its place in the run's chain, and the chain's entry."""

    run: Run
    seq: int
    commit: Commit


def split(text: str) -> tuple[str, str]:
    """``RUN@WHICH`` as two words; ``WHICH`` is empty when there is none.

    Raises :class:`InvalidSpec`.
    """
    run_id, at, which = text.partition("@")
    if not run_id or (at and _WHICH.fullmatch(which) is None):
        msg = (
            f'{text!r} must read "RUN@STEP", "RUN@latest", "RUN@best" or "RUN@seq:NUMBER"; '
            "`spotfirst runs` lists runs, and `spotfirst checkpoint ls RUN` their checkpoints"
        )
        raise InvalidSpec(msg)
    return run_id, which


def select(storage: Storage, text: str, *, pinned: bool = False) -> Selected:
    """The checkpoint of a run that is kept and that ``text`` means; the newest one for ``RUN``.

    ``RUN@STEP`` is the newest of that step, ``RUN@best`` the best one by the metric of the run's
    retention, ``RUN@seq:NUMBER`` an entry of the chain. With ``pinned``, also one that is there
    only because another run has pinned it: enough to read it, not to start from it. Raises :class:`InvalidSpec`, and
    :class:`UnknownRun` for a run or checkpoint that is not there (any more).
    """
    run_id, which = split(text)
    run = Run(storage, run_id)
    chain = run.chain().refresh()
    retention = retention_of(run, chain)
    commits = chain.commits
    if pinned and which not in {"", "latest", "best"}:
        kept_for = run.pinned()
        commits = [*((seq, c) for seq, c in chain.pruned.items() if seq in kept_for), *commits]
    if which.startswith("seq:"):
        fitting = [(seq, c) for seq, c in commits if seq == int(which[4:])]
    elif which == "best":
        best = best_first(commits, retention)[:1]
        fitting = [(seq, c) for seq, c in commits if seq in best]
        if commits and not best:
            msg = (
                f"no checkpoint of run {run_id!r} has the metric {retention.metric!r} that "
                "its retention names; choose one by its step"
            )
            raise UnknownRun(msg)
    elif which in {"", "latest"}:
        fitting = commits
    else:
        fitting = [(seq, c) for seq, c in commits if c.step == int(which)]
    if not fitting:
        raise _gone(run, chain, which or "latest")
    return Selected(run, *fitting[-1])


def retention_of(run: Run, chain: CheckpointChain) -> Retention:
    """What the run's spec says, or the default for a script that trained on its own.

    Such a script (``Checkpointer(storage=…)``) has checkpoints and no spec. Raises
    :class:`UnknownRun` when there is neither.
    """
    try:
        return run.spec().retention
    except UnknownRun:
        if not chain.claims:
            raise
        return Retention()


def kept_steps(chain: CheckpointChain) -> str:
    """The steps of the newest checkpoints that are kept, for a message."""
    steps = [str(commit.step) for _, commit in chain.commits]
    more = f" and {len(steps) - _SHOWN} older ones" if len(steps) > _SHOWN else ""
    return (", ".join(steps[-_SHOWN:]) or "none") + more


def _gone(run: Run, chain: CheckpointChain, which: str) -> UnknownRun:
    pruned = [
        commit.step
        for seq, commit in chain.pruned.items()
        if which in {str(commit.step), f"seq:{seq}"}
    ]
    if pruned:
        msg = (
            f"the checkpoint of run {run.run_id!r} at step {pruned[-1]} was pruned, as the run's "
            f"retention says; kept are the steps {kept_steps(chain)}"
        )
    elif not chain.commits:
        msg = f"run {run.run_id!r} has no checkpoint"
    else:
        msg = f"run {run.run_id!r} has no checkpoint at {which}; it has those of steps: {kept_steps(chain)}"
    return UnknownRun(msg)
