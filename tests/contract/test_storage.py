"""What every kind of storage promises."""

from __future__ import annotations

import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spotfirst.errors import InvalidSpec, ObjectMissing, StorageUnavailable, UnsupportedStorage
from spotfirst.storage import Storage, open_storage
from tests.waiting import PATIENCE_S

_ODD = [
    "with space",
    "ümlaut-€",
    "a+b&c=d",
    "100%25",
    "#hash",
    "q?x=1",
    "[glob]*",
    "~t",
    "x.partial",
]


def _create_numbered(url: str, name: str, number: int) -> bool:
    return open_storage(url).create(name, b"writer %d" % number)


def _write_fork_write(url: str) -> None:
    storage = open_storage(url)
    storage.write("x", b"1")
    child = multiprocessing.get_context("fork").Process(target=storage.write, args=("x", b"2"))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert storage.read("x") == b"2"


def test_of_sixteen_racing_creates_one_wins(storage: Storage) -> None:
    start = threading.Barrier(16)

    def create(number: int) -> bool:
        start.wait()
        return storage.create("prize", b"writer %d" % number)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert storage.read("prize") == b"writer %d" % won.index(True)


def test_of_racing_processes_one_creates(storage: Storage) -> None:
    if storage.url.startswith("memory"):
        pytest.skip("memory is one process's")
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        made = pool.starmap_async(_create_numbered, [(storage.url, "prize", n) for n in range(6)])
        won = made.get(timeout=PATIENCE_S)
    assert won.count(True) == 1
    assert storage.read("prize") == b"writer %d" % won.index(True)


def test_a_storage_opened_before_a_fork_works_after_it(storage: Storage) -> None:
    if storage.url.startswith("memory"):
        pytest.skip("memory is one process's")
    # In a process of its own: this one may have threads of other tests, whose locks would stay
    # locked in its child for ever.
    parent = multiprocessing.get_context("spawn").Process(
        target=_write_fork_write, args=(storage.url,)
    )
    parent.start()
    parent.join(100)
    assert parent.exitcode == 0
    assert storage.read("x") == b"2"


def test_create_leaves_what_is_there(storage: Storage) -> None:
    assert storage.create("x", b"first")
    assert not storage.create("x", b"second")
    assert storage.read("x") == b"first"


def test_create_counts_our_own_bytes_as_won(storage: Storage) -> None:
    assert storage.create("x", b"ours")
    assert storage.create("x", b"ours")


def test_an_empty_create_is_refused(storage: Storage) -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        storage.create("x", b"")


def test_a_reader_never_sees_half_a_write(storage: Storage) -> None:
    bodies = [bytes([number]) * 300_000 for number in range(8)]
    storage.write("x", bodies[0])
    done = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not done.is_set():
            seen.add(storage.read("x"))

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        for body in bodies:
            storage.write("x", body)
        done.set()
        for reader in readers:
            reader.result()
    assert seen <= set(bodies)


def test_listing_shows_names_directly_below(storage: Storage) -> None:
    for path in ["a/b/c", "a/b/d", "a/e", "ab/f"]:
        storage.write(path, b"1")
    assert storage.list("a") == ["b", "e"]
    assert storage.list("a/b") == ["c", "d"]
    assert {"a", "ab"} <= set(storage.list(""))


def test_listing_nothing_is_empty(storage: Storage) -> None:
    assert storage.list("nothing/here") == []
    assert list(storage.walk("nothing/here")) == []
    storage.write("object", b"1")
    assert storage.list("object") == []


def test_walk_gives_relative_paths_and_sizes(storage: Storage) -> None:
    for path, size in [("a/b/c", 1), ("a/b/d.x", 2), ("a/e", 3), ("ab", 4)]:
        storage.write(path, b"x" * size)
    assert list(storage.walk("a")) == [("b/c", 1), ("b/d.x", 2), ("e", 3)]
    assert list(storage.child("a").walk("b")) == [("c", 1), ("d.x", 2)]
    assert list(storage.child("a").walk("")) == [("b/c", 1), ("b/d.x", 2), ("e", 3)]


@pytest.mark.parametrize("name", _ODD)
def test_odd_names_are_names(storage: Storage, name: str) -> None:
    path = f"odd/{name}/leaf {name}"
    assert storage.create(path, b"x")
    assert storage.read(path) == b"x"
    assert storage.read_many([path]) == {path: b"x"}
    assert storage.list("odd") == [name]
    assert list(storage.walk("odd")) == [(f"{name}/leaf {name}", 1)]
    storage.delete(path)
    assert not storage.exists(path)


def test_a_name_that_s3_would_cut_is_refused(s3_url: str) -> None:
    with pytest.raises(InvalidSpec, match="versionId"):
        open_storage(s3_url).write("x?versionId=1", b"1")


def test_what_is_missing_is_named(storage: Storage) -> None:
    for call in (storage.read, storage.size_bytes):
        with pytest.raises(ObjectMissing, match="some/thing") as raised:
            call("some/thing")
        assert raised.value.path == "some/thing"
    assert storage.read_or_none("some/thing") is None
    assert not storage.exists("some/thing")
    storage.delete("some/thing")


def test_a_folder_is_no_object(storage: Storage) -> None:
    storage.write("folder/x", b"1")
    assert storage.read_or_none("folder") is None
    assert not storage.exists("folder")


def test_read_many_names_the_missing_one(storage: Storage) -> None:
    storage.write("there", b"1")
    assert storage.read_many([]) == {}
    assert storage.read_many(["there", "there"]) == {"there": b"1"}
    with pytest.raises(ObjectMissing, match="not there") as raised:
        storage.read_many(["there", "not there"])
    assert raised.value.path == "not there"


def test_ranges_end_where_the_object_ends(storage: Storage) -> None:
    storage.write("x", b"0123456789")
    assert storage.read_range("x", 2, 5) == b"234"
    assert storage.read_range("x", 8, 50) == b"89"
    assert storage.read_range("x", 50, 60) == b""
    assert storage.read_range("x", 3, 3) == b""
    with pytest.raises(ObjectMissing):
        storage.read_range("y", 0, 1)


def test_files_go_up_and_come_down_whole(storage: Storage, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 5000)
    storage.upload(source, "up/there")
    assert storage.size_bytes("up/there") == 256 * 5000
    target = tmp_path / "new" / "target"
    storage.download("up/there", target)
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_failed_download_leaves_the_old_file(storage: Storage, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(ObjectMissing, match="missing"):
        storage.download("missing", target)
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["target"]


def test_uploading_no_file_names_the_local_one(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(ObjectMissing, match="no such file here"):
        storage.upload(tmp_path / "gone", "x")


def test_one_storage_serves_several_threads(storage: Storage) -> None:
    def work(number: int) -> bytes:
        storage.write(f"t/{number}", b"%d" % number)
        return storage.read(f"t/{number}")

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(40))) == [b"%d" % n for n in range(40)]


def test_a_good_storage_passes_the_probe_and_keeps_no_object(storage: Storage) -> None:
    storage.probe()
    assert list(storage.walk("")) == []


def test_a_child_is_as_patient(storage: Storage) -> None:
    storage.patience_s = 0.5
    assert storage.child("x").child("y").patience_s == 0.5


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("gs://bucket/x", "gs:// cannot create"),
        ("https://host/x", "https:// cannot create"),
        ("s3://", "names no bucket"),
        ("s3://bucket/a//b", r"an empty part.*write it as s3://bucket/a/b"),
        ("s3://bucket//b", r"write it as s3://bucket/b"),
        ("s3a://bucket/a/./b", r"write it as s3a://bucket/a/b"),
        ("s3://bucket/a/../b", r"'\.\.' between its slashes$"),
        ("s3://bucket/a/b\n", "control character"),
        ("", "no absolute path"),
        ("file://relative/x", "no absolute path"),
    ],
)
def test_other_places_are_refused_by_name(url: str, says: str) -> None:
    with pytest.raises(UnsupportedStorage, match=says):
        open_storage(url)


def test_a_relative_folder_means_the_same_in_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("runs").url == str(tmp_path / "runs")
    assert open_storage(f"file://{tmp_path}/x").url == f"file://{tmp_path}/x"


@pytest.mark.parametrize("leaves_a_mount_point", [False, True])
def test_a_folder_whose_disk_is_away_does_not_answer_and_gets_nothing_new(
    tmp_path: Path, leaves_a_mount_point: bool
) -> None:
    folder, away = tmp_path / "mounted", tmp_path / "away"
    storage = open_storage(str(folder))
    storage.patience_s = 0
    runs = storage.child("runs")
    storage.write("spec", b"1")
    folder.rename(away)
    if leaves_a_mount_point:
        folder.mkdir()
    for call in (
        lambda: runs.create("chain/1", b"2"),
        lambda: storage.write("beat", b"2"),
        lambda: storage.write_from("packs/1", memoryview(b"2")),
        lambda: storage.read("spec"),
        lambda: runs.list("chain"),
    ):
        with pytest.raises(StorageUnavailable, match="Mount its disk again"):
            call()
    assert not folder.exists() or list(folder.iterdir()) == []
    if leaves_a_mount_point:
        folder.rmdir()
    away.rename(folder)
    assert runs.create("chain/1", b"2")
    assert storage.read("spec") == b"1"
