"""SIGKILL before any change to a file or folder, in commit and in sync, leaves nothing half."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from blake3 import blake3

from spotfirst import datasets
from spotfirst.storage import open_storage
from tests.datasets.helpers import content, fill
from tests.waiting import PATIENCE_S

ONE = {"a": b"alpha", "b/c": b"gamma"}
TWO = {"a": b"ALPHA", "b/c": b"gamma", "d": b"delta"}

# Forks once for each place: the child kills itself before its n-th change of the disk. The parent
# imports everything first, so a child costs milliseconds.
_DRIVER = """
import json, os, signal, sys
from pathlib import Path
from spotfirst import datasets
from spotfirst.datasets import _commit, _sync, _manifest
from spotfirst.storage import open_storage

what, folder, stride = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
CHANGES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.utime", "os.chmod"}

def run(case):
    storage = open_storage(str(case / "storage"))
    if what == "commit":
        datasets.commit(storage, "d", folder / "two", cache=case / "cache", workers=1)
    else:
        ref = datasets.DatasetRef(name="d", version=2)
        datasets.sync(storage, ref, case / "target", case / "cache", workers=1)

def child(case, number):
    left = number
    def audit(event, args):
        nonlocal left
        if event in CHANGES and not (event == "open" and args[1] in ("r", "rb", None)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
    run(case)

for number in range(1, 10_000, stride):
    case = folder / "cases" / str(number)
    os.makedirs(case.parent, exist_ok=True)
    os.system(f"cp -r {folder}/before {case}")
    pid = os.fork()
    if pid == 0:
        try:
            child(case, number)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([str(case), status]), flush=True)
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
"""


def _kill_everywhere(what: str, folder: Path, *, stride: int = 1) -> list[Path]:
    """The folders that the killed processes left behind."""
    done = subprocess.run(
        [sys.executable, "-c", _DRIVER, what, str(folder), str(stride)],
        capture_output=True, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert cases[-1][1] == 0  # the last one was never reached, and finished
    assert len(cases) > 8
    return [Path(path) for path, _ in cases]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """``before``: a storage where version 1 is newest, and synced to ``target``."""
    before = tmp_path / "before"
    storage = open_storage(str(before / "storage"))
    datasets.commit(storage, "d", fill(tmp_path / "one", ONE), cache=before / "cache")
    fill(tmp_path / "two", TWO)
    return tmp_path


def test_a_killed_commit_leaves_the_last_version_newest_or_is_done(world: Path) -> None:
    seen = set()
    for case in _kill_everywhere("commit", world):
        storage = open_storage(str(case / "storage"))
        newest = datasets.resolve(storage, "d")
        seen.add(newest.version)
        datasets.sync(storage, newest, case / "target", case / "cache")
        assert content(case / "target") == (ONE, TWO)[newest.version - 1]
        again = datasets.commit(storage, "d", world / "two", cache=case / "cache")
        assert again.version == 2
    assert seen == {1, 2}


def test_a_killed_sync_leaves_no_half_file_and_the_next_one_finishes(world: Path) -> None:
    storage = open_storage(str(world / "before/storage"))
    ref = datasets.resolve(storage, "d")
    datasets.sync(storage, ref, world / "before/target", world / "before/cache")
    datasets.commit(storage, "d", world / "two", cache=world / "before/cache")
    for case in _kill_everywhere("sync", world):
        for path in (case / "cache/datasets/objects").rglob("*"):
            if path.is_file():
                assert blake3(path.read_bytes()).hexdigest() == path.name
        datasets.sync(storage, datasets.resolve(storage, "d"), case / "target", case / "cache")
        assert content(case / "target") == TWO
        assert list((case / "cache/datasets/partial").iterdir()) == []
