from __future__ import annotations

import secrets
from datetime import datetime, timezone
from pathlib import Path

import pytest

from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage, open_storage

LONG_AGO = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def storage() -> Storage:
    return open_storage(f"memory://{secrets.token_hex(8)}")


@pytest.fixture
def packs(storage: Storage) -> Storage:
    return storage.child("packs")


@pytest.fixture
def run(storage: Storage) -> Run:
    return create_run(storage, RunSpec(run_id="r", created_at=LONG_AGO, command=("train",)))


@pytest.fixture
def files_run(storage: Storage) -> Run:
    spec = RunSpec(run_id="f", created_at=LONG_AGO, command=("train",), checkpoint_mode="files")
    return create_run(storage, spec)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return tmp_path / "files"
