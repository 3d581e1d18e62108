"""One real Airflow for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.airflow.world import World, belongs


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    for name in [n for n in os.environ if n.startswith(("AWS_", "SPOTFIRST_"))]:
        del os.environ[name]
    world = World(tmp_path_factory.mktemp("airflow"))
    with world.airflow:
        world.log_in()
        world.airflow.client().wait_for_dag("unrendered")
        yield world
        left = [pid for pid in world.airflow.survivors() if not belongs(world, pid)]
    assert not left, f"processes {left} outlived their runs"
