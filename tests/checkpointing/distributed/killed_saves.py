"""Overlapping saves in a process that dies before its n-th write, for every n.

``python -m … FOLDER`` saves to ``FOLDER/n`` and prints the steps that are there, a line for
each n. The last process is not killed.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from spotfirst.distributed import SpotfirstWriter
from spotfirst.run import Run
from spotfirst.storage import open_storage
from tests.checkpointing.storages import faulty

KILLED = 77


def state_of(step: int) -> dict[str, Any]:
    """One tensor that changes, and one that does not, which saves share."""
    return {
        "x": torch.full((2000,), float(step)),
        "same": torch.arange(3000.0),
        "n": {"step": step},
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # a fork inherits no thread pool
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    for kill in itertools.count():
        place = str(folder / str(kill))
        process = os.fork()
        if process == 0:
            code = 1
            try:
                save(place, kill)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        commits = Run(open_storage(place), "local").chain().refresh().commits
        print(json.dumps([commit.step for _, commit in commits]), flush=True)  # noqa: T201
        if code != KILLED:
            sys.exit(code)


def save(place: str, kill: int) -> None:
    """Three saves at once, which share a tensor; dies before write number ``kill``."""
    writes = itertools.count()
    lock = threading.Lock()

    def count(name: str, _: str) -> None:
        if name in {"write", "write_from", "create", "delete", "delete_many"}:
            with lock:
                if next(writes) == kill:
                    os._exit(KILLED)

    storage = faulty(open_storage(place), before=count)
    writer = SpotfirstWriter(Run(storage, "local"))
    futures = [
        dcp.async_save(state_of(step), checkpoint_id=step, storage_writer=writer)
        for step in (1, 2, 3)
    ]
    for future in futures:
        error = future.exception()  # type: ignore[union-attr]
        if error is not None and "SaveOvertaken" not in str(error):
            raise error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
