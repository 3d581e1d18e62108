"""One finished run that many tests look at, and a shell of its own for those that change things."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.shell import Shell, a_shell

INTERRUPTED = {
    "notice_s": 4,
    "market": {
        "kind": "scripted",
        "zones": {
            "local-a": [{"from_s": 0, "capacity": 1}, {"from_s": 3, "capacity": 0}],
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
        output = shell.call("run", spec, "--run-id", "done", "-e", "STEPS=100")
        assert output.returncode == 0, output.stdout + output.stderr
        yield Finished(shell, "done", output)


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    with a_shell(tmp_path) as shell:
        yield shell
