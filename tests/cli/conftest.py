"""One finished run that many tests look at, and a shell of its own for those that change things."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.shell import Shell, a_shell
from tests.waiting import PATIENCE_S, wait_until

INTERRUPTED = {
    "notice_s": 10,
    "market": {
        "kind": "scripted",
        "zones": {
            "local-a": [{"from_s": 0, "capacity": 1}],
            "local-b": [{"from_s": 0, "capacity": 1}],
        },
    },
}


class Finished(NamedTuple):
    """A run that was interrupted once, and succeeded."""

    shell: Shell
    run_id: str
    output: subprocess.CompletedProcess[str]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    with a_shell(tmp_path_factory.mktemp("cli")) as shell:
        spec = shell.spec(fleet_options=INTERRUPTED, tags={"team": "search"}, deadline="10m")
        words = ("run", spec, "--run-id", "done", "-e", "STEPS=100", "-e", "HOLD=1")
        process = shell.start(*words)
        wait_until(lambda: process.poll() is not None or shell.is_training("done"), "a checkpoint")
        assert process.poll() is None, process.communicate()
        shell.interrupt("done")
        out, err = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0, out + err
        output = subprocess.CompletedProcess(words, process.returncode, out, err)
        yield Finished(shell, "done", output)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with a_shell(tmp_path) as shell:
        yield shell
