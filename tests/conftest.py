"""Fixtures for all tests."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from devstack.s3 import S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator

# On a busy machine a slow example says nothing about the code.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

_HERE = Path(__file__).parent
_TOGETHER = {
    "airflow": ["airflow/"],  # they share one Airflow
    # Each starts one of its own: one at a time.
    "stacks": ["demo/", "repository/test_compose_natively.py", "repository/test_devstack.py"],
}


@pytest.hookimpl(tryfirst=True)  # before the groups are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a file's tests in one process, and all that would compete for something heavy."""
    for item in items:
        place = item.path.relative_to(_HERE).as_posix()
        groups = [g for g, places in _TOGETHER.items() if place.startswith(tuple(places))]
        item.add_marker(pytest.mark.xdist_group(groups[0] if groups else place))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Yield a real S3 server, shared by all tests; `s3.environment()` is how to reach it."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3_url(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return an empty prefix of the test's own, and point this process's AWS variables at it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    return f"{s3.url}/{uuid.uuid4().hex}"
