"""The user's command as one process tree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from spotfirst.agent.command import Command, command_environment, find_program
from spotfirst.errors import InvalidSpec
from tests.waiting import PATIENCE_S, is_gone, wait_until


class Runner:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = b""
        self.commands: list[Command] = []

    def feed(self, data: bytes) -> None:
        self.output += data

    def __call__(self, *words: str, **env: str) -> Command:
        environment = command_environment(os.environ, env, {})
        command = Command(words, self.folder, environment, self.feed)
        self.commands.append(command)
        return command

    def pid(self) -> int:
        return int(wait_until(lambda: self.output.endswith(b"\n") and self.output, "a pid"))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(tmp_path)
    yield runner
    for command in runner.commands:
        command.end()


def finished(command: Command) -> int:
    wait_until(lambda: command.poll() is not None, "the command's end")
    return command.end()


def test_children_that_were_there_before_live_on_with_theirs(run: Runner) -> None:
    before = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"])
    try:
        family = psutil.Process(before.pid)
        wait_until(family.children, "its child")
        assert finished(run("true")) == 0
        assert [is_gone(each.pid) for each in (family, *family.children())] == [False, False]
    finally:
        for each in (*family.children(), family):
            each.kill()
        before.wait()


@pytest.mark.parametrize(("script", "code"), [("exit 3", 3), ("kill -9 $$", -9), ("true", 0)])
def test_the_exit_code_is_the_commands(run: Runner, script: str, code: int) -> None:
    assert finished(run("sh", "-c", script)) == code


def test_both_outputs_are_one_and_complete(run: Runner) -> None:
    finished(run("sh", "-c", "echo out; echo err >&2; printf last"))
    assert run.output == b"out\nerr\nlast"


def test_it_runs_in_its_folder_with_nothing_to_read(run: Runner, tmp_path: Path) -> None:
    finished(run("sh", "-c", "pwd; cat"))
    assert run.output.decode() == f"{tmp_path}\n"


def test_python_is_the_agents_own(run: Runner) -> None:
    finished(run("python", "-c", "import sys; print(sys.executable)"))
    assert run.output.decode().strip() == sys.executable


def test_programs_beside_the_agents_python_come_first() -> None:
    path = command_environment({"PATH": "/usr/bin"}, {}, {})["PATH"]
    assert path.split(":") == [str(Path(sys.executable).parent), "/usr/bin"]


def test_a_path_in_the_spec_stands_and_ours_wins_over_both() -> None:
    environment = command_environment(
        {"PATH": "/usr/bin", "A": "1"}, {"PATH": "/opt", "A": "2", "B": "2"}, {"B": "3"}
    )
    assert (environment["PATH"], environment["A"], environment["B"]) == ("/opt", "2", "3")
    assert environment["PYTHONUNBUFFERED"] == "1"


def test_the_command_is_not_told_how_to_power_off() -> None:
    assert "SPOTFIRST_POWER_OFF" not in command_environment({"SPOTFIRST_POWER_OFF": "x"}, {}, {})


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="no program 'trian'"):
        find_program("trian", tmp_path, os.environ)


def test_a_program_of_the_code_needs_a_slash(tmp_path: Path) -> None:
    (tmp_path / "go").write_text("")
    with pytest.raises(InvalidSpec, match=r"write '\./go'"):
        find_program("go", tmp_path, os.environ)
    with pytest.raises(InvalidSpec, match="chmod"):
        find_program("./go", tmp_path, os.environ)
    with pytest.raises(InvalidSpec, match="not in the code folder"):
        find_program("./gone", tmp_path, os.environ)


def test_a_file_that_is_no_program_says_so(run: Runner, tmp_path: Path) -> None:
    (tmp_path / "go").write_text("echo no first line")
    (tmp_path / "go").chmod(0o755)
    assert finished(run("./go")) == 126
    assert b"Exec format error" in run.output


def test_the_whole_group_goes(run: Runner) -> None:
    command = run("sh", "-c", "sleep 300 & echo $!; wait")
    child = run.pid()
    assert command.end() == -signal.SIGKILL
    assert is_gone(child)


def test_children_that_outlive_the_command_go_as_well(run: Runner) -> None:
    command = run("sh", "-c", "sleep 300 >/dev/null & echo $!")
    child = run.pid()
    assert finished(command) == 0
    wait_until(lambda: is_gone(child), "the child's end")


def test_children_in_a_session_of_their_own_go_as_well(run: Runner) -> None:
    command = run("sh", "-c", "setsid sleep 300 & echo $!; wait")
    child = run.pid()
    wait_until(lambda: os.getsid(child) == child, "the new session")
    command.end()
    assert is_gone(child)


def test_a_pipe_that_breaks_ends_its_writer(run: Runner) -> None:
    assert finished(run("sh", "-c", "yes | head -1")) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from spotfirst.agent.command import Command\n"
        "c = Command(['sleep', '300'], Path('.'), dict(os.environ), print)\n"
        "print(c.group, flush=True)\n"
        "time.sleep(300)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        wait_until(lambda: psutil.Process(child).name() == "sleep", "the command")
        parent.kill()
    wait_until(lambda: is_gone(child), "the command's end")


def test_output_is_taken_while_nobody_waits_for_it(run: Runner) -> None:
    command = run("sh", "-c", "head -c 5000000 /dev/zero; sleep 300")
    wait_until(lambda: len(run.output) == 5_000_000, "all output")
    start = time.monotonic()
    command.end()
    assert time.monotonic() - start < PATIENCE_S
