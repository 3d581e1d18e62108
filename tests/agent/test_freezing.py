"""The command's processes stand still, all of them, and run on afterwards."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import psutil
import pytest

from spotfirst.agent.command import Command
from spotfirst.agent.filemode import worth_waiting_s
from spotfirst.agent.freezing import Freezer
from spotfirst.channel import CHANNEL_VARIABLE
from spotfirst.checkpoints.mirroring import mirror
from spotfirst.heartbeat import Handover
from tests.agent.conftest import Lab
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux' /proc")

COUNTING = """
import os, sys, threading, time
def count(name):
    while True:
        with open(name, "a") as file:
            file.write("x")
for number in range(3):
    threading.Thread(target=count, args=(f"{sys.argv[1]}-{number}",), daemon=True).start()
time.sleep(1000)
"""

FORKING = """
import subprocess, sys
while True:
    subprocess.run(["true"])
    open(sys.argv[1], "a").write("x")
"""


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process with children, one of them in a session of its own, and one that forks and forks."""
    code = f"""
import subprocess, sys, time
counting, forking = {COUNTING!r}, {FORKING!r}
subprocess.Popen([sys.executable, "-c", counting, "child"], cwd={str(tmp_path)!r})
subprocess.Popen(
    [sys.executable, "-c", counting, "daemon"], cwd={str(tmp_path)!r}, start_new_session=True
)
subprocess.Popen([sys.executable, "-c", forking, "forking"], cwd={str(tmp_path)!r})
time.sleep(1000)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        try:
            for name in ("child-2", "daemon-2", "forking"):
                wait_until((tmp_path / name).exists, name)
            yield process
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            for each in [*children, psutil.Process(process.pid)]:
                with contextlib.suppress(psutil.Error):
                    each.kill()


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def test_nothing_is_written_while_the_processes_stand_still_and_all_run_on(
    tree: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    told: list[set[int]] = []
    freezer = Freezer(root=os.getpid(), on_stopped=lambda pids: told.append(set(pids)))
    for _ in range(20):
        with freezer.frozen() as pids:
            assert tree.pid in pids
            before = _sizes(tmp_path)
            time.sleep(0.02)
            assert _sizes(tmp_path) == before
            assert told[-1] >= {tree.pid}
        assert told[-1] == set()
        wait_until(
            lambda: all(size > before[name] for name, size in _sizes(tmp_path).items()),  # noqa: B023
            "all of them to run on",
        )


def test_what_a_user_had_stopped_stays_stopped(tree: subprocess.Popen[bytes]) -> None:
    child = psutil.Process(tree.pid).children()[0]
    child.suspend()
    wait_until(lambda: child.status() == psutil.STATUS_STOPPED, "it to stop")
    freezer = Freezer()
    with freezer.frozen() as pids:
        assert child.pid in pids
    assert child.status() == psutil.STATUS_STOPPED
    with freezer.frozen():
        pass
    assert child.status() == psutil.STATUS_STOPPED


def test_those_that_are_spared_run_on(tree: subprocess.Popen[bytes], tmp_path: Path) -> None:
    spared = psutil.Process(tree.pid).children()[0]
    freezer = Freezer(spare=frozenset({spared.pid}))
    with freezer.frozen() as pids:
        assert spared.pid not in pids
        before = _sizes(tmp_path)["child-0"]
        wait_until(lambda: _sizes(tmp_path)["child-0"] > before, "the spared one")


@pytest.mark.parametrize("catches", [False, True])
def test_no_thread_writes_a_byte_more_once_a_stopped_process_has_its_last_signal(
    tmp_path: Path, catches: bool
) -> None:
    code = f"""
import signal, sys, threading, time
if {catches}:
    signal.signal(signal.SIGTERM, lambda *_: (open("caught", "w"), sys.exit(7)))
def count(name):
    while True:
        with open(name, "wb", 0) as file:
            for _ in range(1000):
                file.write(b"x")
for number in range(8):
    threading.Thread(target=count, args=(f"{{number}}",), daemon=True).start()
while True:
    time.sleep(0.01)
"""
    command = Command([sys.executable, "-c", code], tmp_path, dict(os.environ), lambda _: None)
    wait_until((tmp_path / "7").exists, "the threads")
    with Freezer().frozen() as pids:
        before = _sizes(tmp_path)
        command.signal_stopped(signal.SIGTERM, pids)
    wait_until(lambda: command.poll() is not None, "its end")
    if catches:
        assert command.end() == 7
        assert (tmp_path / "caught").exists()
    else:
        assert command.end() == -signal.SIGKILL
        assert _sizes(tmp_path) == before


def test_a_killed_agent_leaves_nothing_standing_still(lab: Lab) -> None:
    run = lab.shell(
        'dd if=/dev/zero of="$SPOTFIRST_CHECKPOINT_DIR/a" bs=1M count=64 2>/dev/null\n'
        'while true; do date > "$SPOTFIRST_CHECKPOINT_DIR/b"; sleep 0.01; done',
        checkpoint_mode="files", checkpoint_period_s=0.01,
    )  # fmt: skip
    instance = lab.start(run)
    wait_until(lambda: len(run.chain().refresh().commits) > 1, "captures")
    instance.process.kill()
    instance.process.wait()
    assert lab.leftovers() == []


def test_a_hung_agent_does_not_leave_the_script_standing_still(tmp_path: Path) -> None:
    """The guard continues what its agent has stopped, once the agent is gone, whoever it is."""
    guard = Path(sys.modules[Command.__module__].__file__ or "").with_name("_guard.py")
    sleeper = subprocess.Popen(["sleep", "1000"])
    try:
        with subprocess.Popen(
            [sys.executable, str(guard), str(os.getpid()), "1000", f"{CHANNEL_VARIABLE}=none", ""],
            stdin=subprocess.PIPE,
        ) as process:
            assert process.stdin is not None
            process.stdin.write(b"stopped %d\n" % sleeper.pid)
            process.stdin.flush()
            sleeper.send_signal(signal.SIGSTOP)
            status = psutil.Process(sleeper.pid)
            wait_until(lambda: status.status() == psutil.STATUS_STOPPED, "it to stop")
        wait_until(lambda: status.status() != psutil.STATUS_STOPPED, "it to run on")
    finally:
        sleeper.kill()
        sleeper.wait()


# -- a move waits for the script's own save --------------------------------------------------


@pytest.mark.parametrize(
    ("since_s", "is_saving", "waits"),
    [(10, False, False), (40, False, False), (60, False, True), (99, False, True),
     (115, False, True), (130, False, False), (10, True, True)],
)  # fmt: skip
def test_a_move_waits_for_the_next_save_when_it_is_nearer_than_the_last(
    since_s: float, is_saving: bool, waits: bool
) -> None:
    saves = [1000.0, 1100.0, 1200.0]
    assert (worth_waiting_s(saves, 1200 + since_s, is_saving=is_saving) > 0) == waits


def test_a_script_whose_period_is_not_known_is_not_waited_for() -> None:
    assert worth_waiting_s([], 0, is_saving=True) == 0
    assert worth_waiting_s([1000.0], 1010, is_saving=True) == 0


SAVING = """
import os, time
place = os.path.join(os.environ["SPOTFIRST_CHECKPOINT_DIR"], "ckpt")
number = 0
while True:
    time.sleep(4)
    number += 1
    with open(place, "w") as file:
        file.write(str(number))
    print("saved", number, flush=True)
"""


def test_a_voluntary_move_comes_just_after_a_save(lab: Lab) -> None:
    run = lab.create("python", "-c", SAVING, checkpoint_mode="files", checkpoint_period_s=1.0)
    instance = lab.start(run)
    wait_until(lambda: instance.log_line("saved 3"), "three saves")
    time.sleep(2.6)  # more than half of the period, so that the next save is nearer
    instance.run.request_handover(
        1, Handover(reason="back to spot", at=datetime.now(timezone.utc), to=2)
    )
    report = instance.exit()
    assert report.cause == "handed_over"
    assert instance.log_line("saved 4")
    second = lab.start(run, 2)
    wait_until(lambda: second.log_line("saved 1"), "the successor")
    second.hand_over()
    second.exit()


SAVES_AT_THE_END = """
import os, signal, sys, time
def save(*_):
    time.sleep(1)
    with open(os.path.join(os.environ["SPOTFIRST_CHECKPOINT_DIR"], "last"), "w") as file:
        file.write("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""


def test_a_script_behind_a_shell_may_save_before_it_ends(lab: Lab) -> None:
    run = lab.create(
        "sh", "-c", 'python -c "$CODE"; true', checkpoint_mode="files",
        env={"CODE": SAVES_AT_THE_END},
    )  # fmt: skip
    instance = lab.start(run)
    wait_until(lambda: instance.log_line("ready"), "the script")
    instance.hand_over()
    assert instance.exit().cause == "handed_over"
    mirror(run.packs(), run.chain().refresh().commits[-1][1], lab.folder / "kept")
    assert (lab.folder / "kept" / "last").read_text() == "saved"
