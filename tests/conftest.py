"""Fixtures for all tests."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING

import pytest

from devstack.s3 import S3Server

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Yield a real S3 server; the AWS variables of this process point at it while it runs."""
    saved = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        os.environ.update(server.environment())
        yield server
    os.environ.clear()
    os.environ.update(saved)


@pytest.fixture
def s3_url(s3: S3Server) -> str:
    """Return an empty prefix of the test's own, as an fsspec URL."""
    return f"{s3.url}/{uuid.uuid4().hex}"
