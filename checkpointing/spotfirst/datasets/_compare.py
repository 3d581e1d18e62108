"""Comparing two manifests by Arrow joins: a million rows in a fraction of a second."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["added_or_changed", "compare"]


def compare(
    old: pa.Table, new: pa.Table
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], int]:
    """(added, removed, changed keys, bytes of the added and changed), keys sorted."""
    joined = _digests(old, "old").join(
        new.select(["key", "size", "blake3"]), keys="key", join_type="full outer"
    )
    before, after = joined["old"], joined["blake3"]
    added, removed = pc.is_null(before), pc.is_null(after)
    changed = pc.fill_null(pc.not_equal(before, after), fill_value=False)
    size = pc.sum(joined["size"].filter(pc.or_(added, changed)), min_count=0).as_py()
    return _keys(joined, added), _keys(joined, removed), _keys(joined, changed), int(size)


def added_or_changed(old: pa.Table, new: pa.Table) -> pa.Table:
    """The rows of ``new`` that ``old`` lacks or has with other bytes, sorted by key."""
    joined = new.join(_digests(old, "old"), keys="key", join_type="left outer")
    same = pc.fill_null(pc.equal(joined["old"], joined["blake3"]), fill_value=False)
    return joined.filter(pc.invert(same)).select(new.column_names).sort_by("key")


def _digests(table: pa.Table, name: str) -> pa.Table:
    return table.select(["key", "blake3"]).rename_columns(["key", name])


def _keys(table: pa.Table, mask: pa.ChunkedArray) -> tuple[str, ...]:
    return tuple(sorted(table["key"].filter(mask).to_pylist()))
