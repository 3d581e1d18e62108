"""Checkpoints of ``torch.distributed.checkpoint`` in Spotfirst's storage: FSDP2, tensor parallel, DDP.

All ranks write at once, one commit makes it a checkpoint, and any world size reads it, also a
single process without a process group::

    from spotfirst.distributed import SpotfirstReader, SpotfirstWriter

    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    reader, writer = SpotfirstReader(), SpotfirstWriter()  # on all ranks
    if reader.step is not None:
        dcp.load(state, storage_reader=reader)
    ...
    dcp.save(state, checkpoint_id=step, storage_writer=writer)  # or dcp.async_save

Nothing is pickled: values that are no tensors are kept as JSON trees
(:mod:`spotfirst.checkpoints.statetree`). A checkpoint of the
:class:`~spotfirst.checkpointer.Checkpointer` is read as well: its names are those of the objects,
a dot, and the keys.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spotfirst.distributed.reader import SpotfirstReader
    from spotfirst.distributed.writer import SpotfirstWriter

__all__ = ["SpotfirstReader", "SpotfirstWriter"]

_HOMES = {
    "SpotfirstReader": "spotfirst.distributed.reader",
    "SpotfirstWriter": "spotfirst.distributed.writer",
}


def __getattr__(name: str) -> Any:
    # Lazy: they need torch, and some modules of this package do not.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    msg = f"module 'spotfirst.distributed' has no attribute {name!r}"
    raise AttributeError(msg)
