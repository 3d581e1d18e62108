"""Lost answers, refusals, dead servers, full disks."""

from __future__ import annotations

import errno
import os
import socket
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from devstack.s3 import S3Server
from spotfirst import _storage_local, _storage_s3
from spotfirst.errors import StorageDenied, StorageUnavailable, UnsupportedStorage
from spotfirst.storage import Storage, open_storage
from tests.waiting import PATIENCE_S


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    storage = open_storage(str(tmp_path / "storage"))
    storage.patience_s = 0.5
    return storage


@pytest.fixture
def on_s3(s3_url: str) -> Storage:
    return open_storage(s3_url)


class _Client:
    """An s3fs filesystem with a fault in ``pipe_file``."""

    def __init__(self, inner: Any, pipe_file: Any) -> None:
        self._inner = inner
        self.pipe_file = pipe_file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _with_fault(monkeypatch: pytest.MonkeyPatch, storage: Storage, make: Any) -> list[int]:
    inner = storage._fs
    calls: list[int] = []

    def pipe_file(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        return make(inner, len(calls), *args, **kwargs)

    client = _Client(inner, pipe_file)
    monkeypatch.setattr(_storage_s3, "_client", lambda options: client)
    return calls


def _lost() -> Exception:
    from botocore.exceptions import ConnectionClosedError

    return ConnectionClosedError(endpoint_url="http://127.0.0.1")


# -- S3 ---------------------------------------------------------------------------------------


def test_a_create_whose_answer_was_lost_is_ours(
    on_s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def applied_then_lost(inner: Any, call: int, *args: Any, **kwargs: Any) -> None:
        inner.pipe_file(*args, **kwargs)
        if call == 1:
            raise _lost()

    calls = _with_fault(monkeypatch, on_s3, applied_then_lost)
    assert on_s3.create("x", b"ours")
    assert len(calls) == 2  # the second found our own object: 412, and the same bytes
    assert not on_s3.create("x", b"theirs")


def test_a_create_whose_answer_is_lost_inside_the_client_is_ours(on_s3: Storage) -> None:
    """s3fs and botocore retry by themselves: the first answer we see is then the 412."""
    client = on_s3._fs
    on_s3.exists("x")  # so that there is a connection
    sent: list[str] = []

    def lose_first(**kwargs: Any) -> Any:
        sent.append("put")
        return None if len(sent) > 1 else _lost()

    events = client._s3.meta.events
    events.register("needs-retry.s3.PutObject", _retry_once(sent), unique_id="lost")
    try:
        assert on_s3.create("x", b"ours")
    finally:
        events.unregister("needs-retry.s3.PutObject", unique_id="lost")
    assert len(sent) == 2
    assert not on_s3.create("x", b"theirs")


def _retry_once(sent: list[str]) -> Any:
    def handler(**kwargs: Any) -> float | None:
        sent.append("answer")
        return 0.0 if len(sent) == 1 else None  # "retry now", as after a broken connection

    return handler


def test_a_conflict_of_two_writers_in_flight_is_tried_again(
    on_s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS answers 409 ConditionalRequestConflict while another conditional PUT is under way."""
    from botocore.exceptions import ClientError

    def conflict(inner: Any, call: int, *args: Any, **kwargs: Any) -> None:
        if call == 1:
            answer = {
                "Error": {"Code": "ConditionalRequestConflict", "Message": "in progress"},
                "ResponseMetadata": {"HTTPStatusCode": 409},
            }
            raise OSError(errno.EIO, "in progress") from ClientError(answer, "PutObject")
        inner.pipe_file(*args, **kwargs)

    _with_fault(monkeypatch, on_s3, conflict)
    assert on_s3.create("x", b"ours")


def test_a_server_that_ignores_the_condition_is_refused(
    on_s3: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ignores(inner: Any, call: int, full: str, data: bytes, mode: str = "") -> None:
        inner.pipe_file(full, data)

    _with_fault(monkeypatch, on_s3, ignores)
    with pytest.raises(UnsupportedStorage, match="If-None-Match"):
        on_s3.probe()


def test_a_missing_bucket_is_said_at_once(s3_url: str) -> None:
    storage = open_storage("s3://no-such-bucket-here/x")
    for call in (storage.read, storage.list):  # HEAD has no body to tell by
        with pytest.raises(StorageDenied, match="no such bucket") as caught:
            call("x")
        assert caught.value.lasting
    with pytest.raises(UnsupportedStorage, match=r"no-such-bucket-here.*no such bucket"):
        storage.probe()


def test_an_access_point_may_be_known_in_a_moment(s3_url: str) -> None:
    with pytest.raises(StorageDenied, match="no such bucket") as caught:
        open_storage("s3://r-0123456789abcdef-s3alias/x").read("x")
    assert not caught.value.lasting


@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_credentials_are_said_at_once(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "WRONGWRONGWRONG")
    began = time.monotonic()
    with pytest.raises(StorageDenied, match="Check the credentials") as caught:
        open_storage(s3_url).read("x")
    assert not caught.value.lasting, "keys rotate"
    with pytest.raises(UnsupportedStorage, match=s3_url):
        open_storage(s3_url).probe()
    assert time.monotonic() - began < PATIENCE_S


def test_no_credentials_are_said_at_once(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StorageDenied, match="Check the credentials") as caught:
        open_storage(s3_url).write("x", b"1")
    assert not caught.value.lasting, "a metadata service may be slow"


def test_an_endpoint_that_is_none_is_said(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "not a url")
    with pytest.raises(StorageDenied, match="AWS_ENDPOINT_URL_S3"):
        open_storage(s3_url).read("x")


def test_a_dead_server_is_known_within_patience(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free.getsockname()[1]}")
    storage = open_storage(s3_url)
    storage.patience_s = 1.0
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"could not read s3://.*EndpointConnectionError"):
        storage.read("x")
    assert 1.0 <= time.monotonic() - began < PATIENCE_S


@pytest.mark.slow
def test_a_server_that_never_answers_is_known_soon_after_patience(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(20)
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        storage = open_storage(s3_url)
        storage.patience_s = 1.0
        began = time.monotonic()
        with pytest.raises(StorageUnavailable, match="could not create"):
            storage.create("x", b"1")
        assert time.monotonic() - began < PATIENCE_S


def test_a_server_that_comes_back_is_not_noticed(
    s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(s3_url)
    failures = iter([_lost(), _lost()])

    def fails_twice(inner: Any, call: int, *args: Any, **kwargs: Any) -> None:
        for failure in failures:
            raise failure
        inner.pipe_file(*args, **kwargs)

    calls = _with_fault(monkeypatch, storage, fails_twice)
    storage.write("x", b"1")
    assert len(calls) == 3


def test_clients_are_shared_by_threads_and_storages(s3_url: str) -> None:
    assert open_storage(s3_url)._fs is open_storage(f"{s3_url}/other").child("x")._fs


# -- local ------------------------------------------------------------------------------------


def test_a_full_disk_leaves_no_half_object(
    local: Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    local.write("x", b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_storage_local.os, "fsync", full)
    for call in (lambda: local.write("x", b"new"), lambda: local.create("y", b"new")):
        with pytest.raises(StorageUnavailable, match="Free some space"):
            call()
    monkeypatch.undo()
    assert local.read("x") == b"old"
    assert local.list("") == ["x"]
    assert [path.name for path in (tmp_path / "storage").iterdir()] == ["x"]


def test_a_file_that_may_grow_no_more_is_a_full_disk(tmp_path: Path) -> None:
    """The same with the kernel's own error, from the middle of a write."""
    program = textwrap.dedent(f"""
        import resource, signal
        from spotfirst.storage import open_storage
        from spotfirst.errors import StorageUnavailable
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        storage = open_storage({str(tmp_path)!r})
        storage.patience_s = 0.2
        storage.write("small", b"x" * 100)
        try:
            storage.create("large", b"x" * 100_000)
        except StorageUnavailable as error:
            print("said:", error)
        print(storage.list(""))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "said: could not create" in done.stdout
    assert done.stdout.endswith("['small']\n")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_writer_killed_half_way_is_not_seen(local: Storage, tmp_path: Path) -> None:
    local.write("runs/a", b"1")
    (tmp_path / "storage/runs" / f".{'0' * 16}.partial").write_bytes(b"ha")
    assert local.list("runs") == ["a"]
    assert list(local.walk("runs")) == [("a", 1)]


def test_an_empty_folder_is_nothing(local: Storage, tmp_path: Path) -> None:
    (tmp_path / "storage/runs/dead").mkdir(parents=True)
    assert local.list("runs") == []


def test_files_can_be_read_by_whom_the_umask_says(local: Storage, tmp_path: Path) -> None:
    source = tmp_path / "private"
    source.write_bytes(b"1")
    source.chmod(0o600)
    before = os.umask(0o022)
    try:
        local.write("w", b"1")
        local.create("c", b"1")
        local.upload(source, "u")
    finally:
        os.umask(before)
    for name in "wcu":
        assert stat.S_IMODE((tmp_path / "storage" / name).stat().st_mode) == 0o644


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said(local: Storage, tmp_path: Path) -> None:
    (tmp_path / "storage").mkdir(mode=0o500)
    with pytest.raises(UnsupportedStorage, match="Check the owner"):
        local.probe()


@pytest.mark.parametrize(
    ("number", "says", "lasting"),
    [
        (errno.EACCES, "Check the owner", False),
        (errno.EROFS, "for writing", False),
        (errno.ENAMETOOLONG, "length", True),
    ],
)
def test_a_refusal_is_said_at_once_and_whether_it_may_pass(
    local: Storage, monkeypatch: pytest.MonkeyPatch, number: int, says: str, lasting: bool
) -> None:
    calls: list[int] = []

    def refuse(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(_storage_local.os, "fsync", refuse)
    with pytest.raises(StorageDenied, match=says) as caught:
        local.write("x", b"1")
    assert caught.value.lasting is lasting
    assert len(calls) == 1
    with pytest.raises(UnsupportedStorage, match="cannot be used"):
        local.probe()


def test_a_file_system_without_hard_links_is_said(
    local: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: object, target: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(_storage_local.os, "link", no_links)
    with pytest.raises(UnsupportedStorage, match="no hard links"):
        local.probe()


def test_a_file_in_the_way_of_a_folder_is_said(local: Storage) -> None:
    local.write("x", b"1")
    for call in (local.write, local.create):
        with pytest.raises(StorageDenied, match="in the way"):
            call("x/y", b"1")
    local.write("folder/y", b"1")
    with pytest.raises(StorageDenied, match="in the way"):
        local.write("folder", b"1")
