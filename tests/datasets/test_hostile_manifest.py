"""A manifest is someone else's file: nothing in it may reach outside of its folder."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from spotfirst import datasets
from spotfirst.datasets._keys import UNSAFE_KEY_RE2, check_key
from spotfirst.datasets._log import Version
from spotfirst.datasets._manifest import SCHEMA, decode_manifest
from spotfirst.errors import CorruptObject, InvalidSpec
from spotfirst.spec import DatasetRef
from spotfirst.storage import Storage, safe_path
from spotfirst.wire import encode
from tests.datasets.helpers import content, fill

GOOD = blake3(b"evil").hexdigest()


def _parquet(rows: list[tuple[object, ...]], schema: pa.Schema = SCHEMA) -> bytes:
    loose = pa.schema([field.with_nullable(True) for field in schema])
    columns = [[row[i] if i < len(row) else None for row in rows] for i in range(len(loose))]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, loose, strict=True)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=loose), sink)
    return bytes(sink.getvalue().to_pybytes())


def _plant(storage: Storage, tmp_path: Path, data: bytes, files: int, **changes: object) -> None:
    """Make ``data`` the manifest of a version that a commit would never write."""
    real = datasets.commit(storage, "corpus", fill(tmp_path / "in", {"x": b"evil"}))
    digest = blake3(data).hexdigest()
    storage.write(f"datasets/corpus/manifests/{digest}.parquet", data)
    record = msgspec.structs.replace(real, **{"manifest": digest, "files": files, **changes})
    storage.write("datasets/corpus/versions/00000001.json", encode(record))


HOSTILE_KEYS = [
    "../x", "..", ".", "", "/etc/x", "a/../../x", "a/..", "./x", "a/./x", "a//x", "a/", "a\\x", "a\0x",
]  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_a_key_that_leaves_its_folder_is_refused_before_anything_is_written(
    local: Storage, tmp_path: Path, key: str
) -> None:
    _plant(local, tmp_path, _parquet([(key, 4, GOOD, None)]), files=1)
    before = content(tmp_path)

    with pytest.raises(CorruptObject, match="would leave its folder"):
        datasets.sync(local, DatasetRef(name="corpus", version=1), tmp_path / "t", tmp_path / "c")

    after = content(tmp_path)
    assert {path for path in after if not path.startswith("c/datasets/manifests/")} == set(before)


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([("a", 4, GOOD, None), ("a/b", 4, GOOD, None)], "both a file and a folder"),
        ([("a", 4, GOOD, None), ("a-", 4, GOOD, None), ("a/b/c", 4, GOOD, None)], "both a file"),
        ([("a", 4, GOOD, None), ("a", 4, GOOD, None)], "twice"),
        ([("b", 4, GOOD, None), ("a", 4, GOOD, None)], "not sorted"),
        ([("a", -1, GOOD, None)], "below 0"),
        ([("a", 4, "../../../../etc/passwd", None)], "hexadecimal"),
        ([("a", 4, GOOD + "\n", None)], "hexadecimal"),
        ([("a", 4, GOOD.upper(), None)], "hexadecimal"),
        ([("a", 4, GOOD, "file:///etc/passwd")], "location"),
        ([(None, 4, GOOD, None)], "null"),
        ([("a", None, GOOD, None)], "null"),
        ([("a", 4, None, None)], "null"),
    ],
)
def test_a_manifest_that_no_commit_writes_is_refused(
    rows: list[tuple[object, ...]], problem: str
) -> None:
    with pytest.raises(CorruptObject, match=problem):
        decode_manifest(_parquet(rows), path="m")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" * 100, b"not parquet at all" * 99])
def test_what_is_no_parquet_is_refused(data: bytes) -> None:
    with pytest.raises(CorruptObject, match="not a dataset manifest"):
        decode_manifest(data, path="m")


def test_a_manifest_without_its_columns_is_refused() -> None:
    with pytest.raises(CorruptObject, match="not a dataset manifest"):
        decode_manifest(_parquet([("a",)], pa.schema([("key", pa.string())])), path="m")


def test_invalid_utf8_is_refused() -> None:
    schema = pa.schema([*[pa.field("key", pa.binary())], *list(SCHEMA)[1:]])
    with pytest.raises(CorruptObject):
        decode_manifest(_parquet([(b"\xff\xfe", 4, GOOD, None)], schema), path="m")


def test_an_empty_manifest_is_a_manifest() -> None:
    assert len(decode_manifest(_parquet([]), path="m")) == 0


def test_a_size_that_the_object_does_not_have_is_refused(local: Storage, tmp_path: Path) -> None:
    _plant(local, tmp_path, _parquet([("x", 3, GOOD, None)]), files=1)
    with pytest.raises(CorruptObject, match="4 bytes"):
        datasets.sync(local, DatasetRef(name="corpus", version=1), tmp_path / "t", tmp_path / "c")


@pytest.mark.parametrize(
    "changes",
    [{"manifest": "../../../../etc/passwd"}, {"manifest": "a" * 63}, {"version": 2}, {"files": 7}],
)
def test_a_version_record_that_no_commit_writes_is_refused(
    local: Storage, tmp_path: Path, changes: dict[str, object]
) -> None:
    _plant(local, tmp_path, _parquet([("x", 4, GOOD, None)]), **{"files": 1, **changes})  # type: ignore[arg-type]
    with pytest.raises(CorruptObject):
        datasets.sync(local, DatasetRef(name="corpus", version=1), tmp_path / "t", tmp_path / "c")


def test_a_hostile_name_in_a_reference_is_refused(local: Storage, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec):
        datasets.sync(local, DatasetRef(name="../x", version=1), tmp_path / "t", tmp_path / "c")


_PIECES = st.lists(st.sampled_from(["a", ".", "..", "/", "\\", "\0", "\n", "b c", "ü"]), max_size=6)


@given(st.one_of(_PIECES.map("".join), st.text(max_size=12)))
def test_the_rule_for_keys_is_one_rule_and_within_that_for_paths(text: str) -> None:
    try:
        accepted = check_key(text) == text
    except InvalidSpec:
        accepted = False
    try:
        arrow = pa.array([text], pa.string())
    except UnicodeEncodeError:
        assert not accepted
        return
    assert accepted == (not pa.compute.match_substring_regex(arrow, UNSAFE_KEY_RE2)[0].as_py())
    if accepted:
        assert safe_path(text) == text


def test_a_version_record_keeps_its_fields() -> None:
    assert Version.__struct_fields__ == (
        "version", "manifest", "content", "files", "bytes", "created_at", "nonce", "message",
    )  # fmt: skip
