"""What the documents promise exists, and nothing of the author's machine is in them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
# Put together from parts, so that this file does not contain them.
FORBIDDEN = [
    "/" + "work/",
    "/" + "tmp/w/",
    "/" + "root/",
    "files.python" + "hosted.org",
    "download.py" + "torch.org",
]


def tracked() -> list[Path]:
    """List the files that are, or would be, in the repository."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_every_make_target_that_is_mentioned_exists() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    mentioned = {
        target
        for path in documents
        for code in re.findall(r"```.*?```|`[^`\n]+`", path.read_text(), re.DOTALL)
        for target in re.findall(r"(?:^|[\s`])make ([a-z][a-z0-9-]*)", code)
    }
    assert mentioned, "the documents name no make target at all"
    assert mentioned <= TARGETS


def test_no_file_names_a_path_or_a_host_of_the_machine_it_was_written_on() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in tracked()
        for word in FORBIDDEN
        if word.encode() in path.read_bytes()
    ]
    assert found == []


def test_nothing_generated_is_tracked() -> None:
    names = {str(path.relative_to(ROOT)) for path in tracked()}
    generated = (".venv/", ".local/", "dist/", ".env")
    assert [name for name in names if name.startswith(generated)] == []


def test_continuous_integration_runs_the_documented_commands() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert {"make lint", "make test"} <= set(script.read_text().splitlines())
