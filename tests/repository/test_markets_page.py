"""The page on markets: its kinds, formats and commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spotfirst_airflow.cli import app
from spotfirst_airflow.fleets.ec2 import aws as aws_module
from spotfirst_airflow.markets import market_options
from tests.fleets.ec2.launches import World

PAGE = Path(__file__).parents[2].joinpath("docs", "markets.md").read_text()


def test_every_kind_of_market_is_on_the_page() -> None:
    try:
        market_options({"kind": "?"})
    except ValueError as error:
        kinds = str(error).rpartition("one of ")[2].split(", ")
    assert all(f"| `{kind}` |" in PAGE for kind in kinds)


def test_its_commands_run_as_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    account = World()
    monkeypatch.setattr(aws_module.Aws, "of", lambda identity: account.aws())
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"```bash\nspotfirst (.*?)\n```", PAGE):
        words = shlex.split(line.replace("s3://bucket/spotfirst", str(tmp_path / "runs")))
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output


def test_its_json_is_a_recording(tmp_path: Path) -> None:
    [text] = re.findall(r"- JSON `(.*?)`", PAGE)
    (tmp_path / "z.json").write_text(text)
    course = market_options({"kind": "recorded", "zones": {"z": str(tmp_path / "z.json")}}).course(
        "z"
    )
    assert [course.at(t).capacity for t in (0.0, 700.0, 1300.0)] == [1, 1, 0]
