"""Datasets as immutable versions: content-addressed files behind one small pointer.

=================================== ================= ==========================================
path below ``datasets/{name}/``     written by        rule
=================================== ================= ==========================================
``objects/{blake3[:2]}/{blake3}``   :func:`commit`    content-addressed bytes of one file
``manifests/{blake3}.parquet``      :func:`commit`    immutable: key, size, blake3, location
``versions/00000001.json`` …        :func:`commit`    append-only sequence of :class:`Version`
``root.json``                       :func:`commit`    replaced; a hint at the newest version
=================================== ================= ==========================================

A version exists once its record does, which is the last write that matters: a commit that was
killed before it left only objects that the next commit finds and keeps. ``root.json`` merely saves
readers a listing; they probe beyond it, so a lost write of it costs time and nothing else.

A training script finds its files below ``$SPOTFIRST_DATASET_DIR`` and needs :class:`SampleOrder`
at most; importing that loads neither Arrow nor the storage.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spotfirst.datasets._commit import commit
    from spotfirst.datasets._log import Version
    from spotfirst.datasets._query import Diff, diff, manifest, resolve, versions
    from spotfirst.datasets._sync import SyncResult, sync
    from spotfirst.datasets.order import SampleOrder
    from spotfirst.spec import DatasetRef

__all__ = [
    "DatasetRef",
    "Diff",
    "SampleOrder",
    "SyncResult",
    "Version",
    "commit",
    "diff",
    "manifest",
    "resolve",
    "sync",
    "versions",
]

_HOMES = {
    "DatasetRef": "spotfirst.spec",
    "Diff": "spotfirst.datasets._query",
    "SampleOrder": "spotfirst.datasets.order",
    "SyncResult": "spotfirst.datasets._sync",
    "Version": "spotfirst.datasets._log",
    "commit": "spotfirst.datasets._commit",
    "diff": "spotfirst.datasets._query",
    "manifest": "spotfirst.datasets._query",
    "resolve": "spotfirst.datasets._query",
    "sync": "spotfirst.datasets._sync",
    "versions": "spotfirst.datasets._query",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    msg = f"module 'spotfirst.datasets' has no attribute {name!r}"
    raise AttributeError(msg)
