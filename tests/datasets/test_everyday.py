"""Folders as people have them: programs in them, the storage in them, files that change or resist."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from spotfirst import code, datasets
from spotfirst.datasets._manifest import SCHEMA, build_manifest, decode_manifest
from spotfirst.errors import InvalidSpec, StorageError
from spotfirst.storage import Storage, open_storage
from tests.datasets.helpers import Traffic, content, later

MakeFolder = Callable[[str, dict[str, bytes]], Path]
DATA = {
    "data.csv": b"1\n",
    "run.sh": b"#!/bin/sh\necho ready\n",
    "twin": b"#!/bin/sh\necho ready\n",
}


def sync(storage: Storage, text: str, tmp_path: Path, name: str = "back") -> Path:
    target = tmp_path / name
    datasets.sync(storage, datasets.resolve(storage, text), target, tmp_path / "cache")
    return target


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_could_be_run_can_be_run_and_its_twin_cannot(
    local: Storage, folder: MakeFolder, tmp_path: Path
) -> None:
    source = folder("in", DATA)
    (source / "run.sh").chmod(0o755)
    datasets.commit(local, "corpus", source)
    for _ in range(2):
        back = sync(local, "corpus", tmp_path)
        assert content(back) == DATA
        modes = {name: mode(back / name) for name in DATA}
        assert modes == {"data.csv": 0o444, "run.sh": 0o555, "twin": 0o444}


def test_a_mode_that_changes_is_a_new_version_that_moves_nothing(
    local: Storage, folder: MakeFolder, tmp_path: Path, traffic: Traffic
) -> None:
    source = folder("in", DATA)
    first = datasets.commit(local, "corpus", source)
    sync(local, "corpus@1", tmp_path)
    (source / "run.sh").chmod(0o755)
    traffic.calls.clear()
    second = datasets.commit(local, "corpus", source)
    assert (first.version, second.version) == (1, 2)
    assert traffic.of("write", "upload", below="objects/") == []
    changed = datasets.diff(
        local, datasets.resolve(local, "corpus@1"), datasets.resolve(local, "corpus@2")
    )
    assert changed.changed == ("run.sh",)
    result = datasets.sync(
        local, datasets.resolve(local, "corpus@2"), tmp_path / "back", tmp_path / "cache"
    )
    assert result.moved_bytes == 0
    assert mode(tmp_path / "back" / "run.sh") == 0o555
    assert mode(sync(local, "corpus@1", tmp_path) / "run.sh") == 0o444
    (source / "run.sh").chmod(0o644)
    assert datasets.commit(local, "corpus", source).content == first.content


def test_a_manifest_of_an_older_release_has_nothing_that_can_be_run() -> None:
    rows = [("a", 1, "0" * 64, True)]
    table = build_manifest(rows).drop_columns(["executable"])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    read = decode_manifest(sink.getvalue().to_pybytes(), path="m")
    assert read.schema == SCHEMA
    assert read["executable"].to_pylist() == [None]


@pytest.mark.parametrize("inside", ["spotfirst-runs", "deep/er/runs"])
def test_the_storage_and_the_cache_are_no_part_of_the_data(
    folder: MakeFolder, inside: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder("project", DATA)
    monkeypatch.setenv("SPOTFIRST_CACHE", str(source / ".cache"))
    (source / "link").symlink_to(source / inside)
    (source / inside).mkdir(parents=True)
    storage = open_storage(str(source / inside))
    commits = [datasets.commit(storage, "corpus", source) for _ in range(3)]
    assert [commit.files for commit in commits] == [3, 3, 3]
    assert {commit.version for commit in commits} == {1}
    ref = code.publish(storage, source)
    assert code.publish(storage, source) == ref
    with pytest.raises(InvalidSpec, match="the storage itself"):
        datasets.commit(storage, "runs", source / inside)


def test_a_prefix_leaves_out_the_storage_that_lies_in_it(s3_url: str) -> None:
    place = open_storage(s3_url)
    place.write("data.csv", b"1")
    place.write("runs-of-others/x", b"2")
    storage = open_storage(f"{s3_url}/runs")
    commits = [datasets.commit(storage, "corpus", s3_url) for _ in range(2)]
    assert [(commit.version, commit.files) for commit in commits] == [(1, 2), (1, 2)]


def write_in_place(path: Path, data: bytes) -> None:
    """As ``rsync --inplace --times`` or ``touch -r`` leave a file: other bytes, the same times."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(data)
    path.chmod(stat.S_IMODE(before.st_mode))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_an_edit_that_keeps_size_and_time_is_committed(local: Storage, folder: MakeFolder) -> None:
    source = folder("in", DATA)
    datasets.commit(local, "corpus", source, clock=later)
    write_in_place(source / "data.csv", b"2\n")
    assert datasets.commit(local, "corpus", source, clock=later).version == 2


@pytest.mark.parametrize("name", ["data.csv", "run.sh"])
@pytest.mark.parametrize("removed", [False, True], ids=["there", "removed"])
def test_an_edit_in_a_training_folder_that_keeps_size_and_time_does_not_reach_the_next_one(
    local: Storage, folder: MakeFolder, tmp_path: Path, name: str, *, removed: bool
) -> None:
    source = folder("in", DATA)
    (source / "run.sh").chmod(0o755)
    datasets.commit(local, "corpus", source)
    back = sync(local, "corpus", tmp_path)
    write_in_place(back / name, b"9"[:1])
    if removed:
        (back / name).unlink()
    for target in ("back", "another"):
        assert content(sync(local, "corpus", tmp_path, target)) == DATA


def test_a_cache_that_nothing_touched_is_not_read_again(
    local: Storage, folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spotfirst.datasets import _sync

    datasets.commit(local, "corpus", folder("in", DATA))
    sync(local, "corpus", tmp_path)
    verified: list[str] = []
    monkeypatch.setattr(_sync, "_is_intact", lambda path, *_: bool(verified.append(path)))
    sync(local, "corpus", tmp_path)
    assert verified == []


def test_a_file_that_cannot_be_read_is_named(local: Storage, folder: MakeFolder) -> None:
    source = folder("in", DATA)
    (source / "broken").symlink_to("/proc/self/mem")  # its first byte is an error to read
    with pytest.raises(StorageError, match=f"{source}/broken cannot be read"):
        datasets.commit(local, "corpus", source)


class FileExpired(OSError):
    """s3fs's, when an object was replaced while it was read."""


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (PermissionError, InvalidSpec, r"memory://b/odd may not be read"),
        (FileExpired, InvalidSpec, r"memory://b/odd changes while it is committed"),
        (FileNotFoundError, InvalidSpec, r"memory://b/odd changes while it is committed"),
        (
            ConnectionResetError,
            StorageError,
            r"memory://b/odd cannot be read: ConnectionResetError",
        ),
        (EOFError, StorageError, r"memory://b/odd cannot be read: EOFError"),
    ],
)
def test_an_error_of_the_source_names_the_object(
    local: Storage,
    error: type[Exception],
    kind: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fsspec.filesystem("memory").pipe({"/b/good": b"1", "/b/odd": b"2"})
    original = MemoryFileSystem._open

    def failing(self: MemoryFileSystem, path: str, *args: Any, **more: Any) -> Any:
        if path.endswith("odd"):
            raise error("as it does")
        return original(self, path, *args, **more)

    monkeypatch.setattr(MemoryFileSystem, "_open", failing)
    with pytest.raises(kind, match=said):
        datasets.commit(local, "corpus", "memory://b")
    assert datasets.versions(local, "corpus") == []


def test_a_folder_that_may_not_be_entered_is_named(local: Storage, folder: MakeFolder) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may enter everything")
    source = folder("in", {"a": b"1", "closed/b": b"2"})
    (source / "closed").chmod(0)
    try:
        with pytest.raises(InvalidSpec, match="may not be read"):
            datasets.commit(local, "corpus", source)
    finally:
        (source / "closed").chmod(0o755)


def test_links_are_followed_and_their_mode_is_that_of_their_target(
    local: Storage, folder: MakeFolder, tmp_path: Path
) -> None:
    source = folder("in", {"bin/tool": b"#!/bin/sh\n"})
    (source / "bin" / "tool").chmod(0o700)
    (source / "tool").symlink_to("bin/tool")
    datasets.commit(local, "corpus", source)
    back = sync(local, "corpus", tmp_path)
    assert mode(back / "tool") == mode(back / "bin" / "tool") == 0o555
