"""Comparing two manifests by Arrow joins: a million rows in a fraction of a second."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["added_or_changed", "compare"]


def compare(
    old: pa.Table, new: pa.Table
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], int]:
    """(added, removed, changed keys, bytes of the added and changed), keys sorted."""
    joined = _contents(old, "old").join(
        _contents(new, "new").append_column("size", new["size"]),
        keys="key",
        join_type="full outer",
    )
    before, after = joined["old"], joined["new"]
    added, removed = pc.is_null(before), pc.is_null(after)
    changed = pc.fill_null(pc.not_equal(before, after), fill_value=False)
    size = pc.sum(joined["size"].filter(pc.or_(added, changed)), min_count=0).as_py()
    return _keys(joined, added), _keys(joined, removed), _keys(joined, changed), int(size)


def added_or_changed(old: pa.Table, new: pa.Table) -> pa.Table:
    """The rows of ``new`` that ``old`` lacks or has with other content, sorted by key."""
    marked = new.append_column("new", _contents(new, "new")["new"])
    joined = marked.join(_contents(old, "old"), keys="key", join_type="left outer")
    same = pc.fill_null(pc.equal(joined["old"], joined["new"]), fill_value=False)
    return joined.filter(pc.invert(same)).select(new.column_names).sort_by("key")


def _contents(table: pa.Table, name: str) -> pa.Table:
    """Keys, and what makes a file another one: its digest, and whether it may be run."""
    marks = pc.if_else(pc.fill_null(table["executable"], fill_value=False), "x", "")
    content = pc.binary_join_element_wise(table["blake3"], marks, "")
    return table.select(["key"]).append_column(name, content)


def _keys(table: pa.Table, mask: pa.ChunkedArray) -> tuple[str, ...]:
    return tuple(sorted(table["key"].filter(mask).to_pylist()))
