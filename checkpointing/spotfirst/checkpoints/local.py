"""The first tier: checkpoints on the machine's own disk, which survive the process, not the machine.

They are a run of their own below a local folder, with its own chain, committed before the storage
has them. They are named by the claims of the *storage's* chain: that is how a restarted process
knows whether what lies here is still the run's newest state.
"""

from __future__ import annotations

import logging
import os

from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.checkpoints.retention import Retention
from spotfirst.checkpoints.saving import Tier
from spotfirst.errors import ClaimLost, SpotfirstError
from spotfirst.run import Run
from spotfirst.storage import open_storage

__all__ = ["LOCAL_VARIABLE", "local_tier", "usable_commit"]

_log = logging.getLogger(__name__)

LOCAL_VARIABLE = "SPOTFIRST_LOCAL_CHECKPOINTS"
"""A folder on a fast local disk; unset, there is no local tier."""


def local_tier(run: Run, attempt: int, claim: int, folder: str | None) -> Tier | None:
    """The local tier of ``run``, claimed for ``attempt``; ``None`` without one that works.

    ``claim`` is the number of our claim in the storage's chain.
    """
    folder = folder or os.environ.get(LOCAL_VARIABLE)
    if not folder:
        return None
    try:
        storage = open_storage(os.path.abspath(folder))  # noqa: PTH100 - the user's text
        storage.patience_s = 0.0  # a full disk stays full
        here = Run(storage, run.run_id)
        chain = here.chain()
        chain.claim(attempt)
    except (ClaimLost, SpotfirstError, OSError) as error:
        _log.warning("no checkpoints on the local disk %s: %s", folder, error)
        return None
    return Tier(here.packs(), chain, attempt, claim, expendable=True, retention=Retention(last=1))


def usable_commit(local: CheckpointChain, chain: CheckpointChain) -> Commit | None:
    """The newest local checkpoint, when nothing in the storage has gone on from elsewhere since.

    It was written under a claim of ``chain``. As long as no later claim has committed anything,
    it is as good as the storage's newest one, or newer.
    """
    newest = local.newest()
    if newest is None:
        return None
    _, commit = newest
    claim = int(commit.manifest.partition("/")[0])
    later = min((number for number in chain.claims if number > claim), default=None)
    stored = chain.newest()
    if claim not in chain.claims:
        return None
    if stored is None:
        return commit
    seq, remote = stored
    if later is not None and seq > later:
        return None
    return commit if commit.step >= remote.step else None
