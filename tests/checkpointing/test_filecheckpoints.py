from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest

import spotfirst.checkpoints.files as implementation
from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.files import FileCheckpoints
from spotfirst.checkpoints.manifest import (
    FileRef,
    FilesManifest,
    PackRef,
    Part,
    read_manifest,
    write_manifest,
)
from spotfirst.checkpoints.packs import chunk_digest
from spotfirst.errors import ClaimLost, CorruptObject, InvalidSpec, StorageUnavailable
from spotfirst.run import Run, create_run
from spotfirst.spec import ResumeFrom
from tests.checkpointing.storages import faulty


class Clock:
    """Wall-clock time of the file system plus what was stepped, and monotonic time."""

    ahead_s = 0.0

    def __call__(self) -> datetime:
        return datetime.now(timezone.utc) + timedelta(seconds=self.ahead_s)

    def monotonic(self) -> float:
        return self.ahead_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def files(files_run: Run, folder: Path, clock: Clock) -> FileCheckpoints:
    checkpoints = _open(files_run, 1, folder, clock)
    checkpoints.restore()
    return checkpoints


def _open(run: Run, attempt: int, folder: Path, clock: Clock, **options: Any) -> FileCheckpoints:
    return FileCheckpoints(run, attempt, folder, clock=clock, monotonic=clock.monotonic, **options)


def _next(run: Run, attempt: int, folder: Path, clock: Clock, **options: Any) -> FileCheckpoints:
    """The attempt after one that released."""
    checkpoints = _open(run, attempt, folder, clock, **options)
    checkpoints.restore()
    return checkpoints


def _tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _commits(run: Run) -> list[tuple[int, Commit]]:
    return run.chain().refresh().commits


def _manifest(run: Run) -> FilesManifest:
    commit = _commits(run)[-1][1]
    manifest = read_manifest(run.packs(), commit.manifest, commit.digest)
    assert isinstance(manifest, FilesManifest)
    return manifest


def _paths(run: Run) -> list[str]:
    return [file.path for file in _manifest(run).files]


def test_a_folder_comes_back_on_the_next_instance(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path, clock: Clock
) -> None:
    (folder / "epochs").mkdir()
    (folder / "epochs" / "1.bin").write_bytes(b"one" * 1000)
    (folder / "empty").touch()
    (folder / "run.sh").write_text("true")
    (folder / "run.sh").chmod(0o755)
    seq = files.capture(final=True)
    files.release()
    (commit,) = _commits(files_run)
    assert commit[0] == seq
    assert (commit[1].step, commit[1].content) == (1, "files")
    other = tmp_path / "other"
    other.mkdir()
    (other / "left-over").write_text("of something else")
    following = _next(files_run, 2, other, clock)
    assert following.step == 1
    assert _tree(other) == _tree(folder)
    assert os.access(other / "run.sh", os.X_OK)
    assert not os.access(other / "empty", os.X_OK)
    assert following.capture(final=True) is None


def test_nothing_is_committed_for_an_empty_or_unchanged_folder(
    files: FileCheckpoints, folder: Path
) -> None:
    assert files.capture(final=True) is None
    (folder / "a").write_text("1")
    assert files.capture(final=True) is not None
    assert files.capture(final=True) is None
    assert files.step == 1


def test_a_file_is_taken_only_when_it_has_settled(
    files: FileCheckpoints, folder: Path, clock: Clock
) -> None:
    (folder / "a").write_text("1")
    assert files.capture() is None
    clock.ahead_s += 0.9
    assert files.capture() is None
    clock.ahead_s += 0.2
    assert files.capture() is not None


def test_a_changing_file_stays_as_it_was_captured(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path, clock: Clock
) -> None:
    (folder / "model").write_text("old")
    files.capture(final=True)
    clock.ahead_s -= 5
    (folder / "model").write_text("half of the new")
    (folder / "log").write_text("a line")
    os.utime(folder / "log", (0, 0))
    assert files.capture() is None  # the log's inode changed just now
    clock.ahead_s += 10
    (folder / "model").write_text("half of the new, and more")
    clock.ahead_s = 0.0
    files.release()
    other = tmp_path / "other"
    _next(files_run, 2, other, clock)
    assert _tree(other) == {"model": b"old"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux' /proc")
def test_a_file_that_a_process_has_open_for_writing_is_half_written_however_old(
    files: FileCheckpoints, folder: Path, clock: Clock
) -> None:
    path = folder / "model"
    code = (
        "import sys; f = open(sys.argv[1], 'wb', 0); f.write(b'half'); print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        clock.ahead_s += 1000
        assert files.capture() is None
        with path.open("rb"):  # reading is no reason to wait
            writer.communicate(b"\n")
            assert files.capture() is not None


def test_a_file_that_changes_while_it_is_read_is_not_taken(
    files: FileCheckpoints, files_run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
) -> None:  # fmt: skip
    path = folder / "model"
    path.write_bytes(b"x" * 100)
    readinto = io.FileIO.readinto

    class Slow(io.FileIO):
        def readinto(self, target: Any) -> int:
            size = readinto(self, target)
            time.sleep(0.02)  # the file system's clock ticks every few milliseconds
            path.write_bytes(b"x" * 100)
            return size

    monkeypatch.setattr(
        implementation, "open", lambda handle, *_, **__: Slow(handle, "rb"), raising=False
    )
    clock.ahead_s += 10
    assert files.capture() is None
    assert files.capture(final=True) is None
    assert any("still being written" in warning for warning in files.warnings)


def test_deleted_files_are_deleted_in_the_checkpoint(
    files: FileCheckpoints, files_run: Run, folder: Path
) -> None:
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")
    files.capture(final=True)
    (folder / "a").unlink()
    files.capture(final=True)
    assert _paths(files_run) == ["b"]


def test_a_file_that_did_not_change_is_not_moved_again(
    files: FileCheckpoints, files_run: Run, folder: Path
) -> None:
    (folder / "big").write_bytes(os.urandom(100_000))
    files.capture(final=True)
    (folder / "small").write_text("1")
    files.capture(final=True)
    first, second = (commit.new_bytes for _, commit in _commits(files_run))
    assert first > 100_000
    assert second < 2_000


def test_large_files_have_several_parts(files_run: Run, folder: Path, tmp_path: Path) -> None:
    files = _next(files_run, 1, folder, Clock(), chunk_bytes=1000)
    (folder / "big").write_bytes(os.urandom(2500))
    files.capture(final=True)
    files.release()
    (file,) = _manifest(files_run).files
    assert [part.size_bytes for part in file.parts] == [1000, 1000, 500]
    _next(files_run, 2, tmp_path / "other", Clock())
    assert _tree(tmp_path / "other") == _tree(folder)


def test_links_and_special_files_are_left_out_with_a_warning(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path
) -> None:
    (folder / "real").write_text("1")
    (folder / "link").symlink_to("/etc/hostname")
    (folder / "folder").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    files.capture(final=True)
    assert _paths(files_run) == ["real"]
    assert len(files.warnings) == 3


def test_a_link_in_the_folder_does_not_lead_the_restore_outside(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path, clock: Clock
) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "a").write_text("from the checkpoint")
    files.capture(final=True)
    files.release()
    outside, other = tmp_path / "outside", tmp_path / "other"
    outside.mkdir()
    (outside / "a").write_text("precious")
    other.mkdir()
    (other / "sub").symlink_to(outside)
    _next(files_run, 2, other, clock)
    assert (outside / "a").read_text() == "precious"
    assert _tree(other) == {"sub/a": b"from the checkpoint"}


def test_a_damaged_checkpoint_is_passed_over_and_leaves_the_folder_whole(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path, clock: Clock
) -> None:
    (folder / "a").write_text("first")
    files.capture(final=True)
    (folder / "a").write_text("second")
    (folder / "b").write_text("more")
    files.capture(final=True)
    files.release()
    newest = _manifest(files_run).packs[-1].name
    files_run.packs().write(newest, b"evil" * 100)
    following = _next(files_run, 2, tmp_path / "other", clock)
    assert _tree(tmp_path / "other") == {"a": b"first"}
    assert (following.step, len(following.warnings)) == (1, 1)
    assert list(tmp_path.glob(".*restoring")) == []


def _files(*paths: str, part: Part | None = None) -> FilesManifest:
    parts = () if part is None else (part,)
    size = 0 if part is None else part.size_bytes
    return FilesManifest(
        packs=(PackRef(name="00000001/000001-00000-000000", size_bytes=4),),
        files=tuple(FileRef(path=path, size_bytes=size, parts=parts) for path in paths),
    )


_EVIL = chunk_digest(memoryview(b"evil"))

HOSTILE = {
    "above": _files("../evil"),
    "far above": _files("a/../../evil"),
    "absolute": _files("/tmp/evil"),
    "the folder itself": _files("."),
    "twice": _files("evil", "evil"),
    "a file and a folder": _files("evil", "evil/more"),
    "not in its plain form": _files("./evil"),
    "outside of the pack": _files("evil", part=Part(pack=0, offset=2, size_bytes=4, digest=_EVIL)),
    "before the pack": _files("evil", part=Part(pack=0, offset=-1, size_bytes=4, digest=_EVIL)),
    "no such pack": _files("evil", part=Part(pack=1, offset=0, size_bytes=4, digest=_EVIL)),
    "other bytes": _files(
        "evil", part=Part(pack=0, offset=0, size_bytes=4, digest=chunk_digest(memoryview(b"good")))
    ),
    "a pack elsewhere": msgspec.structs.replace(
        _files("evil", part=Part(pack=0, offset=0, size_bytes=4, digest=_EVIL)),
        packs=(PackRef(name="../spec.json", size_bytes=4),),
    ),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_a_hostile_manifest_is_corrupt_and_changes_nothing(
    how: str, files_run: Run, tmp_path: Path, clock: Clock
) -> None:
    files_run.packs().write("00000001/000001-00000-000000", b"evil")
    digest, _ = write_manifest(files_run.packs(), "00000001/000001.json", HOSTILE[how])
    chain = files_run.chain()
    chain.claim(1)
    chain.commit(1, step=1, manifest="00000001/000001.json", digest=digest, content="files")
    chain.release(1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("as it was")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CorruptObject):
        _next(files_run, 2, other, clock)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_can_start_from_another_runs_files(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path, clock: Clock
) -> None:
    (folder / "a").write_text("parent's")
    seq = files.capture(final=True)
    assert seq is not None
    source = ResumeFrom(run_id="f", step=1, seq=seq)
    spec = msgspec.structs.replace(files_run.spec(), run_id="replay", resume_from=source)
    replay = create_run(files_run.root, spec)
    first = _next(replay, 1, tmp_path / "one", clock)
    assert (tmp_path / "one" / "a").read_text() == "parent's"
    assert first.capture(final=True) is not None
    first.release()
    for path, _ in list(files_run.storage.walk("")):
        files_run.storage.delete(path)
    second = _next(replay, 2, tmp_path / "two", clock)
    assert (tmp_path / "two" / "a").read_text() == "parent's"
    assert second.step == 2


def test_an_answer_that_was_lost_is_settled_by_the_next_capture(
    files_run: Run, folder: Path, clock: Clock
) -> None:
    lost: list[str] = []

    def lose(verb: str, path: str) -> None:
        if verb == "create" and path == "checkpoints/00000002.json" and not lost:
            lost.append(path)
            raise StorageUnavailable(path)

    files = _next(Run(faulty(files_run.root, after=lose), "f"), 1, folder, clock)
    (folder / "a").write_text("1")
    with pytest.raises(StorageUnavailable):
        files.capture(final=True)
    assert files.capture(final=True) == 2
    assert files.capture(final=True) is None
    (folder / "a").write_text("2")
    assert files.capture(final=True) == 3
    assert [commit.step for _, commit in _commits(files_run)] == [1, 2]


def test_an_attempt_that_lost_its_claim_captures_no_more(
    files: FileCheckpoints, files_run: Run, folder: Path
) -> None:
    files_run.chain().claim(2)
    (folder / "a").write_text("1")
    with pytest.raises(ClaimLost):
        files.capture(final=True)


def test_a_run_of_training_states_refuses_to_be_restored_as_files(
    files_run: Run, folder: Path, clock: Clock
) -> None:
    chain = files_run.chain()
    chain.claim(1)
    chain.commit(1, step=1, manifest="00000001/000001.json", digest="0" * 64, content="state")
    chain.release(1)
    with pytest.raises(InvalidSpec, match="checkpoint mode"):
        _next(files_run, 2, folder, clock)


def test_one_that_is_told_to_leave_restores_nothing(
    files_run: Run, folder: Path, clock: Clock
) -> None:
    files_run.chain().claim(1)
    assert _open(files_run, 2, folder, clock).restore(leave=lambda: True) is None
