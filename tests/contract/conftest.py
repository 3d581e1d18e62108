"""The same storage contract on every kind of storage."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from spotfirst.storage import Storage, open_storage

if TYPE_CHECKING:
    from pathlib import Path

_names = itertools.count()


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "storage"))
    if request.param == "memory":
        return open_storage(f"memory://contract-{next(_names)}")
    return open_storage(request.getfixturevalue("s3_url"))


@pytest.fixture
def memory() -> Storage:
    return open_storage(f"memory://contract-{next(_names)}")
