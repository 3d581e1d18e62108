"""A fleet for each test, which must leave no process behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleets.worlds import World
from tests.waiting import PATIENCE_S, wait_until


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "fleet")
    yield world
    if world.root.exists():
        fleet = world.fleet()
        fleet.terminate([instance.token for instance in fleet.owned()])
    wait_until(lambda: not world.processes(), patience_s=PATIENCE_S)
