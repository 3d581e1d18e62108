"""Stores of every kind, folders, and a count of what moves."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from spotfirst.storage import Storage, open_storage
from tests.datasets.helpers import Traffic, Tree, fill


@pytest.fixture(params=["local", "memory", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(str(tmp_path / "storage"))
    if request.param == "memory":
        return open_storage(f"memory://{uuid.uuid4().hex}")
    return open_storage(request.getfixturevalue("s3_url"))


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "storage"))


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str, Tree], Path]:
    """Make a folder by name with these files."""
    return lambda name, tree: fill(tmp_path / name, tree)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPOTFIRST_CACHE", str(tmp_path / "user-cache"))


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    seen = Traffic()

    def watch(verb: str, size: Callable[[tuple[Any, ...], Any], int]) -> None:
        original = getattr(Storage, verb)

        def watched(self: Storage, *args: Any, **more: Any) -> Any:
            result = original(self, *args, **more)
            path = next(a for a in args if isinstance(a, str))
            seen.calls.append((verb, path, size(args, result)))
            return result

        monkeypatch.setattr(Storage, verb, watched)

    watch("walk", lambda *_: 0)
    watch("size_bytes", lambda *_: 0)
    watch("read", lambda _, result: len(result))
    watch("write", lambda args, _: len(args[1]))
    watch("create", lambda args, _: len(args[1]))
    watch("upload", lambda args, _: args[0].stat().st_size)
    watch("download", lambda args, _: args[1].stat().st_size)
    return seen
