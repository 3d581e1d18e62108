from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
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
    FolderRef,
    LinkRef,
    PackRef,
    Part,
    read_manifest,
    write_manifest,
)
from spotfirst.checkpoints.mirroring import mirror
from spotfirst.checkpoints.packs import chunk_digest
from spotfirst.checkpoints.retention import Retention
from spotfirst.checkpoints.staging import read_at as read_at_plainly
from spotfirst.errors import ClaimLost, CorruptObject, InvalidSpec, StorageUnavailable
from spotfirst.run import Run, create_run
from spotfirst.spec import ResumeFrom, RunSpec
from spotfirst.storage import Storage, open_storage
from tests.checkpointing.conftest import LONG_AGO
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


@contextlib.contextmanager
def _frozen() -> Iterator[set[int]]:
    """As if all that may write stood still: in these tests nothing runs beside."""
    yield {os.getpid()}


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
    clock.ahead_s += 0.2  # time passes on the real clock as well, on a busy machine much
    assert files.capture() is None
    clock.ahead_s += 0.9
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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux' /proc")
def test_what_a_script_was_writing_when_it_was_stopped_is_kept_as_it_was(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path
) -> None:
    (folder / "model").write_text("whole")
    files.capture(final=True)
    with (
        (folder / "model").open("w") as model,
        (folder / "new").open("w") as new,
        (folder / "log").open("a") as log,
    ):
        for file in (model, new, log):
            file.write("a line\n")
            file.flush()
        files.note_writers()
    (folder / "saved on SIGTERM").write_text("whole")
    files.capture(final=True)
    mirror(files_run.packs(), _commits(files_run)[-1][1], tmp_path / "other")
    assert _tree(tmp_path / "other") == {
        "model": b"whole", "log": b"a line\n", "saved on SIGTERM": b"whole"
    }  # fmt: skip
    assert len(files.warnings) == 2
    files.forget_writers()
    files.capture(final=True)
    assert _paths(files_run) == ["log", "model", "new", "saved on SIGTERM"]


def test_what_the_first_of_two_signals_cut_off_is_still_half_written_after_the_second(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path
) -> None:
    (folder / "model").write_text("whole")
    files.capture(final=True)
    with (folder / "model").open("w") as model:
        model.write("half")
        model.flush()
        files.note_writers()
    files.note_writers()  # another process lived on
    (folder / "other").write_text("whole")
    files.capture(final=True)
    mirror(files_run.packs(), _commits(files_run)[-1][1], tmp_path / "other")
    assert _tree(tmp_path / "other") == {"model": b"whole", "other": b"whole"}


def _changing(monkeypatch: pytest.MonkeyPatch, path: Path) -> list[int]:
    """Every read of a file's beginning is followed by a change; the reads."""
    reads: list[int] = []

    def read_at(descriptor: int, offset: int, target: memoryview) -> int:
        size = read(descriptor, offset, target)
        reads.append(size)
        before = path.stat().st_mtime_ns
        while path.stat().st_mtime_ns == before:  # the file system's clock ticks slowly
            path.write_bytes(b"y" * path.stat().st_size)
        return size

    read = read_at_plainly
    monkeypatch.setattr(implementation, "read_at", read_at)
    return reads


def test_a_file_that_changes_while_it_is_read_is_not_taken(
    files: FileCheckpoints, folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    path = folder / "model"
    path.write_bytes(b"x" * (2 << 20))
    reads = _changing(monkeypatch, path)
    clock.ahead_s += 10
    assert files.capture() is None
    assert files.capture(final=True) is None
    assert reads
    assert any("still being written" in warning for warning in files.warnings)


def test_a_large_file_that_changes_once_its_writer_runs_on_is_copied_while_it_stands_still(
    files_run: Run, folder: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = _open(files_run, 1, folder, clock, freeze=_frozen)
    files.restore()
    (folder / "model").write_bytes(b"x" * (2 << 20))
    reads = _changing(monkeypatch, folder / "model")
    assert files.capture() is not None
    assert reads
    mirror(files_run.packs(), _commits(files_run)[-1][1], tmp_path / "other")
    assert set(_tree(tmp_path / "other")["model"]) == {ord("y")}


def test_deleted_files_are_deleted_in_the_checkpoint(
    files: FileCheckpoints, files_run: Run, folder: Path
) -> None:
    (folder / "a").write_text("1")
    (folder / "b").write_text("2")
    files.capture(final=True)
    (folder / "a").unlink()
    files.capture(final=True)
    assert _paths(files_run) == ["b"]


def test_what_is_gone_stays_until_what_may_replace_it_is_taken(
    files: FileCheckpoints, files_run: Run, folder: Path, clock: Clock
) -> None:
    (folder / "1.pt").write_text("1")
    (folder / "log").write_text("a")
    files.capture(final=True)
    (folder / "2.pt").write_text("2")
    (folder / "1.pt").unlink()
    (folder / "log").write_text("ab")
    os.utime(folder / "log")
    files.capture()
    assert _paths(files_run) == ["1.pt", "log"]
    clock.ahead_s += 2
    files.capture()
    assert _paths(files_run) == ["2.pt", "log"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux' /proc")
def test_a_log_that_is_open_for_ever_does_not_keep_what_is_gone(
    files: FileCheckpoints, files_run: Run, folder: Path, clock: Clock
) -> None:
    (folder / "1.pt").write_text("1")
    with (folder / "log").open("w"):
        clock.ahead_s += 2
        files.capture()
        clock.ahead_s += 61
        (folder / "1.pt").unlink()
        (folder / "2.pt").write_text("2")
        os.utime(folder / "2.pt")
        clock.ahead_s += 61
        files.capture()
    assert _paths(files_run) == ["2.pt", "log"]


def test_what_is_gone_makes_way_for_a_folder_of_its_name(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path, clock: Clock
) -> None:
    (folder / "a").write_text("1")
    (folder / "b").mkdir()
    (folder / "b" / "c").write_text("1")
    (folder / "d").write_text("1")
    files.capture(final=True)
    (folder / "a").unlink()
    (folder / "a").mkdir()
    (folder / "a" / "x").write_text("2")
    (folder / "b" / "c").unlink()
    (folder / "b").rmdir()
    (folder / "b").write_text("2")
    (folder / "d").unlink()
    files.capture()
    files.release()
    _next(files_run, 2, tmp_path / "other", clock)
    assert _tree(tmp_path / "other") == {"d": b"1"}


def test_a_file_that_is_replaced_all_the_time_is_taken_whole(
    files_run: Run, folder: Path, tmp_path: Path, clock: Clock
) -> None:
    running = threading.Lock()

    @contextlib.contextmanager
    def freeze() -> Iterator[set[int]]:
        with running:
            yield {os.getpid()}

    files = _open(files_run, 1, folder, clock, freeze=freeze)
    files.restore()

    def replace(number: int) -> None:
        for data in (bytes([number]) * 100_000,) * 2:
            with running, (tmp_path / "partial").open("ab") as partial:
                partial.write(data)
        (tmp_path / "partial").replace(folder / "latest.pt")

    replace(0)
    stop = threading.Event()

    def write() -> None:
        for number in itertools.cycle(range(1, 256)):
            replace(number)
            if stop.is_set():
                return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seqs: set[int | None] = set()
        give_up = time.monotonic() + 120
        while len(seqs - {None}) < 3 and time.monotonic() < give_up:
            seqs.add(files.capture())
    finally:
        stop.set()
        writer.join()
    assert len(seqs - {None}) >= 3
    files.release()
    _next(files_run, 2, tmp_path / "other", clock)
    (data,) = _tree(tmp_path / "other").values()
    assert len(data) == 200_000
    assert len(set(data)) == 1


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux' /proc")
def test_a_new_file_in_place_of_another_is_not_taken_while_it_is_written(
    files: FileCheckpoints, folder: Path
) -> None:
    (folder / "latest.pt").write_text("whole")
    files.capture(final=True)
    (folder / "latest.pt").rename(folder.parent / "keeps-the-inode")
    with (folder / "latest.pt").open("w") as file:
        file.write("ha")
        file.flush()
        assert files.capture() is None


def test_appending_to_a_large_file_moves_what_was_appended(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path, clock: Clock
) -> None:
    data = os.urandom(5 << 20)
    (folder / "log").write_bytes(data)
    files.capture(final=True)
    with (folder / "log").open("ab") as log:
        log.write(b"x" * 1000)
    files.capture(final=True)
    with (folder / "log").open("r+b") as log:
        log.seek(2_500_000)
        log.write(b"in the middle")
    files.capture(final=True)
    first, second, third = (commit.new_bytes for _, commit in _commits(files_run))
    assert first > 5 << 20
    assert second < 5_000
    assert 1 << 20 < third < (1 << 20) + 5_000
    files.release()
    _next(files_run, 2, tmp_path / "other", clock)
    assert _tree(tmp_path / "other") == _tree(folder)


def test_the_packs_of_checkpoints_that_are_not_kept_go(
    storage: Storage, folder: Path, clock: Clock
) -> None:
    spec = RunSpec(
        run_id="f", created_at=LONG_AGO, command=("train",), checkpoint_mode="files",
        retention=Retention(last=2),
    )  # fmt: skip
    run = create_run(storage, spec)
    files = _next(run, 1, folder, clock)
    stays = os.urandom(3_000_000)
    (folder / "stays").write_bytes(stays)
    for number in range(6):
        (folder / "model").write_bytes(os.urandom(1_000_000))
        (folder / "step").write_text(f"{number}")
        files.capture(final=True)
    assert [commit.step for _, commit in _commits(run)] == [5, 6]
    bytes_ = {name: size for name, size in run.packs().walk("") if not name.endswith(".json")}
    named = set[str]()
    for _, commit in _commits(run):
        manifest = read_manifest(run.packs(), commit.manifest, commit.digest)
        named |= {pack.name for pack in manifest.packs}
    assert set(bytes_) == named
    assert len([name for name, _ in run.packs().walk("") if name.endswith(".json")]) == 2
    assert sum(bytes_.values()) < 6_100_000  # the first model is in the pack of what stays


def test_a_pack_is_not_kept_for_the_little_of_it_that_is_in_use(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path, clock: Clock
) -> None:
    for number in range(20):
        (folder / "model").write_bytes(os.urandom(900_000))
        (folder / f"result-{number}").write_bytes(os.urandom(10_000))
        files.capture(final=True)
    live = sum(file.size_bytes for file in _manifest(files_run).files)
    assert sum(pack.size_bytes for pack in _manifest(files_run).packs) <= 2 * live
    files.release()
    _next(files_run, 2, tmp_path / "other", clock)
    assert _tree(tmp_path / "other") == _tree(folder)


def _storm(files_run: Run, folder: Path, tmp_path: Path, clock: Clock, fault: Fault) -> bool:
    """Captures with one failure; whether it happened. Whatever it was, nothing is lost."""
    spec = msgspec.structs.replace(files_run.spec(), retention=Retention(last=1))
    run = create_run(faulty(files_run.root, before=fault.before, after=fault.after), spec)
    files = _next(run, 1, folder, clock, chunk_bytes=1000)
    (folder / "stays").write_bytes(os.urandom(2500))
    (folder / "changes").write_bytes(os.urandom(2500))
    (folder / "goes").write_bytes(b"1")
    files.capture(final=True)
    first = _tree(folder)
    (folder / "changes").write_bytes(os.urandom(2500))
    (folder / "goes").unlink()
    fault.begin()
    failed = False
    try:
        files.capture(final=True)
    except StorageUnavailable:
        failed = True
    fault.end()
    peek = tmp_path / "peek"
    # As a successor would find it that claimed now.
    mirror(files_run.packs(), _commits(files_run)[-1][1], peek)
    before = _commits(files_run)[-1][1].step
    assert _tree(peek) == (_tree(folder) if before == 2 else first)
    assert failed or before == 2
    (folder / "late").write_bytes(os.urandom(1500))
    files.capture(final=True)
    files.release()
    following = _next(files_run, 2, tmp_path / "other", clock)
    assert following.step == before + 1
    assert _tree(tmp_path / "other") == _tree(folder)
    assert following.warnings == ()
    return failed


class Fault:
    """The n-th storage call of the run fails, before or after it was applied."""

    def __init__(self, number: int, *, applied: bool) -> None:
        self._number, self._applied = number, applied
        self._calls = 0
        self._is_on = False

    def begin(self) -> None:
        self._is_on = True

    def end(self) -> None:
        self._is_on = False

    def before(self, verb: str, path: str) -> None:
        self._calls += self._is_on
        if not self._applied:
            self._fail(verb, path)

    def after(self, verb: str, path: str) -> None:
        if self._applied:
            self._fail(verb, path)

    @property
    def calls(self) -> int:
        return self._calls

    def _fail(self, verb: str, path: str) -> None:
        if self._is_on and self._calls == self._number:
            msg = f"{verb} {path}"
            raise StorageUnavailable(msg)


@pytest.mark.parametrize("applied", [False, True])
def test_whichever_call_of_a_capture_fails_the_next_one_goes_on(
    applied: bool, tmp_path: Path, clock: Clock
) -> None:
    failures = 0
    for number in itertools.count(1):
        fault = Fault(number, applied=applied)
        place = tmp_path / f"{number}"
        (place / "files").mkdir(parents=True)
        spec = RunSpec(
            run_id="f", created_at=LONG_AGO, command=("train",), checkpoint_mode="files",
            retention=Retention(last=1),
        )  # fmt: skip
        run = create_run(open_storage(f"memory://{secrets.token_hex(8)}"), spec)
        failures += _storm(run, place / "files", place, clock, fault)
        if fault.calls < number:
            break
    assert failures >= 3  # the pack, the manifest and the commit; cleaning up may fail silently
    assert number > 5


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


@pytest.mark.parametrize(
    ("before", "after", "is_further"),
    [
        ({}, {"run.log": "a"}, False),
        ({}, {"model": "a"}, True),
        ({"model": "a"}, {"model": "a"}, False),  # written again
        ({"model": "a"}, {"model": "b"}, True),
        ({"model": "a"}, {"model": "a", "run.log": "b", "events.out.tfevents.1": "c"}, False),
        ({"model": "a", "metrics.csv": "1"}, {"model": "a", "metrics.csv": "12"}, False),
        ({"model": "a"}, {"model": "a", "results.csv": "1"}, False),
        ({"results.csv": "1"}, {"results.csv": "12"}, True),  # all that it makes
        ({"model": "a", "study.db": "1"}, {"model": "a", "study.db": "2"}, True),
        ({"step-1": "a", "step-2": "b"}, {"step-2": "b"}, False),
        ({"step-1": "a"}, {"step-2": "a"}, True),
    ],
)
def test_the_step_grows_only_when_more_than_logs_has_changed(
    files: FileCheckpoints, folder: Path, before: dict[str, str], after: dict[str, str],
    is_further: bool,
) -> None:  # fmt: skip
    def write(content: dict[str, str]) -> None:
        for old in folder.iterdir():
            if old.name not in content:
                old.unlink()
        for name, text in content.items():
            (folder / name).write_text(text)
        files.capture(final=True)

    write(before)
    step = files.step
    write(after)
    assert files.step == step + is_further


def test_large_files_have_several_parts(files_run: Run, folder: Path, tmp_path: Path) -> None:
    files = _next(files_run, 1, folder, Clock(), chunk_bytes=1000)
    (folder / "big").write_bytes(os.urandom(2500))
    files.capture(final=True)
    files.release()
    (file,) = _manifest(files_run).files
    assert [part.size_bytes for part in file.parts] == [1000, 1000, 500]
    _next(files_run, 2, tmp_path / "other", Clock())
    assert _tree(tmp_path / "other") == _tree(folder)


def test_a_path_that_is_too_long_for_the_next_instance_is_left_out_with_a_warning(
    files: FileCheckpoints, files_run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "model").write_text("whole")
    monkeypatch.chdir(folder)
    for _ in range(20):
        os.mkdir("x" * 180)  # noqa: PTH102 - the whole path would be too long for mkdir
        os.chdir("x" * 180)
    Path("deep").write_text("lost")
    files.capture(final=True)
    assert _paths(files_run) == ["model"]
    assert any("path is too long" in warning for warning in files.warnings)


def test_special_permissions_of_a_folder_are_a_warning(
    files: FileCheckpoints, folder: Path
) -> None:
    (folder / "shared").mkdir()
    (folder / "shared").chmod(0o1777)
    files.capture(final=True)
    assert "'shared' has special permissions" in files.warnings[-1]


def test_special_files_and_links_out_of_the_folder_are_left_out_with_a_warning(
    files: FileCheckpoints, files_run: Run, folder: Path, tmp_path: Path
) -> None:
    (folder / "real").write_text("1")
    (folder / "link").symlink_to("/etc/hostname")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "up").symlink_to("../elsewhere")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    files.capture(final=True)
    assert _paths(files_run) == ["real"]
    assert _manifest(files_run).links == ()
    assert len(files.warnings) == 5


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

_PLAIN = _files("evil")
_BYTES = FileRef(
    path="a", size_bytes=4, parts=(Part(pack=0, offset=0, size_bytes=4, digest=_EVIL),), link=1
)


def _changed(**fields: Any) -> FilesManifest:
    return msgspec.structs.replace(_PLAIN, **fields)


HOSTILE |= {
    "a link outside": _changed(links=(LinkRef(path="a", target="../x"),)),
    "an absolute link": _changed(links=(LinkRef(path="a", target="/etc/passwd"),)),
    "a link that goes up behind a name": _changed(links=(LinkRef(path="a", target="b/../../x"),)),
    "a file through a link": _changed(
        files=_files("a/evil").files, links=(LinkRef(path="a", target="."),)
    ),
    "a folder through a link": _changed(
        links=(LinkRef(path="a", target="."),), folders=(FolderRef(path="a/b"),)
    ),
    "a link above": _changed(links=(LinkRef(path="../a", target="x"),)),
    "a folder above": _changed(folders=(FolderRef(path="../a"),)),
    "a link in the place of a file": _changed(links=(LinkRef(path="evil", target="x"),)),
    "set-uid": _changed(files=(FileRef(path="a", size_bytes=0, mode=0o4755),)),
    "a mode below 0": _changed(folders=(FolderRef(path="a", mode=-1),)),
    "a time out of this world": _changed(files=(FileRef(path="a", size_bytes=0, mtime_ns=2**63),)),
    "a hole behind the end": _changed(files=(FileRef(path="a", size_bytes=4, holes=((2, 3),)),)),
    "holes that overlap": _changed(
        files=(FileRef(path="a", size_bytes=9, holes=((0, 5), (4, 5))),)
    ),
    "a hole before the beginning": _changed(
        files=(FileRef(path="a", size_bytes=4, holes=((-4, 8),)),)
    ),
    "a part across a hole": _changed(
        files=(msgspec.structs.replace(_BYTES, size_bytes=8, holes=((2, 4),)),)
    ),
    "too large": _changed(files=(FileRef(path="a", size_bytes=1 << 60, holes=((0, 1 << 60),)),)),
    "one file with two contents": _changed(files=(_BYTES, FileRef(path="b", size_bytes=0, link=1))),
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
