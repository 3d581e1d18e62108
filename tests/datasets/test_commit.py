"""Committing a folder: what is sent, what is not read again, and who wins a race."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from spotfirst import datasets
from spotfirst.datasets import _commit, _source
from spotfirst.datasets._log import Version, VersionLog
from spotfirst.errors import InvalidSpec
from spotfirst.storage import Storage
from tests.datasets.helpers import Traffic, fill, later

MakeFolder = Callable[[str, dict[str, bytes]], Path]
TREE = {"a.txt": b"alpha", "b/c.txt": b"gamma", "empty": b""}


def test_a_folder_becomes_version_1_with_its_files_in_the_manifest(
    storage: Storage, folder: MakeFolder
) -> None:
    version = datasets.commit(storage, "corpus", folder("in", TREE), "first")

    assert (version.version, version.files, version.bytes, version.message) == (1, 3, 10, "first")
    rows = datasets.manifest(storage, "corpus@1")
    assert rows["key"].to_pylist() == ["a.txt", "b/c.txt", "empty"]
    assert rows["size"].to_pylist() == [5, 5, 0]


def test_the_same_files_again_are_the_same_version_and_write_nothing(
    storage: Storage, folder: MakeFolder, traffic: Traffic
) -> None:
    first = datasets.commit(storage, "corpus", folder("in", TREE))
    traffic.calls.clear()

    again = datasets.commit(storage, "corpus", folder("copy", TREE))

    assert again == first
    assert traffic.of("write", "create", "upload") == []


def test_only_objects_that_the_storage_lacks_are_sent(
    storage: Storage, folder: MakeFolder, traffic: Traffic
) -> None:
    datasets.commit(storage, "corpus", folder("in", TREE))
    traffic.calls.clear()

    datasets.commit(storage, "corpus", folder("in", {"a.txt": b"ALPHA!", "twin": b"ALPHA!"}))

    assert traffic.bytes_of("write", "upload", below="objects/") == 6


def test_a_file_that_came_back_from_an_older_version_is_not_sent_again(
    local: Storage, folder: MakeFolder, traffic: Traffic
) -> None:
    datasets.commit(local, "corpus", folder("one", {"x": b"old"}))
    datasets.commit(local, "corpus", folder("two", {"x": b"new"}))
    traffic.calls.clear()

    third = datasets.commit(local, "corpus", folder("one", {}))

    assert third.version == 3
    assert traffic.of("write", "upload", below="objects/") == []


@pytest.mark.parametrize(("missing", "listings"), [(3, 0), (100, 1)])
def test_whether_objects_are_there_is_asked_one_by_one_or_by_one_listing(
    local: Storage,
    folder: MakeFolder,
    traffic: Traffic,
    missing: int,
    listings: int,
) -> None:
    datasets.commit(local, "corpus", folder("in", {f"{n:03d}": b"%d" % n for n in range(missing)}))
    datasets.commit(local, "corpus", folder("other", {"x": b"y"}))

    traffic.calls.clear()
    datasets.commit(local, "corpus", folder("in", {"new": b"!"}))

    assert len(traffic.of("write", "upload", below="objects/")) == 1
    assert traffic.of("walk") == ["objects"] * listings
    assert len(traffic.of("size_bytes")) == (0 if listings else missing)


def test_large_files_are_sent_from_a_private_copy(
    storage: Storage, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch, traffic: Traffic
) -> None:
    monkeypatch.setattr(_commit, "_IN_MEMORY_BYTES", 4)

    datasets.commit(storage, "corpus", folder("in", TREE))

    assert traffic.bytes_of("upload", below="objects/") == 10
    assert traffic.bytes_of("write", below="objects/") == 0


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the source that were read."""
    keys: list[str] = []
    original = _source._Folder.open

    def watched(self: _source._Folder, key: str) -> Any:
        keys.append(key)
        return original(self, key)

    monkeypatch.setattr(_source._Folder, "open", watched)
    return keys


def test_files_that_did_not_change_are_not_read_again(
    local: Storage, folder: MakeFolder, opened: list[str]
) -> None:
    source = folder("in", TREE)
    datasets.commit(local, "corpus", source, clock=later)
    opened.clear()
    (source / "a.txt").write_bytes(b"other")

    datasets.commit(local, "corpus", source, clock=later)

    assert set(opened) == {"a.txt"}


def test_an_edit_of_the_same_size_within_the_clock_tick_of_a_commit_is_seen(
    local: Storage, folder: MakeFolder
) -> None:
    source = folder("in", {"a": b"one"})
    times = (source / "a").stat()
    datasets.commit(local, "corpus", source)
    with (source / "a").open("r+b") as file:  # same inode, same size
        file.write(b"two")
    os.utime(source / "a", ns=(times.st_atime_ns, times.st_mtime_ns))

    assert datasets.commit(local, "corpus", source).version == 2


def test_a_lost_or_damaged_stat_cache_costs_time_only(
    local: Storage, folder: MakeFolder, tmp_path: Path
) -> None:
    source = folder("in", TREE)
    first = datasets.commit(local, "corpus", source, clock=later)
    (cached,) = (tmp_path / "user-cache/datasets/stat").iterdir()
    cached.write_bytes(b"PAR1 no more")

    assert datasets.commit(local, "corpus", source) == first


def test_a_stat_cache_that_lies_is_found_out_before_bytes_get_a_wrong_name(
    local: Storage, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder("in", {"a": b"one"})
    datasets.commit(local, "other", source, clock=later)
    (source / "a").write_bytes(b"two")
    monkeypatch.setattr(_source._Folder, "_fingerprint", lambda *_: "always")
    datasets.commit(local, "corpus", source, cache=source.parent / "cache", clock=later)
    (source / "a").write_bytes(b"six")

    datasets.commit(local, "third", source, cache=source.parent / "cache", clock=later)

    (digest,) = datasets.manifest(local, "third")["blake3"].to_pylist()
    assert local.read(f"datasets/third/objects/{digest[:2]}/{digest}") == b"six"


def test_racing_committers_all_get_a_version_of_their_own(storage: Storage, tmp_path: Path) -> None:
    sources = [fill(tmp_path / str(n), {"who": b"%d" % n}) for n in range(4)]

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda source: datasets.commit(storage, "corpus", source), sources))

    assert sorted(version.version for version in made) == [1, 2, 3, 4]
    assert datasets.versions(storage, "corpus") == sorted(made, key=lambda v: v.version)


def _overtaken_by(monkeypatch: pytest.MonkeyPatch, overtake: Callable[[], object]) -> None:
    original = VersionLog.append

    def append(self: VersionLog, version: Version) -> bool:
        monkeypatch.setattr(VersionLog, "append", original)
        overtake()
        return original(self, version)

    monkeypatch.setattr(VersionLog, "append", append)


def test_the_loser_of_a_race_commits_on_top(
    storage: Storage, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = folder("theirs", {"x": b"theirs"})
    _overtaken_by(monkeypatch, lambda: datasets.commit(storage, "corpus", theirs, "theirs"))

    ours = datasets.commit(storage, "corpus", folder("ours", {"x": b"ours"}), "ours")

    assert ours.version == 2
    assert [v.message for v in datasets.versions(storage, "corpus")] == ["theirs", "ours"]


def test_two_racers_with_the_same_files_make_one_version(
    storage: Storage, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder("in", TREE)
    _overtaken_by(monkeypatch, lambda: datasets.commit(storage, "corpus", source, "theirs"))

    assert datasets.commit(storage, "corpus", source, "ours").message == "theirs"


def test_a_source_that_keeps_changing_is_refused(
    local: Storage, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder("in", {"log": b"1"})
    original = _source._Folder.open

    def grow(self: _source._Folder, key: str) -> Any:
        with (source / key).open("ab") as file:
            file.write(b"+")
        return original(self, key)

    monkeypatch.setattr(_source._Folder, "open", grow)

    with pytest.raises(InvalidSpec, match="changes while it is committed"):
        datasets.commit(local, "corpus", source)
    assert datasets.versions(local, "corpus") == []


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a@b", "x" * 201])
def test_a_name_that_could_leave_the_prefix_is_refused(
    local: Storage, folder: MakeFolder, name: str
) -> None:
    with pytest.raises(InvalidSpec, match="dataset name"):
        datasets.commit(local, name, folder("in", TREE))
