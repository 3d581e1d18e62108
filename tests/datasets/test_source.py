"""What a commit accepts as its source."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from spotfirst import datasets
from spotfirst.datasets import _source
from spotfirst.errors import InvalidSpec
from spotfirst.storage import Storage, open_storage

MakeFolder = Callable[[str, dict[str, bytes]], Path]


def _keys(storage: Storage) -> list[str]:
    keys: list[str] = datasets.manifest(storage, "corpus")["key"].to_pylist()
    return keys


def test_a_prefix_of_another_store_can_be_committed(local: Storage) -> None:
    fsspec.filesystem("memory").pipe(
        {"/bucket/raw/a": b"1", "/bucket/raw/d/b": b"22", "/bucket/x": b""}
    )

    version = datasets.commit(local, "corpus", "memory://bucket/raw")

    assert _keys(local) == ["a", "d/b"]
    assert version.bytes == 3


def test_objects_on_s3_with_a_known_etag_are_not_read_again(
    local: Storage, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = open_storage(s3_url)
    place.write("raw/a", b"1")
    place.write("raw/b", b"2")
    first = datasets.commit(local, "corpus", f"{s3_url}/raw")
    opened: list[str] = []
    original = _source._Prefix.open

    def watched(self: _source._Prefix, key: str) -> Any:
        opened.append(key)
        return original(self, key)

    monkeypatch.setattr(_source._Prefix, "open", watched)
    assert datasets.commit(local, "corpus", f"{s3_url}/raw") == first
    assert opened == []

    place.write("raw/b", b"3")
    assert datasets.commit(local, "corpus", f"{s3_url}/raw").version == 2
    assert set(opened) == {"b"}


@pytest.mark.parametrize("source", ["nowhere", "memory://bucket/nowhere"])
def test_a_source_that_is_not_there_is_refused(local: Storage, tmp_path: Path, source: str) -> None:
    place = source if "://" in source else tmp_path / source
    with pytest.raises(InvalidSpec, match="nowhere"):
        datasets.commit(local, "corpus", place)


def test_an_empty_folder_is_refused(local: Storage, tmp_path: Path) -> None:
    (tmp_path / "in/deeper").mkdir(parents=True)
    with pytest.raises(InvalidSpec, match="no files"):
        datasets.commit(local, "corpus", tmp_path / "in")


def test_links_to_files_and_folders_are_followed(local: Storage, folder: MakeFolder) -> None:
    elsewhere = folder("elsewhere", {"deep/x": b"1"})
    source = folder("in", {"a": b"2"})
    (source / "linked").symlink_to(elsewhere)
    (source / "file").symlink_to(elsewhere / "deep/x")

    datasets.commit(local, "corpus", source)

    assert _keys(local) == ["a", "file", "linked/deep/x"]


def test_a_link_to_a_folder_above_is_refused_instead_of_followed_for_ever(
    local: Storage, folder: MakeFolder
) -> None:
    source = folder("in", {"d/a": b"1"})
    (source / "d/up").symlink_to(source)
    with pytest.raises(InvalidSpec, match="links back"):
        datasets.commit(local, "corpus", source)


def test_what_is_neither_a_file_nor_a_folder_is_refused(local: Storage, folder: MakeFolder) -> None:
    source = folder("in", {"a": b"1"})
    (source / "broken").symlink_to("nothing")
    with pytest.raises(InvalidSpec, match="broken"):
        datasets.commit(local, "corpus", source)
    (source / "broken").unlink()
    os.mkfifo(source / "pipe")
    with pytest.raises(InvalidSpec, match="pipe"):
        datasets.commit(local, "corpus", source)


@pytest.mark.parametrize("name", [b"back\\slash", b"latin-\xe9"])
def test_a_file_name_that_cannot_be_a_key_is_refused(
    local: Storage, folder: MakeFolder, name: bytes
) -> None:
    source = folder("in", {"a": b"1"})
    Path(os.fsdecode(bytes(source) + b"/" + name)).write_bytes(b"2")
    with pytest.raises(InvalidSpec, match="Rename it"):
        datasets.commit(local, "corpus", source)


def test_a_name_that_is_both_a_file_and_a_folder_is_refused(
    local: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("memory").pipe({"/bucket/raw/a/b/c": b"1", "/bucket/raw/x": b"2"})
    original = _source._Prefix.scan

    def scan(self: _source._Prefix) -> list[_source.Found]:  # as S3 may list it
        return [_source.Found(key.replace("x", "a"), *rest) for key, *rest in original(self)]

    monkeypatch.setattr(_source._Prefix, "scan", scan)
    monkeypatch.setattr(_source._Prefix, "open", lambda *_: io.BytesIO(b"1"))
    with pytest.raises(InvalidSpec, match="'a' is both a file and a folder"):
        datasets.commit(local, "corpus", "memory://bucket/raw")


def test_names_in_any_script_with_spaces_and_newlines_are_kept(
    local: Storage, folder: MakeFolder
) -> None:
    names = ["日本語/ü.txt", "a b", "new\nline", "..three", "...", "-rf"]
    datasets.commit(local, "corpus", folder("in", dict.fromkeys(names, b"x")))
    assert _keys(local) == sorted(names)
