"""What files mode keeps of a folder at one instant, while others write to it."""

from __future__ import annotations

import contextlib
import io
import mmap
import os
import pickle
import sqlite3
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst.checkpoints import staging
from spotfirst.checkpoints.containers import wholeness
from spotfirst.checkpoints.files import FileCheckpoints
from spotfirst.checkpoints.foldersets import FolderSets, Unit, missing_shards, unit_of
from spotfirst.checkpoints.manifest import FilesManifest, read_manifest, stays_inside
from spotfirst.checkpoints.mirroring import mirror
from spotfirst.run import Run
from tests.checkpointing.test_filecheckpoints import Clock

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="who writes is seen in Linux' /proc"
)

PERIOD_S = 30.0


class Box:
    """A folder whose script is this very process; it stands still while a capture is made."""

    def __init__(self, run: Run, folder: Path, others: Path) -> None:
        self.run, self.folder, self.others = run, folder, others
        self.clock = Clock()
        self.attempts = 0
        self.files = self.next_on(folder)

    def next_on(self, folder: Path) -> FileCheckpoints:
        @contextlib.contextmanager
        def freeze() -> Iterator[set[int]]:
            yield {os.getpid()}

        self.attempts += 1
        files = FileCheckpoints(
            self.run, self.attempts, folder, clock=self.clock, monotonic=self.clock.monotonic,
            freeze=freeze,
        )  # fmt: skip
        files.restore()
        return files

    def capture(self, times: int = 1, *, after_s: float = PERIOD_S) -> None:
        for _ in range(times):
            self.clock.ahead_s += after_s
            self.files.capture()

    def kept(self) -> Path:
        """The newest checkpoint, as an instance would get it that came now."""
        self.others.mkdir(exist_ok=True)
        place = self.others / f"{len(list(self.others.iterdir()))}"
        commits = self.run.chain().refresh().commits
        if commits:
            mirror(self.run.packs(), commits[-1][1], place)
        else:
            place.mkdir()
        return place

    def names(self) -> list[str]:
        kept = self.kept()
        return sorted(p.relative_to(kept).as_posix() for p in kept.rglob("*") if not p.is_dir())

    def manifest(self) -> FilesManifest:
        commit = self.run.chain().refresh().commits[-1][1]
        found = read_manifest(self.run.packs(), commit.manifest, commit.digest)
        assert isinstance(found, FilesManifest)
        return found


@pytest.fixture
def box(files_run: Run, folder: Path, tmp_path: Path) -> Box:
    return Box(files_run, folder, tmp_path / "others")


# -- files that are open ---------------------------------------------------------------------


def _zip(size: int = 1000) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("data.pkl", os.urandom(size))
        archive.writestr("data/0", os.urandom(size))
    return data.getvalue()


def _safetensors(size: int = 1000) -> bytes:
    head = msgspec.json.encode({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    return struct.pack("<Q", len(head)) + head + os.urandom(size)


def _npy() -> bytes:
    numpy = pytest.importorskip("numpy")
    data = io.BytesIO()
    numpy.save(data, numpy.arange(500.0))
    return data.getvalue()


CHECKPOINTS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "torch.save": ("ckpt.pt", _zip),
    "safetensors": ("model.safetensors", _safetensors),
    "pickle": ("model.joblib", lambda: pickle.dumps([os.urandom(100)] * 10)),
    "numpy": ("model.npy", _npy),
    "anything": ("model.bin", lambda: os.urandom(1000)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_file_that_is_being_rewritten_keeps_its_previous_version(
    box: Box, kind: str, share: float
) -> None:
    name, make = CHECKPOINTS[kind]
    before, after = make(), make()
    (box.folder / name).write_bytes(before)
    box.capture()
    with (box.folder / name).open("wb", buffering=0) as file:
        file.write(after[: int(len(after) * share)])
        box.capture()
        assert (box.kept() / name).read_bytes() == before
        file.write(after[int(len(after) * share) :])
    box.capture()
    assert (box.kept() / name).read_bytes() == after


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_file_that_is_being_written_for_the_first_time_is_not_kept_in_part(
    box: Box, kind: str
) -> None:
    name, make = CHECKPOINTS[kind]
    data = make()
    with (box.folder / name).open("wb", buffering=0) as file:
        file.write(data[: len(data) // 2])
        box.capture()
        assert box.names() == []
        file.write(data[len(data) // 2 :])
    box.capture()
    assert (box.kept() / name).read_bytes() == data


@pytest.mark.parametrize("kind", ["torch.save", "safetensors"])
def test_a_slow_save_is_not_taken_for_a_log_where_its_format_tells(box: Box, kind: str) -> None:
    name, make = CHECKPOINTS[kind]
    data = make()
    with (box.folder / name).open("wb", buffering=0) as file:
        for at in range(0, len(data) - 100, 100):
            file.write(data[at : at + 100])
            box.capture(after_s=500)
            assert box.names() == []


def test_a_save_that_takes_minutes_is_not_taken_for_a_log_while_it_grows_fast(box: Box) -> None:
    with (box.folder / "model.bin").open("wb", buffering=0) as file:
        for _ in range(5):
            file.write(os.urandom(4 << 20))
            box.capture(after_s=3)
            assert box.names() == []


def test_a_save_that_is_repeated_to_the_same_file_is_not_taken_for_a_log(box: Box) -> None:
    whole = os.urandom(1000)
    (box.folder / "model.bin").write_bytes(whole)
    box.capture()
    for number in range(10):  # at every look it is open, with the same descriptor
        file = (box.folder / "model.bin").open("wb", buffering=0)
        file.write(os.urandom(10 * number))
        box.capture(after_s=60)
        assert (box.kept() / "model.bin").read_bytes() == whole
        file.close()


@pytest.mark.parametrize("mode", ["w", "a", "x", "w+", "r+"])
def test_a_log_that_stays_open_is_kept_up_to_where_it_came(box: Box, mode: str) -> None:
    if mode == "r+":
        (box.folder / "metrics.csv").touch()
    with (box.folder / "metrics.csv").open(mode) as log:
        for number in range(5):
            log.write(f"{number},0.1\n")
            log.flush()
            box.capture(after_s=6)
        assert (box.kept() / "metrics.csv").read_text().count("\n") == 5


def test_a_log_that_is_begun_anew_replaces_the_old_one_after_a_while(box: Box) -> None:
    (box.folder / "metrics.csv").write_text("old\n" * 100)
    box.capture()
    with (box.folder / "metrics.csv").open("w") as log:
        log.write("new\n")
        log.flush()
        box.capture()
        assert (box.kept() / "metrics.csv").read_text() == "old\n" * 100
        box.capture(2)
        assert (box.kept() / "metrics.csv").read_text() == "new\n"


def test_memory_that_is_mapped_to_a_file_is_kept_as_of_the_instant(box: Box) -> None:
    path = box.folder / "rows.dat"
    path.write_bytes(bytes(1 << 16))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        for number in range(1, 4):
            mapped[number * 4096] = number  # its time of change may stay as it is
            box.capture()
            assert (box.kept() / "rows.dat").read_bytes() == bytes(mapped)


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "wal"])
def test_a_database_is_kept_with_its_journal(box: Box, journal: str) -> None:
    def kept_rows() -> int:
        with contextlib.closing(sqlite3.connect(box.kept() / "study.db")) as copy:
            assert copy.execute("pragma integrity_check").fetchone() == ("ok",)
            (count,) = copy.execute("select count(*) from rows").fetchone()
            return int(count)

    with contextlib.closing(sqlite3.connect(box.folder / "study.db")) as database:
        database.execute(f"pragma journal_mode={journal}")
        database.execute("create table rows (number integer primary key, text text)")
        database.commit()
        database.execute("pragma cache_size=5")
        for number in range(6):
            # A transaction that is larger than the cache has half of its pages in the file.
            database.executemany("insert into rows (text) values (?)", [("x" * 900,)] * 100)
            box.capture(after_s=1)
            assert kept_rows() == 100 * number
            database.commit()
    box.capture(after_s=1)
    assert kept_rows() == 600


def test_a_database_that_is_being_replaced_stays_with_the_journal_that_it_had(box: Box) -> None:
    for name, data in (("a.db", b"old"), ("a.db-journal", b"old journal")):
        (box.folder / name).write_bytes(data)
    box.capture()
    with (box.folder / "a.db").open("wb", buffering=0) as file:
        file.write(b"half")
        (box.folder / "a.db-journal").write_bytes(b"new journal")
        box.capture()
        kept = box.kept()
        assert (kept / "a.db").read_bytes() == b"old"
        assert (kept / "a.db-journal").read_bytes() == b"old journal"


def test_a_large_file_that_changes_in_place_moves_what_changed(box: Box) -> None:
    data = bytearray(os.urandom(40 << 20))
    path = box.folder / "table.bin"
    path.write_bytes(data)
    box.capture()
    with path.open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as mapped:
        for number in range(3):
            data[number << 22 : (number << 22) + 4] = b"abcd"
            mapped[number << 22 : (number << 22) + 4] = b"abcd"
            box.capture()
            assert (box.kept() / "table.bin").read_bytes() == bytes(data)
    new = [commit.new_bytes for _, commit in box.run.chain().refresh().commits]
    assert new[0] > 40 << 20
    assert all(count < (1 << 20) + 20_000 for count in new[1:])


def test_more_than_fits_into_memory_is_copied_to_a_file_beside_the_folder(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_MEMORY_BYTES", 3 << 20)
    data = os.urandom((7 << 20) + 5)
    with (box.folder / "log").open("ab", buffering=0) as file:
        file.write(data)
        box.capture()
    assert (box.kept() / "log").read_bytes() == data
    assert sorted(path.name for path in box.folder.parent.iterdir()) == ["files", "others"]


def test_what_cannot_be_copied_in_time_is_a_warning_and_the_last_capture_stands(
    files_run: Run, folder: Path, tmp_path: Path
) -> None:
    @contextlib.contextmanager
    def freeze() -> Iterator[set[int]]:
        yield {os.getpid()}

    files = FileCheckpoints(files_run, 1, folder, freeze=freeze, most_pause_s=-1.0)
    files.restore()
    with (folder / "log").open("ab", buffering=0) as file:
        file.write(b"a line")
        assert files.capture() is None
    assert any("cannot be copied within" in warning for warning in files.warnings)


# -- folders ---------------------------------------------------------------------------------


def _save(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(os.urandom(100))


def test_a_folder_is_taken_once_nothing_has_been_added_to_it_for_a_while(box: Box) -> None:
    box.files.look()
    _save(box.folder / "checkpoint-10", "config.json", "model.bin")
    box.clock.ahead_s -= 10  # so that the files are new by the clock
    box.capture(after_s=0.5)
    assert box.names() == []
    box.capture(after_s=60)
    assert box.names() == ["checkpoint-10/config.json", "checkpoint-10/model.bin"]


def test_a_folder_with_all_names_of_its_sibling_is_taken_at_once(box: Box) -> None:
    _save(box.folder / "checkpoint-10", "model.bin", "rng_state_0.pth", "rng_state_1.pth")
    box.capture(2, after_s=60)
    box.clock.ahead_s = -5
    _save(box.folder / "checkpoint-20", "model.bin", "rng_state_0.pth")
    box.files.capture()
    assert not any("checkpoint-20" in name for name in box.names())
    _save(box.folder / "checkpoint-20", "rng_state_1.pth")
    box.files.capture()
    assert sum("checkpoint-20" in name for name in box.names()) == 3


def test_a_folder_is_taken_once_the_script_has_begun_with_a_later_one(box: Box) -> None:
    box.clock.ahead_s = -5
    _save(box.folder / "run" / "checkpoint-9", "model.bin", "state.json")
    box.files.capture()
    assert box.names() == []
    _save(box.folder / "run" / "checkpoint-10", "model.bin")
    box.files.capture()
    assert box.names() == ["run/checkpoint-9/model.bin", "run/checkpoint-9/state.json"]


@pytest.mark.parametrize("temporary", [".", "sub"])
def test_a_folder_with_a_file_that_is_being_written_is_not_there_in_part(
    box: Box, temporary: str
) -> None:
    _save(box.folder / "checkpoint-20", "config.json", "model.bin")
    (box.folder / "checkpoint-20" / temporary).mkdir(exist_ok=True)
    with (box.folder / "checkpoint-20" / temporary / "optimizer.pt").open("wb", 0) as file:
        for _ in range(5):
            file.write(os.urandom(100))
            box.capture(after_s=20)
            assert box.names() == []
    box.capture(3)
    assert len(box.names()) == 3


def test_an_index_waits_for_its_shards(box: Box) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    _save(box.folder / "best", "config.json")
    (box.folder / "best" / "model-1.safetensors").write_bytes(_safetensors())
    (box.folder / "best" / "model.safetensors.index.json").write_bytes(msgspec.json.encode(index))
    box.capture(2, after_s=60)
    assert box.names() == []
    (box.folder / "best" / "model-2.safetensors").write_bytes(_safetensors())
    box.capture(3, after_s=60)
    assert len(box.names()) == 4


def test_what_a_rotation_removed_stays_until_the_new_folder_is_complete(box: Box) -> None:
    _save(box.folder / "checkpoint-10", "model.bin", "state.json")
    box.capture(2, after_s=60)
    (box.folder / "checkpoint-20").mkdir()
    with (box.folder / "checkpoint-20" / "model.bin").open("wb", 0) as file:
        file.write(b"half")
        for path in (box.folder / "checkpoint-10").iterdir():
            path.unlink()
        (box.folder / "checkpoint-10").rmdir()
        box.capture()
        assert box.names() == ["checkpoint-10/model.bin", "checkpoint-10/state.json"]
    _save(box.folder / "checkpoint-20", "state.json")
    box.capture(2, after_s=60)
    assert box.names() == ["checkpoint-20/model.bin", "checkpoint-20/state.json"]


def test_a_link_and_a_text_that_name_an_incomplete_folder_stay_as_they_were(box: Box) -> None:
    _save(box.folder / "step10", "model.bin", "state.json")
    (box.folder / "latest").write_text("step10")
    (box.folder / "last").symlink_to("step10")
    box.capture(2, after_s=60)
    box.clock.ahead_s = -5
    _save(box.folder / "step20", "model.bin")
    (box.folder / "latest").write_text("step20")
    (box.folder / "last").unlink()
    (box.folder / "last").symlink_to("step20")
    box.files.capture()
    kept = box.kept()
    assert (kept / "latest").read_text() == "step10"
    assert str((kept / "last").readlink()) == "step10"


def test_a_file_that_is_saved_again_and_again_in_a_folder_of_its_own_is_taken(box: Box) -> None:
    _save(box.folder / "out", "ckpt.bin")
    box.capture(2, after_s=60)
    for _ in range(3):
        data = os.urandom(100)
        (box.folder / "out" / "ckpt.bin").write_bytes(data)
        box.clock.ahead_s = 0
        box.files.capture()
        assert (box.kept() / "out" / "ckpt.bin").read_bytes() == data


@pytest.mark.parametrize(
    ("path", "known", "with_files", "unit"),
    [
        ("ckpt.pt", "", "", None),
        ("out/ckpt.pt", "", "out", "out"),
        ("out/ckpt.pt", "out", "out", "out"),
        ("best/deep/a", "", "best best/deep", "best"),
        ("out/step-1/a/b", "", "out/step-1/a", "out/step-1"),
        ("out/step-1/a/b", "out", "out/step-1 out/step-1/a", "out/step-1"),
        ("out/step-1/a/b", "out out/step-1 out/step-1/a", "out/step-1/a", "out/step-1/a"),
        ("exp7/checkpoint-5/a", "", "exp7 exp7/checkpoint-5", "exp7/checkpoint-5"),
        ("runs/exp7/a", "", "runs/exp7", "runs/exp7"),
        ("checkpoint-5/global_step5/a", "", "checkpoint-5/global_step5", "checkpoint-5"),
        ("500/default/d/a", "", "500/default/d", "500"),
    ],
)
def test_files_are_taken_with_the_folder_that_is_the_checkpoint(
    path: str, known: str, with_files: str, unit: str | None
) -> None:
    found = unit_of(path, known.split(), with_files=with_files.split(), root_is_one=False)
    assert found == unit


def test_checkpoints_that_come_every_second_below_a_new_folder_are_taken(box: Box) -> None:
    for number in range(1, 5):
        _save(box.folder / "run" / f"checkpoint-{number}", "model.bin", "state.json")
        box.capture(after_s=5)
        assert f"run/checkpoint-{number}/state.json" in box.names()


def test_a_folder_that_gets_a_file_every_second_is_taken_after_a_minute() -> None:
    now = 0.0
    sets = FolderSets(lambda: now)
    held = []
    unit = Unit("samples", is_new=True)
    for number in range(70):
        now = float(number)
        unit.whole[f"samples/{number}.png"] = 0.0
        held.append(bool(sets.held([unit], {}, final=False)))
    assert held.index(False) == 60


# -- what a script leaves when it is stopped -------------------------------------------------


def test_a_folder_that_was_not_complete_when_the_script_was_stopped_stays_out(box: Box) -> None:
    _save(box.folder / "checkpoint-10", "model.bin", "state.json")
    box.capture(2, after_s=60)
    box.clock.ahead_s = 0
    _save(box.folder / "checkpoint-20", "model.bin")
    box.files.note_writers()
    box.files.capture(final=True)
    assert box.names() == ["checkpoint-10/model.bin", "checkpoint-10/state.json"]
    assert any("checkpoint-20" in warning for warning in box.files.warnings)


def test_a_folder_that_is_completed_after_sigterm_is_taken(box: Box) -> None:
    box.clock.ahead_s = 0
    _save(box.folder / "checkpoint-20", "model.bin")
    box.files.note_writers()
    _save(box.folder / "checkpoint-20", "state.json")
    box.files.capture(final=True)
    assert box.names() == ["checkpoint-20/model.bin", "checkpoint-20/state.json"]


def test_what_changed_since_the_last_look_may_be_half_when_the_script_was_killed(box: Box) -> None:
    (box.folder / "model.bin").write_bytes(b"whole")
    (box.folder / "whole.pt").write_bytes(_zip())
    log = (box.folder / "log").open("a")
    box.capture()
    box.clock.ahead_s = 0
    box.files.look()
    (box.folder / "model.bin").write_bytes(b"half")
    new = _zip()
    (box.folder / "whole.pt").write_bytes(new)
    log.write("last words\n")
    log.close()
    box.files.note_death()
    box.files.capture(final=True)
    kept = box.kept()
    assert (kept / "model.bin").read_bytes() == b"whole"
    assert (kept / "whole.pt").read_bytes() == new
    assert (kept / "log").read_text() == "last words\n"


# -- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in CHECKPOINTS if kind != "anything"])
def test_a_file_that_is_cut_off_anywhere_never_counts_as_whole(tmp_path: Path, kind: str) -> None:
    name, make = CHECKPOINTS[kind]
    data = make()
    path = tmp_path / name
    for size in [*range(0, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:size])
        with path.open("rb") as file:
            assert wholeness(file.fileno(), name, size) != "whole", size
    path.write_bytes(data)
    with path.open("rb") as file:
        assert wholeness(file.fileno(), name, len(data)) in {"whole", "unknown"}


@settings(max_examples=300)
@given(st.binary(max_size=300), st.sampled_from(["a.pt", "a.safetensors", "a.npy", "a"]))
def test_any_bytes_can_be_looked_at(tmp_path_factory: Any, data: bytes, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    for head in (b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"PAR1", b"\x80\x04"):
        path.write_bytes(head + data)
        with path.open("rb") as file:
            wholeness(file.fileno(), name, path.stat().st_size)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 8, struct.pack("<Q", 200_000) + b"[" * 200_000,
        struct.pack("<Q", 40) + b'{"w":{"data_offsets":[0,1e999]}}'.ljust(40),
        b"\x93NUMPY\x01\x00\xff\xff{'descr': '<f8', 'shape': (" + b"9" * 9000 + b"), }",
    ],
)  # fmt: skip
def test_a_format_that_lies_is_only_unknown_or_torn(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with path.open("rb") as file:
        assert wholeness(file.fileno(), path.name, len(data)) in {"torn", "unknown"}
    assert missing_shards(data) == set()


# -- attributes ------------------------------------------------------------------------------


def _shape(folder: Path) -> dict[str, tuple[object, ...]]:
    """Everything about a folder that comes back, by path."""
    found: dict[str, tuple[object, ...]] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = ("link", str(path.readlink()), status.st_mtime_ns)
            continue
        mode = stat.S_IMODE(status.st_mode)
        content = None if path.is_dir() else path.read_bytes()
        links = 0 if path.is_dir() else status.st_nlink
        found[name] = (mode, status.st_mtime_ns, content, links)
    return found


def test_times_modes_links_and_empty_folders_come_back_exactly(box: Box) -> None:
    _save(box.folder / "a" / "b", "one", "two")
    (box.folder / "a" / "b" / "one").chmod(0o600)
    (box.folder / "a" / "b" / "two").chmod(0o444)
    (box.folder / "a" / "empty").mkdir(mode=0o700)
    (box.folder / "last").symlink_to("a/b/one")
    (box.folder / "a" / "up").symlink_to("../a/./b")
    (box.folder / "dangling").symlink_to("not/there")
    os.link(box.folder / "a" / "b" / "one", box.folder / "same")
    os.utime(box.folder / "a" / "b" / "one", ns=(0, 1_234_567_890_123_456_789))
    os.utime(box.folder / "a" / "b" / "two", ns=(0, 1))
    os.utime(box.folder / "dangling", ns=(0, 7_000_000_000), follow_symlinks=False)
    (box.folder / "a" / "b").chmod(0o555)
    os.utime(box.folder / "a" / "b", ns=(0, 5_000_000_000))
    box.files.capture(final=True)
    kept = box.kept()
    assert _shape(kept) == _shape(box.folder)
    assert (kept / "same").samefile(kept / "a" / "b" / "one")
    assert box.files.warnings == ()
    box.files.release()
    again = box.next_on(kept)
    assert again.capture(final=True) is None


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_tree_comes_back_exactly(data: st.DataObject, tmp_path_factory: Any) -> None:
    from spotfirst.run import create_run
    from spotfirst.spec import RunSpec
    from spotfirst.storage import open_storage
    from tests.checkpointing.conftest import LONG_AGO

    place: Path = tmp_path_factory.mktemp("tree")
    name = st.text("abc.é 1", min_size=1, max_size=4).filter(lambda n: n not in {".", ".."})
    parts = st.lists(name, min_size=1, max_size=3)
    (place / "files").mkdir()
    for words in data.draw(st.lists(parts, max_size=6)):
        path = place / "files" / "/".join(words)
        with contextlib.suppress(OSError):  # the path leads through a file or a link
            path.parent.mkdir(parents=True, exist_ok=True)
            kind = data.draw(st.sampled_from(["file", "folder", "link"]))
            if kind == "folder":
                path.mkdir()
            elif kind == "link":
                path.symlink_to(data.draw(name))
            else:
                # No format begins with a full stop: one that is cut off is not kept.
                path.write_bytes(data.draw(st.binary(max_size=50).map(lambda text: b"." + text)))
                path.chmod(data.draw(st.sampled_from([0o400, 0o600, 0o640, 0o755, 0o777])))
                when = data.draw(st.integers(-(10**17), 2**62))
                os.utime(path, ns=(when, when))
    spec = RunSpec(run_id="f", created_at=LONG_AGO, command=("x",), checkpoint_mode="files")
    run = create_run(open_storage(str(place / "store")), spec)
    files = FileCheckpoints(run, 1, place / "files")
    files.restore()
    if files.capture(final=True) is None:
        assert _shape(place / "files") == {}
        return
    mirror(run.packs(), run.chain().refresh().commits[-1][1], place / "back")
    assert _shape(place / "back") == _shape(place / "files")


def test_holes_take_no_space_and_are_holes_again(box: Box) -> None:
    path = box.folder / "data.mdb"
    with path.open("wb") as file:
        file.truncate(1 << 40)
        for at in (0, 5_000_000, (1 << 40) - 5):
            file.seek(at)
            file.write(b"data!")
    box.capture()
    kept = box.kept() / "data.mdb"
    assert kept.stat().st_size == 1 << 40
    assert kept.stat().st_blocks * 512 < 10 << 20
    for at in (0, 5_000_000, (1 << 40) - 5):
        with kept.open("rb") as copy:
            copy.seek(at)
            assert copy.read(5) == b"data!"
    assert box.run.chain().refresh().commits[-1][1].new_bytes < 5 << 20


def test_what_cannot_be_kept_is_a_warning(box: Box) -> None:
    path = box.folder / "model"
    path.write_bytes(b"1")
    path.chmod(0o4755)
    with contextlib.suppress(OSError):
        os.setxattr(path, "user.note", b"mine")
    (box.folder / "inside").symlink_to(box.folder / "model")
    box.capture()
    assert any("set-uid" in warning for warning in box.files.warnings)
    assert any("relative one" in warning for warning in box.files.warnings)
    kept = box.kept()
    assert stat.S_IMODE((kept / "model").stat().st_mode) == 0o755
    assert str((kept / "inside").readlink()) == "model"


INSIDE = {
    "a/b -> c": True, "a/b -> ../c": True, "a -> b/c": True, "a -> .": True, "a/b -> ..": True,
    "a -> ..": False, "a -> ../b": False, "a/b -> ../../c": False, "a -> b/../../c": False,
    "a/b/c -> x/../../..": False, "a -> /etc": False, "a -> ": False, "a -> b/..": False,
}  # fmt: skip


@pytest.mark.parametrize("link", INSIDE)
def test_only_links_that_cannot_leave_the_folder_are_kept(link: str) -> None:
    path, _, target = link.partition(" -> ")
    assert stays_inside(path, target) is INSIDE[link]
