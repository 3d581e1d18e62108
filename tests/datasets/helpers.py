"""Folders for the tests of datasets, and what is counted while they move."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path

Tree = Mapping[str, bytes]


def later() -> datetime:
    """A clock by which every file of a test is old enough to be remembered."""
    return datetime.now(timezone.utc) + timedelta(minutes=1)


def fill(folder: Path, tree: Tree) -> Path:
    for key, data in tree.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if not path.is_dir()
    }


class Traffic:
    """The objects that went through a storage, as (verb, path, bytes)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int]] = []

    def of(self, *verbs: str, below: str = "") -> list[str]:
        return [path for verb, path, _ in self.calls if verb in verbs and path.startswith(below)]

    def bytes_of(self, *verbs: str, below: str = "") -> int:
        return sum(n for verb, path, n in self.calls if verb in verbs and path.startswith(below))
