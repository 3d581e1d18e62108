"""Bringing a version to a machine: only missing bytes, only proven bytes, exactly its files."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from spotfirst import datasets
from spotfirst.datasets import _sync as _sync_code
from spotfirst.errors import CorruptObject, InvalidSpec, ObjectMissing
from spotfirst.storage import Storage
from tests.datasets.helpers import Traffic, content, fill

MakeFolder = Callable[[str, dict[str, bytes]], Path]
ONE = {"a.txt": b"alpha", "b/c.txt": b"gamma", "empty": b"", "twin": b"alpha"}
TWO = {"a.txt": b"alpha", "b/d.txt": b"delta!", "b/e/f": b"eff"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def _commit(storage: Storage, folder: MakeFolder) -> None:
    datasets.commit(storage, "corpus", folder("one", ONE))
    datasets.commit(storage, "corpus", folder("two", TWO))


def _sync(storage: Storage, text: str, target: Path, cache: Path) -> datasets.SyncResult:
    return datasets.sync(storage, datasets.resolve(storage, text), target, cache)


def test_the_folder_holds_exactly_the_files_of_the_version(
    storage: Storage, folder: MakeFolder, target: Path, cache: Path
) -> None:
    _commit(storage, folder)

    result = _sync(storage, "corpus@1", target, cache)

    assert content(target) == ONE
    assert (result.files, result.bytes) == (4, 15)
    assert (result.moved_files, result.moved_bytes) == (3, 10)  # the twins moved once


def test_only_missing_bytes_move_and_other_files_go(
    storage: Storage, folder: MakeFolder, target: Path, cache: Path, traffic: Traffic
) -> None:
    _commit(storage, folder)
    _sync(storage, "corpus@1", target, cache)
    traffic.calls.clear()

    result = _sync(storage, "corpus@2", target, cache)

    assert content(target) == TWO
    assert (result.moved_files, result.moved_bytes) == (2, 9)
    assert traffic.bytes_of("read", "download", below="objects/") == 9
    assert not (target / "b/c.txt").exists()


def test_the_same_version_again_moves_nothing(
    storage: Storage, folder: MakeFolder, target: Path, cache: Path, traffic: Traffic
) -> None:
    _commit(storage, folder)
    _sync(storage, "corpus@2", target, cache)
    inodes = {path: path.stat().st_ino for path in target.rglob("*")}
    traffic.calls.clear()

    result = _sync(storage, "corpus@2", target, cache)

    assert (result.moved_files, result.moved_bytes) == (0, 0)
    assert traffic.of("read", "download") == ["versions/00000002.json"] * 2  # resolve, sync
    assert {path: path.stat().st_ino for path in target.rglob("*")} == inodes


def test_since_a_version_only_new_and_changed_files_are_there(
    local: Storage, folder: MakeFolder, target: Path, cache: Path
) -> None:
    _commit(local, folder)

    result = datasets.sync(local, datasets.resolve(local, "corpus", since=1), target, cache)

    assert content(target) == {"b/d.txt": b"delta!", "b/e/f": b"eff"}
    assert result.moved_bytes == 9


def test_large_objects_are_verified_from_disk(
    storage: Storage,
    folder: MakeFolder,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    traffic: Traffic,
) -> None:
    monkeypatch.setattr(_sync_code, "_IN_MEMORY_BYTES", 0)
    _commit(storage, folder)
    _sync(storage, "corpus@2", target, target.with_name("cache"))
    assert content(target) == TWO
    assert len(traffic.of("download")) == 3


def test_progress_reaches_the_bytes_to_move(
    local: Storage, folder: MakeFolder, target: Path, cache: Path
) -> None:
    _commit(local, folder)
    told: list[tuple[int, int]] = []
    datasets.sync(
        local, datasets.resolve(local, "corpus"), target, cache, lambda *now: told.append(now)
    )
    assert told[-1] == (14, 14)
    assert told == sorted(told)


def test_files_are_read_only_links_into_the_cache(
    local: Storage, folder: MakeFolder, target: Path, cache: Path
) -> None:
    _commit(local, folder)
    _sync(local, "corpus@2", target, cache)
    found = (target / "a.txt").stat()
    assert found.st_nlink == 2
    assert found.st_mode & 0o222 == 0


def test_bytes_that_a_script_wrote_through_a_link_do_not_come_back(
    local: Storage, folder: MakeFolder, target: Path, cache: Path, traffic: Traffic
) -> None:
    _commit(local, folder)
    _sync(local, "corpus@2", target, cache)
    (target / "a.txt").chmod(0o644)
    (target / "a.txt").write_bytes(b"ALPHA")
    traffic.calls.clear()

    _sync(local, "corpus@2", target, cache)

    assert content(target) == TWO
    assert traffic.bytes_of("read", below="objects/") == 5


def test_a_file_that_was_only_touched_is_verified_and_kept(
    local: Storage, folder: MakeFolder, target: Path, cache: Path
) -> None:
    _commit(local, folder)
    _sync(local, "corpus@2", target, cache)
    os.utime(target / "a.txt")
    assert _sync(local, "corpus@2", target, cache).moved_bytes == 0


@pytest.mark.parametrize("damage", [b"alphb", b"alp", b"alpha and more"])
def test_a_corrupted_object_is_refused_by_name_and_can_be_repaired(
    storage: Storage, folder: MakeFolder, target: Path, cache: Path, damage: bytes
) -> None:
    _commit(storage, folder)
    digest = blake3(b"alpha").hexdigest()
    storage.write(f"datasets/corpus/objects/{digest[:2]}/{digest}", damage)

    with pytest.raises(CorruptObject, match=f"{digest}.*repair=True"):
        _sync(storage, "corpus@2", target, cache)
    assert not (cache / f"datasets/objects/{digest[:2]}/{digest}").exists()

    assert datasets.commit(storage, "corpus", folder("two", TWO), repair=True).version == 2
    _sync(storage, "corpus@2", target, cache)
    assert content(target) == TWO


def test_a_missing_object_is_named(
    local: Storage, folder: MakeFolder, target: Path, cache: Path
) -> None:
    _commit(local, folder)
    digest = blake3(b"alpha").hexdigest()
    local.delete(f"datasets/corpus/objects/{digest[:2]}/{digest}")
    with pytest.raises(ObjectMissing, match=f"{digest}, a file of corpus@2, is missing"):
        _sync(local, "corpus@2", target, cache)


def test_a_corrupted_manifest_is_refused_and_can_be_repaired(
    local: Storage, folder: MakeFolder, target: Path, cache: Path
) -> None:
    _commit(local, folder)
    manifest = datasets.versions(local, "corpus")[1].manifest
    local.write(f"datasets/corpus/manifests/{manifest}.parquet", b"PAR1")
    with pytest.raises(CorruptObject, match="repair=True"):
        _sync(local, "corpus@2", target, cache)
    datasets.commit(local, "corpus", folder("two", TWO), repair=True)
    assert _sync(local, "corpus@2", target, cache).files == 3


def test_a_damaged_transfer_is_tried_once_more(
    local: Storage,
    folder: MakeFolder,
    target: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _commit(local, folder)
    original, damaged = Storage.read, set[str]()

    def read(self: Storage, path: str, **more: Any) -> bytes:
        data = original(self, path, **more)
        if path.startswith("objects/") and path not in damaged:
            damaged.add(path)
            return data[:-1]
        return data

    monkeypatch.setattr(Storage, "read", read)
    _sync(local, "corpus@2", target, cache)
    assert content(target) == TWO
    assert len(damaged) == 3


def test_links_in_the_destination_are_removed_and_never_followed(
    local: Storage, folder: MakeFolder, target: Path, cache: Path, tmp_path: Path
) -> None:
    _commit(local, folder)
    _sync(local, "corpus@1", target, cache)
    outside = folder("outside", {"keep": b"me", "d.txt": b"mine"})
    for path in (target / "b").iterdir():
        path.unlink()
    (target / "b").rmdir()
    (target / "b").symlink_to(outside)
    (target / "a.txt").unlink()
    (target / "a.txt").symlink_to(outside / "keep")

    _sync(local, "corpus@2", target, cache)

    assert content(target) == TWO
    assert content(outside) == {"keep": b"me", "d.txt": b"mine"}


def test_a_folder_may_become_a_file_and_the_reverse(
    local: Storage, folder: MakeFolder, target: Path, cache: Path
) -> None:
    datasets.commit(local, "corpus", folder("one", {"x/y/z": b"1", "f": b"2"}))
    datasets.commit(local, "corpus", folder("two", {"x": b"3", "f/g": b"4"}))
    for number, tree in ((1, {"x/y/z": b"1", "f": b"2"}), (2, {"x": b"3", "f/g": b"4"})) * 2:
        _sync(local, f"corpus@{number}", target, cache)
        assert content(target) == tree


def test_a_folder_with_foreign_files_is_refused_and_left_alone(
    local: Storage, folder: MakeFolder, cache: Path
) -> None:
    _commit(local, folder)
    home = folder("home", {"thesis": b"years"})
    with pytest.raises(InvalidSpec, match="no sync put there"):
        _sync(local, "corpus@2", home, cache)
    assert content(home) == {"thesis": b"years"}


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EMLINK, errno.EPERM])
def test_where_links_cannot_be_made_files_are_copied(
    local: Storage,
    folder: MakeFolder,
    target: Path,
    monkeypatch: pytest.MonkeyPatch,
    reason: int,
) -> None:
    def link(*_: object) -> None:
        raise OSError(reason, "no links here")

    _commit(local, folder)
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr("spotfirst.storage.Storage.create", lambda *_: True)
    for number, tree in ((1, ONE), (2, TWO)):
        _sync(local, f"corpus@{number}", target, target.with_name("cache"))
        assert content(target) == tree


def test_processes_may_share_a_cache(local: Storage, folder: MakeFolder, tmp_path: Path) -> None:
    _commit(local, folder)
    targets = [tmp_path / f"target{n}" for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda t: _sync(local, "corpus@2", t, tmp_path / "cache"), targets))
    assert all(content(target) == TWO for target in targets)


def test_half_files_of_dead_processes_are_removed_and_those_of_living_ones_kept(
    local: Storage, folder: MakeFolder, target: Path, cache: Path
) -> None:
    _commit(local, folder)
    partial = cache / "datasets/partial"
    for name in ("dead", "alive"):
        fill(partial, {f"{name}.lock": b"", f"{name}/half": b"al"})
    with (partial / "alive.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _sync(local, "corpus@2", target, cache)
        assert content(partial) == {"alive.lock": b"", "alive/half": b"al"}
