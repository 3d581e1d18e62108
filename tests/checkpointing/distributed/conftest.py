from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).with_name("server.py")


class Ranks:
    """Runs a function of `scenarios.py` in several processes, which are the ranks of one group."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(self, scenario: str, world_size: int, **arguments: Any) -> list[Any]:
        """What it returns on each rank; all must end well."""
        ends = self.ends(scenario, world_size, **arguments)
        assert all(code == 0 for code, _ in ends), ends
        return [value for _, value in ends]

    def ends(self, scenario: str, world_size: int, **arguments: Any) -> list[tuple[int, Any]]:
        """The exit code of each rank (negative for a signal), and what it returned or raised."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        order = {"scenario": scenario, "world_size": world_size, "arguments": arguments}
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return [(code, value) for code, value in json.loads(self._server.stdout.readline())]


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    command = [sys.executable, str(SERVER)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        yield Ranks(server)
        assert server.stdin is not None
        server.stdin.close()
