"""Fixtures of the end-to-end tests."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.endtoend.driving import Place, uninterrupted

STEPS = 200


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A storage in a folder, and a fleet, of the test's own."""
    return Place(storage=str(tmp_path / "storage"), folder=tmp_path / "place")


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What STEPS steps come to when nothing happens, and without Spotfirst."""
    return uninterrupted(tmp_path_factory.mktemp("uninterrupted"), STEPS)


@pytest.fixture(scope="module")
def chance() -> random.Random:
    """Moments are random; E2E_SEED repeats those of a failed test."""
    seed = int(os.environ.get("E2E_SEED") or random.SystemRandom().randrange(10**6))
    print(f"\nE2E_SEED={seed}")
    return random.Random(seed)
