"""The page on simulations: its commands run as they stand, and so does README.md's."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spotfirst_airflow.cli import app

ROOT = Path(__file__).parents[2]
COMMANDS = [
    (name, command)
    for name in ("docs/simulating.md", "README.md")
    for command in re.findall(
        r"^```bash\nspotfirst (simulate .*?)\n```", (ROOT / name).read_text(), re.MULTILINE
    )
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_its_command_runs_as_it_stands(
    page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPOTFIRST_TRACES", raising=False)
    result = CliRunner().invoke(app, shlex.split(command))
    assert result.exit_code == 0, result.output
    if "--json" in command:
        json.loads(result.stdout)
    else:
        assert "spotfirst" in result.output


def test_there_are_commands_on_both_pages() -> None:
    assert {name for name, _ in COMMANDS} == {"docs/simulating.md", "README.md"}
