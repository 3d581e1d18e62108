"""When the files of the cache were last known to be right, by the time of their last change.

A file in a training folder is a hard link into the cache, so whoever writes to it writes to the
cache. Size and modification time do not tell: ``cp -p``, ``rsync --inplace`` and ``touch -r`` keep
them. The inode's change time cannot be set. It also changes with each link, so it is noted after
every sync, and a file with another one is verified again. Losing this file costs time only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from spotfirst.datasets._local import replace_file

__all__ = ["Seals"]

_COLUMNS = ("name", "inode", "changed_ns")


class Seals:
    """(inode, change time) by the file's name in the cache, as of the last sync of any process."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "seals.parquet"

    def load(self) -> dict[str, tuple[int, int]]:
        try:
            table = pq.read_table(pa.BufferReader(self._path.read_bytes()))
            names, inodes, times = (table[column].to_pylist() for column in _COLUMNS)
        except (OSError, KeyError, ValueError, pa.ArrowException):
            return {}
        return dict(zip(names, zip(inodes, times, strict=True), strict=True))

    def add(self, seals: Mapping[str, tuple[int, int]]) -> None:
        """Note these, beside what is noted by now. A full disk is no reason to fail."""
        known = {**self.load(), **seals}
        columns = [
            list(known),
            [inode for inode, _ in known.values()],
            [t for _, t in known.values()],
        ]
        types = (pa.string(), pa.uint64(), pa.int64())
        arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_arrays(arrays, names=list(_COLUMNS)), sink, compression="zstd")
        try:
            replace_file(self._path, sink.getvalue().to_pybytes())
        except OSError:
            return
