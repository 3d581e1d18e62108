"""docs/security.md has a row for each object, and names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from spotfirst import run
from tests.security.objects import OBJECTS, Kind

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("kind", OBJECTS, ids=lambda kind: kind.name)
def test_each_object_has_a_row_with_a_test(kind: Kind) -> None:
    [row] = [row for row in ROWS if row.startswith(f"| `{kind.name}` |")]
    assert re.findall(r"`([\w/]+\.py)`", row.rsplit("|", 2)[1])


def test_every_test_that_is_named_is_there() -> None:
    named = set(re.findall(r"`([\w/]*test_\w+\.py)`", TEXT))
    missing = [
        name
        for name in named
        if not (ROOT / (name if "/" in name else f"tests/security/{name}")).is_file()
    ]
    assert missing == []


def test_every_object_of_a_run_is_in_the_table() -> None:
    """``run.py`` lists them."""
    listed = set(re.findall(r"^``([\w{}/-]+?)(?:\.json)?``", run.__doc__ or "", re.MULTILINE))
    known = " ".join(kind.name for kind in OBJECTS)
    assert listed
    for path in listed:
        folder = path.split("/")[0]
        assert f"/{folder}" in known, path
