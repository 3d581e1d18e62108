"""Finding versions: by name, by number, newest; and what changed between two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from spotfirst import datasets
from spotfirst.datasets._log import Version
from spotfirst.errors import (
    CorruptObject,
    InvalidSpec,
    NewerFormat,
    StorageUnavailable,
    UnknownDataset,
)
from spotfirst.storage import Storage
from spotfirst.wire import decode, encode
from tests.datasets.helpers import Traffic

MakeFolder = Callable[[str, dict[str, bytes]], Path]
ROOT = "datasets/corpus/root.json"


@pytest.fixture
def three(local: Storage, folder: MakeFolder) -> Storage:
    """A storage with three versions of ``corpus``."""
    for number in (1, 2, 3):
        datasets.commit(local, "corpus", folder(f"v{number}", {"n": b"%d" % number}))
    return local


@pytest.mark.parametrize(
    ("text", "number"), [("corpus", 3), ("corpus@latest", 3), ("corpus@2", 2), ("corpus@002", 2)]
)
def test_a_name_resolves_to_a_version(three: Storage, text: str, number: int) -> None:
    found = datasets.resolve(three, text)
    assert (found.name, found.version, found.since) == ("corpus", number, None)
    assert found.manifest == datasets.versions(three, "corpus")[number - 1].manifest


def test_since_is_kept_in_the_reference(three: Storage) -> None:
    assert datasets.resolve(three, "corpus", since=1).since == 1


def test_an_unknown_version_is_refused_with_those_that_there_are(three: Storage) -> None:
    with pytest.raises(UnknownDataset, match=r"no version '7'; it has 1 to 3"):
        datasets.resolve(three, "corpus@7")


def test_an_unknown_dataset_is_refused(three: Storage) -> None:
    with pytest.raises(UnknownDataset, match="no dataset 'corpse'"):
        datasets.resolve(three, "corpse@latest")


@pytest.mark.parametrize("text", ["corpus@", "corpus@latest"])
def test_an_empty_version_means_the_newest(three: Storage, text: str) -> None:
    assert datasets.resolve(three, text).version == 3


@pytest.mark.parametrize("text", ["corpus@v2", "corpus@-1", "corpus@0", "corpus@1@2", "corpus@²"])
def test_another_form_is_refused_with_the_right_one(three: Storage, text: str) -> None:
    with pytest.raises(InvalidSpec, match="NAME@latest"):
        datasets.resolve(three, text)


@pytest.mark.parametrize("since", [0, 3, 9])
def test_since_must_be_an_older_version_that_exists(three: Storage, since: int) -> None:
    with pytest.raises(InvalidSpec):
        datasets.resolve(three, "corpus@2", since=since)


@pytest.mark.parametrize(
    "root", [None, b"{}", b"garbage", b'{"v":1,"version":1}', b'{"v":1,"version":99}', b""]
)
def test_the_newest_version_is_found_whatever_the_root_pointer_says(
    three: Storage, root: bytes | None
) -> None:
    if root is None:
        three.delete(ROOT)
    else:
        three.write(ROOT, root)
    assert datasets.resolve(three, "corpus").version == 3


def test_a_commit_whose_write_of_the_root_pointer_was_lost_counts(
    three: Storage, folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Storage.write

    def write(self: Storage, path: str, data: bytes) -> None:
        if path == "root.json":
            raise StorageUnavailable("no answer")
        original(self, path, data)

    monkeypatch.setattr(Storage, "write", write)
    assert datasets.commit(three, "corpus", folder("v4", {"n": b"4"})).version == 4
    assert datasets.resolve(three, "corpus").version == 4


def test_the_newest_of_many_versions_costs_three_small_reads(
    three: Storage, traffic: Traffic
) -> None:
    datasets.resolve(three, "corpus")
    assert traffic.of("read") == ["root.json", "versions/00000003.json"]  # the probe missed


def test_a_version_of_a_newer_format_is_refused_by_name(three: Storage) -> None:
    three.write("datasets/corpus/versions/00000003.json", b'{"v":99}')
    with pytest.raises(NewerFormat, match="upgrade"):
        datasets.resolve(three, "corpus")


def test_a_diff_tells_what_was_added_removed_and_changed(
    storage: Storage, folder: MakeFolder
) -> None:
    datasets.commit(storage, "corpus", folder("one", {"same": b"s", "gone": b"g", "edit": b"1"}))
    datasets.commit(storage, "corpus", folder("two", {"same": b"s", "new": b"nn", "edit": b"234"}))

    assert datasets.diff(storage, "corpus@1", "corpus@2") == (("new",), ("gone",), ("edit",), 5)
    assert datasets.diff(storage, "corpus@2", "corpus@2") == ((), (), (), 0)


def test_the_manifest_since_a_version_has_only_what_is_new(
    storage: Storage, folder: MakeFolder
) -> None:
    datasets.commit(storage, "corpus", folder("one", {"same": b"s", "gone": b"g", "edit": b"1"}))
    datasets.commit(storage, "corpus", folder("two", {"same": b"s", "new": b"nn", "edit": b"234"}))

    rows = datasets.manifest(storage, datasets.resolve(storage, "corpus", since=1))

    assert rows["key"].to_pylist() == ["edit", "new"]


@pytest.mark.parametrize("number", [1, 3])
def test_a_version_that_was_replaced_is_refused(
    three: Storage, tmp_path: Path, number: int
) -> None:
    """The reference in a run's spec has the digest: nobody trains it on other data."""
    ref = datasets.resolve(three, "corpus@3", since=1)
    versions = three.child("datasets/corpus/versions")
    other = decode(versions.read("00000002.json"), Version, path="x")
    forged = msgspec.structs.replace(other, version=number)
    versions.write(f"{number:08d}.json", encode(forged))
    with pytest.raises(CorruptObject, match=rf"version {number} of corpus is another"):
        datasets.sync(three, ref, tmp_path / "target", tmp_path / "cache")
