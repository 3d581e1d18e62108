"""The manifest of a version: one Parquet file with a row for each file, sorted by key.

Column ``executable`` says whether the file may be run; null, as in manifests of older releases, is no.
Column ``location`` is null while the file lies at its content address, the only place so far.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from blake3 import blake3

from spotfirst.datasets._keys import UNSAFE_KEY_RE2, parents
from spotfirst.errors import CorruptObject

__all__ = ["SCHEMA", "build_manifest", "content_digest", "decode_manifest", "encode_manifest"]

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("size", pa.int64(), nullable=False),
        pa.field("blake3", pa.string(), nullable=False),
        pa.field("location", pa.string()),
        pa.field("executable", pa.bool_()),
    ]
)
_LATER = {"executable": pa.bool_()}
"""Columns that manifests of older releases lack."""


def build_manifest(rows: Sequence[tuple[str, int, str, bool]]) -> pa.Table:
    """A manifest from (key, size in bytes, digest, executable) rows that are sorted by key."""
    keys, sizes, digests, executables = zip(*rows, strict=True) if rows else ((), (), (), ())
    columns = [
        pa.array(keys, pa.string()),
        pa.array(sizes, pa.int64()),
        pa.array(digests, pa.string()),
        pa.nulls(len(rows), pa.string()),
        pa.array(executables, pa.bool_()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def content_digest(rows: Iterable[tuple[str, int, str, bool]]) -> str:
    """What the rows say, independent of how a Parquet writer lays them out."""
    hasher = blake3()
    for key, size, digest, executable in rows:
        mark = "x" if executable else ""
        hasher.update(f"{digest} {size}{mark} {key}\0".encode())
    return str(hasher.hexdigest())


def encode_manifest(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    return bytes(sink.getvalue().to_pybytes())


def decode_manifest(data: bytes, *, path: str) -> pa.Table:
    """The table, with every key proven to stay below the folder it is joined to.

    Raises :class:`CorruptObject`; ``path`` names the manifest in it.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read(columns=SCHEMA.names)
        for name in _LATER.keys() - set(table.column_names):
            table = table.append_column(name, pa.nulls(len(table), _LATER[name]))
        table = table.select(SCHEMA.names).cast(SCHEMA)
        table.validate(full=True)
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        msg = f"{path} is not a dataset manifest: {error}"
        raise CorruptObject(msg) from error
    problem = next(_problems(table), None)
    if problem:
        msg = f"{path} is refused: {problem}. Its dataset must be committed again"
        raise CorruptObject(msg)
    return table


def _problems(table: pa.Table) -> Iterator[str]:
    """What is wrong, cheapest first; a later check may rely on the earlier ones."""
    keys, digests = table["key"], table["blake3"]
    unsafe = keys.filter(pc.match_substring_regex(keys, UNSAFE_KEY_RE2))
    if len(unsafe):
        yield f"key {unsafe[0].as_py()!r} would leave its folder"
    if not _all(pc.match_substring_regex(digests, "^[0-9a-f]{64}$")):
        yield "a digest is not 64 hexadecimal digits"
    if not _all(pc.greater_equal(table["size"], 0)):
        yield "a size is below 0"
    if table["location"].null_count != len(table):
        yield "a file lies at a location that this release cannot read"
    keys = keys.combine_chunks()
    if not _all(pc.less(keys[:-1], keys[1:])):
        yield "keys are not sorted, or one is there twice"
    folders = pc.unique(pc.extract_regex(keys, r"(?s)^(?P<folder>.*)/[^/]*$").field("folder"))
    ancestors = {name for folder in folders.to_pylist() if folder for name in parents(folder)}
    clash = keys.filter(pc.is_in(keys, pa.array(sorted(ancestors), pa.string())))
    if len(clash):
        yield f"key {clash[0].as_py()!r} is both a file and a folder"


def _all(mask: Any) -> bool:
    return bool(pc.all(mask, min_count=0).as_py())
