"""Read many runs of one storage: one that cannot be read is named, and the others are given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from spotfirst.errors import SpotfirstError, StorageUnavailable, UnknownRun
from spotfirst.run import Run
from spotfirst.storage import Storage
from spotfirst.wire import Record

__all__ = ["Unreadable", "read_runs"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_AT_ONCE = 16


class Unreadable(Record):
    """A run that could not be read, where it is, and why."""

    run_id: str
    url: str
    error: str

    def __str__(self) -> str:
        return f"run {self.run_id} cannot be read ({self.url}): {self.error}"


def read_runs(
    storage: Storage, run_ids: Iterable[str], read: Callable[[Run], _T]
) -> tuple[list[_T], list[Unreadable]]:
    """What ``read`` returns for each run, in order, and the runs that it failed for.

    A folder that holds no run, as a script that trained on its own makes, is in neither. Raises
    :class:`~spotfirst.errors.StorageUnavailable` only where that is the case with every run.
    """
    found: list[_T] = []
    broken: list[Unreadable] = []
    outages: list[StorageUnavailable] = []

    def read_one(run: Run) -> _T | Exception:
        try:
            return read(run)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with one run, the others are read
            return error

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="spotfirst-runs") as pool:
        runs = [Run(storage, run_id) for run_id in run_ids]
        for run, result in zip(runs, pool.map(read_one, runs), strict=True):
            if isinstance(result, UnknownRun) and not _has_journal(run):
                continue
            if not isinstance(result, Exception):
                found.append(result)
                continue
            error = str(result) if isinstance(result, SpotfirstError) else repr(result)
            if not isinstance(result, SpotfirstError):
                _log.debug("run %s cannot be read", run.run_id, exc_info=result)
            if isinstance(result, StorageUnavailable):
                outages.append(result)
            broken.append(Unreadable(run_id=run.run_id, url=run.url, error=error))
    if outages and len(outages) == len(runs):
        raise outages[0]
    return found, broken


def _has_journal(run: Run) -> bool:
    """Whether it is a run whose spec is gone, and not a folder with checkpoints only."""
    try:
        return run.journal().refresh().seq > 0
    except SpotfirstError:
        return True
