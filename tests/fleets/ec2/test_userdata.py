"""The user data: small enough, without secrets, and an end to every instance."""

from __future__ import annotations

import ast
import gc
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from spotfirst.errors import InvalidSpec
from spotfirst_airflow.fleets.ec2 import userdata
from spotfirst_airflow.fleets.ec2.userdata import LIMIT_BYTES, condensed, user_data
from tests.waiting import PATIENCE_S, wait_until

SOURCE = Path(userdata.__file__).with_name("bootstrap.py").read_text()
DEFAULTS: dict[str, Any] = {
    "storage_url": "s3://bucket/prefix",
    "region": "eu-central-1",
    "run_id": "run-1",
    "max_life_s": 3600.0,
    "wheelhouse": "0123456789abcdef0123-cp312",
    "python": "python3",
    "image": "",
}


def script(**changes: Any) -> str:
    return user_data(**(DEFAULTS | changes))


def test_bash_can_read_it() -> None:
    subprocess.run(["bash", "-n"], input=script(python="it's"), text=True, check=True)


def test_how_often_the_pool_is_interrupted_is_handed_on() -> None:
    assert '"interruption_mean_s": 7200.0' in script(interruption_mean_s=7200.0)


def test_there_is_room_for_long_values() -> None:
    text = script(
        storage_url=f"s3://{'b' * 63}/{'p' * 190}", run_id="r" * 200, image="i" * 300,
        pip_install=["package==1.2.3"] * 20, pip_index="https://index.example/" + "x" * 100,
        wheelhouse=",".join([f"0123456789abcdef0123-cp312@{'d' * 64}"] * 4), spec_digest="d" * 64,
    )  # fmt: skip
    assert len(text.encode()) < LIMIT_BYTES


def test_what_ec2_would_not_take_is_refused_with_what_to_shorten() -> None:
    with pytest.raises(InvalidSpec, match=r"takes 16384: shorten .* pip_install"):
        script(pip_install=["p" * 100] * 100)


@pytest.mark.parametrize(
    "changes",
    [
        {"storage_url": "s3://key:secret@bucket/prefix"},
        {"endpoint_url": "https://user:secret@s3.example"},
        {"pip_index": "https://user:token@index.example/simple"},
        {"storage_url": "s3://bucket/AKIAIOSFODNN7EXAMPLE"},
        {"pip_index": "https://b.s3.amazonaws.com/simple?X-Amz-Signature=0123"},
        {"pip_install": ["--config-settings=aws_secret_access_key=0123"]},
    ],
)
def test_what_looks_like_a_secret_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec, match="leave it out"):
        script(**changes)


def test_the_same_settings_give_the_same_bytes() -> None:
    assert script() == script()


def test_the_bootstrap_inside_is_the_same_program() -> None:
    def plain(source: str) -> str:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                node.annotation = None
            if isinstance(node, ast.FunctionDef):
                node.returns = None
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                first = node.body[0]
                if ast.get_docstring(node) is not None and len(node.body) > 1:
                    node.body.remove(first)
        return ast.dump(tree)

    assert plain(condensed(SOURCE)) == plain(SOURCE)
    assert condensed(SOURCE) in script()


@contextmanager
def many_switches() -> Iterator[None]:
    """Threads take turns as often as they can, also within a call of the interpreter's own."""

    def collected(*_: Any) -> None:
        sum(range(50))  # here another thread may go on

    interval_s, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50)
    gc.callbacks.append(collected)
    try:
        yield
    finally:
        gc.callbacks.remove(collected)
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval_s)


def test_threads_may_write_it_at_the_same_time() -> None:
    with many_switches(), ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(condensed, [SOURCE] * 100))) == 1


def test_the_bootstrap_is_for_python_3_9() -> None:
    ast.parse(SOURCE, feature_version=(3, 9))


class Computer:
    """Runs user data with programs of the test's own in place of the system's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = folder / "home"
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.program("shutdown", f'echo "$*" >>{folder}/shutdowns')
        self.program("python3", "exit 0")

    def program(self, name: str, body: str) -> None:
        (self.programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (self.programs / name).chmod(0o755)

    def boot(self, text: str) -> list[str]:
        """What `shutdown` was asked for."""
        environment = {"PATH": f"{self.programs}:/usr/bin:/bin", "SPOTFIRST_HOME": str(self.home)}
        subprocess.run(["bash", "-c", text], env=environment, check=False, timeout=PATIENCE_S)
        path = self.folder / "shutdowns"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def computer(tmp_path: Path) -> Computer:
    return Computer(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 75, 137])
def test_however_the_bootstrap_ends_the_instance_powers_off(computer: Computer, code: int) -> None:
    computer.program("python3", f"exit {code}")
    assert computer.boot(script())[-1] == "-P now"


def test_the_timer_is_set_before_anything_else(computer: Computer) -> None:
    computer.program("python3", f'echo "python" >>{computer.folder}/shutdowns')
    # An hour of life, and a quarter of one to boot and to end in.
    assert computer.boot(script(max_life_s=3600.0)) == ["-P +75", "python", "-P now"]


def test_an_instance_that_would_boot_again_without_an_end_does_not_begin(
    computer: Computer,
) -> None:
    computer.home.mkdir()
    (computer.home / "per-boot").write_text("in the way")
    computer.program("python3", f"touch {computer.folder}/began")
    assert computer.boot(script()) == ["-P +75", "-P now"]
    assert not (computer.folder / "began").exists()


def test_an_instance_without_a_timer_does_not_begin(computer: Computer) -> None:
    computer.program("shutdown", f'echo "$*" >>{computer.folder}/shutdowns; exit 1')
    computer.program("poweroff", f'echo "poweroff $*" >>{computer.folder}/shutdowns')
    computer.program("python3", f"touch {computer.folder}/began")
    assert computer.boot(script()) == ["-P +75", "-P now", "poweroff -f"]
    assert not (computer.folder / "began").exists()


def test_an_instance_that_is_kept_has_a_timer_of_its_own(computer: Computer) -> None:
    computer.program("python3", "exit 75")
    assert computer.boot(script(keep_h=4.0)) == ["-P +75", "-P +240"]


@pytest.mark.parametrize(
    ("code", "asked"), [(75, "-P +240"), (137, "-P now")], ids=["kept", "killed"]
)
def test_an_instance_that_boots_again_has_an_end(computer: Computer, code: int, asked: str) -> None:
    # A kernel that panics boots again; user data runs only once, and the timer is forgotten.
    computer.program("python3", f"kill -9 $PPID; exit {code}" if code == 137 else f"exit {code}")
    computer.boot(script(keep_h=4.0))
    (computer.folder / "shutdowns").unlink()
    assert computer.boot(f"{computer.home}/per-boot/spotfirst") == [asked]


def test_an_image_of_a_used_disk_boots(computer: Computer) -> None:
    computer.program("cat", 'case "$*" in */instance-id) echo i-1 ;; *) exec /bin/cat "$@" ;; esac')
    computer.boot(script())
    (computer.folder / "shutdowns").unlink()
    computer.program("cat", "echo i-2")
    assert computer.boot(f"{computer.home}/per-boot/spotfirst") == []


def test_settings_come_through_as_they_are(computer: Computer) -> None:
    odd = "a 'quoted' $HOME `date` \\ \"word\"\nSPOTFIRST_SETTINGS\nü @PYTHON@"
    computer.boot(script(run_id=odd))
    settings = json.loads((computer.home / "settings.json").read_text())
    assert settings["run_id"] == odd


def test_what_happens_is_on_the_console_and_in_a_file(computer: Computer) -> None:
    computer.program("python3", "echo hello")
    computer.boot(script())
    log = computer.home / "boot.log"
    wait_until(lambda: "hello" in log.read_text(), "tee, which outlives the script")
