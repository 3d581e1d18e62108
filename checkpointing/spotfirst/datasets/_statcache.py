"""Digests of files that have not changed since the last commit, so that they are not read again.

One Parquet file for each source, beside the user's other caches; losing it costs time only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from blake3 import blake3

from spotfirst.datasets._local import replace_file
from spotfirst.datasets._source import Found

__all__ = ["StatCache"]

_COLUMNS = ("key", "size", "fingerprint", "executable", "blake3")


class StatCache:
    """Digests by file, valid while size and fingerprint are those that were seen."""

    def __init__(self, cache: Path, source_name: str) -> None:
        name = blake3(source_name.encode(errors="surrogateescape")).hexdigest()[:32]
        self._path = cache / "datasets" / "stat" / f"{name}.parquet"

    def load(self) -> dict[Found, str]:
        try:
            table = pq.read_table(pa.BufferReader(self._path.read_bytes()))
            columns = [table[name].to_pylist() for name in _COLUMNS]
        except (OSError, KeyError, ValueError, pa.ArrowException):
            return {}
        return {
            Found(key, size, fingerprint, executable): digest
            for key, size, fingerprint, executable, digest in zip(*columns, strict=True)
        }

    def store(self, digests: Mapping[Found, str]) -> None:
        """Remember those with a fingerprint; a full disk is no reason to fail."""
        rows = [(*found, digest) for found, digest in digests.items() if found.fingerprint]
        columns = zip(*rows, strict=True) if rows else [[] for _ in _COLUMNS]
        table = pa.table(dict(zip(_COLUMNS, map(list, columns), strict=True)))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        try:
            replace_file(self._path, sink.getvalue().to_pybytes())
        except OSError:
            return
