"""Packing and fetching training code."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import blake3
import pytest

from spotfirst.code import code_path, fetch, pack, publish
from spotfirst.errors import CorruptObject, InvalidSpec, ObjectMissing
from spotfirst.spec import CodeRef
from spotfirst.storage import Storage, open_storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "storage"))


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_py", ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def hostile(storage: Storage, *members: tuple[tarfile.TarInfo, bytes]) -> CodeRef:
    """An archive with a true digest, so that only the member checks stand in its way."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    ref = CodeRef(
        digest=blake3.blake3(data.getvalue()).hexdigest(), size_bytes=len(data.getvalue())
    )
    storage.write(code_path(ref), gzip.compress(data.getvalue()))
    return ref


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member, b""


def test_the_same_code_has_the_same_name_whatever_its_times_owners_and_place(
    tmp_path: Path,
) -> None:
    one = write(tmp_path / "a" / "code", train_py="print(1)", lib__util_py="x = 1")
    two = write(tmp_path / "b" / "code", lib__util_py="x = 1", train_py="print(1)")
    os.utime(two / "train.py", (1, 1))
    (two / "train.py").chmod(0o600)
    assert pack(one)[1] == pack(two)[1]


def test_one_changed_byte_changes_the_name(tmp_path: Path) -> None:
    code = write(tmp_path / "code", train_py="print(1)")
    before = pack(code)[1]
    write(code, train_py="print(2)")
    assert pack(code)[1].digest != before.digest


def test_the_executable_bit_survives(tmp_path: Path, storage: Storage) -> None:
    code = write(tmp_path / "code", train_py="print(1)", run="#!/bin/sh")
    (code / "run").chmod(0o750)
    fetch(storage, publish(storage, code), tmp_path / "out", cache=tmp_path / "cache")
    assert (tmp_path / "out" / "run").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "train.py").stat().st_mode & 0o777 == 0o644


def test_caches_version_control_and_ignored_names_stay_behind(
    tmp_path: Path, storage: Storage
) -> None:
    code = write(tmp_path / "code", train_py="x", notes="n", data__big="b", runs__1__log="l")
    write(code, **{".git__HEAD": "r", "__pycache__/x.pyc".replace("__", "__"): "c"})
    (code / "sub" / "__pycache__").mkdir(parents=True)
    (code / "sub" / "__pycache__" / "m.pyc").write_text("c")
    (code / "sub" / "data").write_text("a file, not a folder")
    (code / ".spotfirstignore").write_text("# what training does not need\nnotes\ndata/\n/runs/1\n")
    fetch(storage, publish(storage, code), tmp_path / "out", cache=tmp_path / "cache")
    packed = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert {"train.py", "sub/data", "sub", ".spotfirstignore"} == packed


def test_a_single_file_is_code_too(tmp_path: Path, storage: Storage) -> None:
    write(tmp_path, train_py="print(1)")
    fetch(storage, publish(storage, tmp_path / "train.py"), tmp_path / "o", cache=tmp_path / "c")
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["train.py"]


def test_a_link_inside_the_folder_is_kept(tmp_path: Path, storage: Storage) -> None:
    code = write(tmp_path / "code", lib__util_py="x = 1")
    (code / "util.py").symlink_to("lib/util.py")
    fetch(storage, publish(storage, code), tmp_path / "out", cache=tmp_path / "cache")
    assert (tmp_path / "out" / "util.py").read_text() == "x = 1"
    assert (tmp_path / "out" / "util.py").is_symlink()


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret", "lib/../../secret"])
def test_a_link_that_leads_out_is_refused_when_packing(tmp_path: Path, target: str) -> None:
    code = write(tmp_path / "code", train_py="x")
    (code / "secret").symlink_to(target)
    with pytest.raises(InvalidSpec, match="outside of the code folder"):
        pack(code)


def test_a_missing_folder_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="there is no code at"):
        pack(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    with pytest.raises(InvalidSpec, match="no files to pack"):
        pack(tmp_path / "code")


def test_a_folder_over_the_limit_names_its_largest_files(tmp_path: Path) -> None:
    code = write(tmp_path / "code", train_py="x", weights="w" * 5000)
    with pytest.raises(InvalidSpec, match=r"largest are weights .* dataset"):
        pack(code, limit_bytes=4000)


def test_publishing_again_uploads_nothing(tmp_path: Path, storage: Storage) -> None:
    code = write(tmp_path / "code", train_py="x")
    ref = publish(storage, code)
    before = (tmp_path / "storage" / code_path(ref)).stat().st_mtime_ns
    assert publish(storage, code) == ref
    assert (tmp_path / "storage" / code_path(ref)).stat().st_mtime_ns == before


def test_a_second_fetch_moves_no_bytes(tmp_path: Path, storage: Storage) -> None:
    ref = publish(storage, write(tmp_path / "code", train_py="x"))
    first = fetch(storage, ref, tmp_path / "one", cache=tmp_path / "cache")
    storage.delete(code_path(ref))
    assert first > 0
    assert fetch(storage, ref, tmp_path / "two", cache=tmp_path / "cache") == 0
    assert (tmp_path / "two" / "train.py").exists()


@pytest.mark.parametrize(
    "garbage", [b"garbage", b"\x1f\x8b", b"", "truncated", "longer", "of another code"]
)
def test_publishing_again_mends_a_damaged_archive(
    tmp_path: Path, storage: Storage, garbage: bytes | str
) -> None:
    ref = publish(storage, write(tmp_path / "source", train_py="print(1)"))
    good = storage.read(code_path(ref))
    bad = {
        "truncated": good[:-9],
        "longer": good + b"more",
        "of another code": gzip.compress(b"other"),
    }.get(str(garbage), garbage)
    storage.write(code_path(ref), bad if isinstance(bad, bytes) else bad.encode())
    with pytest.raises(CorruptObject, match=r"code/[0-9a-f]{64}.tar.gz is damaged.*again"):
        fetch(storage, ref, tmp_path / "before", cache=tmp_path / "cache")
    assert not (tmp_path / "before").exists()
    assert publish(storage, tmp_path / "source") == ref
    fetch(storage, ref, tmp_path / "code", cache=tmp_path / "cache")
    assert (tmp_path / "code" / "train.py").exists()


def test_an_archive_that_is_far_too_large_is_not_downloaded(
    tmp_path: Path, storage: Storage
) -> None:
    ref = publish(storage, write(tmp_path / "source", train_py="print(1)"))
    storage.write(code_path(ref), bytes(ref.size_bytes * 3))
    with pytest.raises(CorruptObject, match="larger than its content"):
        fetch(storage, ref, tmp_path / "code", cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.gz"))


def test_a_damaged_cache_is_loaded_anew(tmp_path: Path, storage: Storage) -> None:
    ref = publish(storage, write(tmp_path / "code", train_py="x"))
    fetch(storage, ref, tmp_path / "one", cache=tmp_path / "cache")
    kept = tmp_path / "cache" / code_path(ref)
    kept.write_bytes(kept.read_bytes()[:-9])
    assert fetch(storage, ref, tmp_path / "two", cache=tmp_path / "cache") > 0


def test_code_that_is_not_there_is_missing(tmp_path: Path, storage: Storage) -> None:
    with pytest.raises(ObjectMissing):
        fetch(storage, CodeRef(digest="0" * 64, size_bytes=1), tmp_path / "o", cache=tmp_path / "c")


def test_content_that_differs_from_its_name_is_refused(tmp_path: Path, storage: Storage) -> None:
    ref = publish(storage, write(tmp_path / "code", train_py="x"))
    other, _ = pack(write(tmp_path / "other", train_py="evil"))
    storage.write(code_path(ref), gzip.compress(other))
    with pytest.raises(CorruptObject, match="other content"):
        fetch(storage, ref, tmp_path / "out", cache=tmp_path / "cache")
    assert not (tmp_path / "out").exists()


def test_an_archive_that_unpacks_without_end_is_cut_short(tmp_path: Path, storage: Storage) -> None:
    ref = CodeRef(digest="0" * 64, size_bytes=1000)
    storage.write(code_path(ref), gzip.compress(bytes(200_000_000)))
    with pytest.raises(CorruptObject):
        fetch(storage, ref, tmp_path / "out", cache=tmp_path / "cache")


def test_a_digest_that_is_a_path_is_refused(tmp_path: Path, storage: Storage) -> None:
    with pytest.raises(InvalidSpec):
        fetch(storage, CodeRef(digest="../x", size_bytes=1), tmp_path / "o", cache=tmp_path / "c")


@pytest.mark.parametrize(
    "members",
    [
        [(tarfile.TarInfo("/abs"), b"x")],
        [(tarfile.TarInfo("../up"), b"x")],
        [(tarfile.TarInfo("a/../../up"), b"x")],
        [link("out", "/etc/passwd")],
        [link("out", "../elsewhere")],
        [link("d", "."), link("e", "d/../..")],
        [link("folder", "other"), (tarfile.TarInfo("folder/file"), b"x")],
        [link("hard", "../elsewhere", tarfile.LNKTYPE)],
        [link("device", "", tarfile.CHRTYPE)],
        [link("pipe", "", tarfile.FIFOTYPE)],
    ],
    ids=lambda members: members[-1][0].name,
)
def test_a_hostile_archive_unpacks_nothing(
    tmp_path: Path, storage: Storage, members: list[tuple[tarfile.TarInfo, bytes]]
) -> None:
    ref = hostile(storage, (tarfile.TarInfo("train.py"), b"x"), *members)
    with pytest.raises(CorruptObject, match="nothing was unpacked"):
        fetch(storage, ref, tmp_path / "jail" / "out", cache=tmp_path / "cache")
    assert list((tmp_path / "jail").iterdir()) == []


def test_two_members_of_one_name_are_refused(tmp_path: Path, storage: Storage) -> None:
    """The second must not be written through the link that the first one made."""
    file = tarfile.TarInfo("a")
    ref = hostile(storage, link("a", "b"), (file, b"x"))
    with pytest.raises(CorruptObject, match="cannot be unpacked"):
        fetch(storage, ref, tmp_path / "code", cache=tmp_path / "cache")
    assert not (tmp_path / "code").exists()


def test_no_bit_but_the_executable_one_is_taken_from_an_archive(
    tmp_path: Path, storage: Storage
) -> None:
    program, text = tarfile.TarInfo("program"), tarfile.TarInfo("text")
    program.mode, text.mode = 0o6777, 0o1666
    fetch(
        storage, hostile(storage, (program, b"x"), (text, b"x")), tmp_path / "code",
        cache=tmp_path / "cache",
    )  # fmt: skip
    modes = {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "code").iterdir()}
    assert modes == {"program": 0o755, "text": 0o644}
