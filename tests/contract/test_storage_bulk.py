"""Large buffers: whole or not at all, from any address, on every storage, through every fault."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import itertools
import json
import mmap
import multiprocessing
import os
import shutil
import socket
import ssl
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from spotfirst import _bulk_local, _bulk_s3
from spotfirst.errors import (
    CorruptObject,
    ObjectMissing,
    StorageDenied,
    StorageError,
    StorageUnavailable,
)
from spotfirst.storage import Storage, open_storage
from tests.waiting import PATIENCE_S

needs_obstore = pytest.mark.skipif(
    importlib.util.find_spec("obstore") is None, reason="on Python 3.10 s3fs writes in its own way"
)

PAGE = 4096
MIB = 1 << 20


def memory(size_bytes: int, shift: int = 0, fill: bytes = b"") -> memoryview:
    """Memory that begins ``shift`` bytes after a page does."""
    view = memoryview(mmap.mmap(-1, size_bytes + shift + PAGE))[shift : shift + size_bytes]
    address = ctypes.addressof(ctypes.c_char.from_buffer(view)) if size_bytes else shift
    assert address % PAGE == shift
    if fill:
        view[:] = (fill * (size_bytes // len(fill) + 1))[:size_bytes]
    return view


def pattern(size_bytes: int, shift: int = 0) -> memoryview:
    return memory(size_bytes, shift, bytes(range(256)) * 3 + b"odd")


# -- every storage ------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 64])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 3 * MIB, 8 * MIB + 3, 36 * MIB + 5])
def test_what_is_written_is_read(storage: Storage, size: int, shift: int) -> None:
    data = pattern(size, shift)
    storage.write_from("packs/x", data)
    assert storage.size_bytes("packs/x") == size
    for other in (0, 64):
        target = memory(size, other)
        storage.read_into("packs/x", 0, target)
        assert target == data
    assert storage.list("packs") == ["x"]


def test_any_range_is_read_and_nothing_beside_it(storage: Storage) -> None:
    data = pattern(10 * MIB + 11)
    storage.write_from("x", data)
    starts = [0, 1, 4095, 4096, 5 * MIB - 1]
    sizes = [1, 4096, 4097, MIB, 5 * MIB + 7]
    for start, size, shift in itertools.product(starts, sizes, (0, PAGE - 10)):
        around = memory(size + 20, shift, b"\xee")
        storage.read_into("x", start, around[10 : 10 + size])
        assert around[10 : 10 + size] == data[start : start + size]
        assert bytes(around[:10]) == bytes(around[10 + size :]) == b"\xee" * 10


def test_pieces_of_memory_are_filled_one_after_the_other(storage: Storage) -> None:
    data = pattern(5 * MIB + 3)
    storage.write_from("x", data)
    pieces = [memory(size) for size in (3, 0, 2 * MIB, 1, 700_000, 64)]
    storage.read_scattered("x", 1000, pieces)
    assert b"".join(pieces) == data[1000 : 1000 + sum(map(len, pieces))]
    with pytest.raises(CorruptObject, match="ends 10 bytes before"):
        storage.read_scattered("x", len(data) - 20, [memory(15), memory(15)])


def test_an_object_is_replaced_by_a_shorter_one(storage: Storage) -> None:
    storage.write_from("x", pattern(3 * MIB))
    storage.write_from("x", memoryview(b"short"))
    assert storage.read("x") == b"short"


def test_memory_of_other_types_counts_in_bytes(storage: Storage) -> None:
    words = memoryview(bytearray(8000)).cast("Q")
    words[:] = memoryview(bytes(range(200)) * 40).cast("Q")
    storage.write_from("x", words)
    found = memoryview(bytearray(8000)).cast("d")
    storage.read_into("x", 0, found)
    assert found.tobytes() == words.tobytes() == storage.read("x")


@pytest.mark.parametrize(("start", "size"), [(0, 10_001), (9_990, 11), (10_000, 1), (50_000, 1)])
def test_an_object_that_ends_too_early_is_damaged(storage: Storage, start: int, size: int) -> None:
    storage.write_from("x", pattern(10_000))
    with pytest.raises(CorruptObject, match=r"/x is damaged: it ends"):
        storage.read_into("x", start, memory(size))


def test_a_missing_object_is_said(storage: Storage) -> None:
    for name in ("gone", "also/gone"):
        with pytest.raises(ObjectMissing, match=name) as raised:
            storage.read_into(name, 0, memory(5))
        assert raised.value.path == name


def test_many_threads_write_and_read_at_once(storage: Storage) -> None:
    sizes = [17 * MIB + 1, 5000, 2 * MIB, 1] * 4

    def work(number: int) -> bool:
        data = pattern(sizes[number], number * 8)
        storage.write_from(f"t/{number}", data)
        target = memory(len(data), number)
        storage.read_into(f"t/{number}", 0, target)
        return target == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(len(sizes))))


@pytest.mark.parametrize("name", ["a b", "ü/ß", "100%", "a%20b", "x#y?z", "a~b", "(1)[2]"])
def test_names_are_those_of_the_other_calls(storage: Storage, name: str) -> None:
    storage.write_from(name, pattern(20))
    assert storage.read(name) == bytes(pattern(20))
    target = memory(20)
    storage.read_into(name, 0, target)
    assert target == pattern(20)
    storage.delete_many([name])
    assert not storage.exists(name)


def test_many_objects_are_deleted_and_no_others(storage: Storage) -> None:
    names = [f"d/{number:04d}" for number in range(1500)]
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(lambda name: storage.write(name, b"1"), [*names[:1100:10], "d/kept"]):
            pass
    storage.delete_many([*names, "d/0000"])
    assert storage.list("d") == ["kept"]
    storage.delete_many([])


def test_the_random_numbers_of_a_training_script_stay_as_they_are(storage: Storage) -> None:
    import random

    random.seed(1)
    before = random.getstate()
    storage.write_from("x", pattern(20 * MIB))
    storage.read_into("x", 0, memory(MIB))
    storage.delete_many(["x"])
    assert random.getstate() == before


def _in_child(url: str) -> None:
    storage = open_storage(url)
    target = memory(20 * MIB)
    storage.read_into("parent", 0, target)
    storage.write_from("child", target)
    storage.delete_many(["old"])


def _with_a_child(url: str) -> None:
    storage = open_storage(url)
    storage.write_from("parent", pattern(20 * MIB))
    storage.read_into("parent", 0, memory(10))
    storage.write("old", b"1")
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(url,))
    child.start()
    try:
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    storage.write_from("parent", pattern(20 * MIB))  # the parent's connections still work
    storage.read_into("parent", 0, memory(10))


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_forked_child_goes_on_by_itself(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """obstore would wait for ever there for threads that are the parent's."""
    url = str(tmp_path) if kind == "local" else request.getfixturevalue("s3_url")
    # In a process of its own: this one may have threads of other tests, whose locks would stay
    # locked in its child for ever.
    parent = multiprocessing.get_context("spawn").Process(target=_with_a_child, args=(url,))
    parent.start()
    parent.join(120)
    assert parent.exitcode == 0
    storage = open_storage(url)
    assert storage.read("child") == bytes(pattern(20 * MIB))
    assert storage.list("") == ["child", "parent"]


# -- local ----------------------------------------------------------------------------------------


@pytest.fixture
def local(tmp_path: Path) -> Storage:
    storage = open_storage(str(tmp_path / "storage"))
    storage.patience_s = 0.3
    return storage


def test_where_the_cache_cannot_be_passed_it_is_used(
    local: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bulk_local, "_pass_cache", lambda descriptor, direct: False)
    data = pattern(3 * MIB + 5)
    local.write_from("x", data)
    target = memory(3 * MIB)
    local.read_into("x", 5, target)
    assert target == data[5:]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs")
def test_a_file_system_in_memory_will_do() -> None:
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        storage = open_storage(folder)
        data = pattern(3 * MIB + 5, 64)
        storage.write_from("x", data)
        target = memory(3 * MIB + 5)
        storage.read_into("x", 0, target)
        assert target == data


def test_a_disk_that_takes_a_part_of_a_write_gets_the_rest(
    local: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(
        _bulk_local.os, "pwrite", lambda fd, data, at: real(fd, data[: len(data) // 3 + 1], at)
    )
    local.write_from("x", pattern(100_000))
    assert local.read("x") == bytes(pattern(100_000))


def _limited(before: str, folder: str) -> str:
    program = textwrap.dedent(f"""
        import resource, signal
        from pathlib import Path
        from spotfirst.storage import open_storage
        from spotfirst.errors import StorageUnavailable
        {before}
        storage = open_storage({folder!r})
        storage.patience_s = 0.2
        storage.write_from("x", memoryview(b"o" * 5000))
        for size in (4 << 20, (4 << 20) + 77):
            try:
                storage.write_from("x", memoryview(bytearray(size)))
            except StorageUnavailable as error:
                print("said:", error)
        assert storage.read("x") == b"o" * 5000
        print([path.name for path in Path({folder!r}).iterdir()])
    """)
    command = [sys.executable, "-c", program]
    if "mounted" in before:
        mount = f'mount -t tmpfs -o size=1m none {folder} && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", mount, "sh", *command]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _can_mount() -> bool:
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        return subprocess.run(mount, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.parametrize("how", ["full", "limit"])
def test_a_full_disk_leaves_the_old_object_and_nothing_else(tmp_path: Path, how: str) -> None:
    if how == "full" and not _can_mount():
        pytest.skip("this machine lets nobody mount a small disk")
    limit = (
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_100, 1_000_100))"
    )
    told = _limited("# mounted" if how == "full" else limit, str(tmp_path))
    assert told.count("Free some space") == 2
    assert told.endswith("['x']\n")


# -- S3: a server that does as it is told -----------------------------------------------------------

Answer = Callable[[socket.socket, str, bytes], None]


class Server:
    """Gives each request to ``answer``: its socket, method and target, head."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self.answer: Answer = lambda *_: None
        self.requests: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=50)
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
            while True:
                head = b""
                while not head.endswith(b"\r\n\r\n"):  # one at a time: the body is the answer's
                    more = connection.recv(1)
                    if not more:
                        return
                    head += more
                said = " ".join(head.decode().split(" ", 2)[:2])
                self.requests.append(said.split("?X-Amz", maxsplit=1)[0])
                self.answer(connection, said, head)
        except OSError:
            pass
        finally:
            connection.close()

    def close(self) -> None:
        for each in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # close() alone does not wake its thread
            each.close()


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line.split(b":")[1])
    return 0


def _take(connection: socket.socket, head: bytes, rate: float = 0) -> None:
    left = _length(head)
    while left > 0:
        more = connection.recv(min(left, 1 << 16))
        if not more:
            raise ConnectionResetError
        left -= len(more)
        if rate:
            time.sleep(len(more) / rate)


def _say(connection: socket.socket, status: str, body: bytes = b"", *headers: str) -> None:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", 'ETag: "x"', *headers, "", ""]
    connection.sendall("\r\n".join(lines).encode() + body)


def _refuse(connection: socket.socket, head: bytes, status: str, code: str) -> None:
    _take(connection, head)
    _say(connection, status, f"<Error><Code>{code}</Code></Error>".encode())
    connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    found = Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{found.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "tok/en")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield found
    found.close()


@pytest.fixture
def faulty(server: Server) -> Storage:
    storage = open_storage("s3://bucket/prefix")
    storage.patience_s = 0.3
    return storage


OBJECT = bytes(range(256)) * 40


def _ranged(connection: socket.socket, head: bytes, data: bytes = OBJECT) -> None:
    start, end = (int(n) for n in head.split(b"bytes=")[1].split(b"\r\n")[0].split(b"-"))
    part = data[start : end + 1]
    at = f"Content-Range: bytes {start}-{start + len(part) - 1}/{len(data)}"
    _say(connection, "206 Partial Content", part, at)


@needs_obstore
def test_requests_are_signed_with_all_of_the_credentials(server: Server, faulty: Storage) -> None:
    heads: list[str] = []

    def answer(connection: socket.socket, said: str, head: bytes) -> None:
        heads.append(head.decode())
        if said.startswith("PUT"):
            _take(connection, head)
            _say(connection, "200 OK")
        else:
            _ranged(connection, head)

    server.answer = answer
    faulty.write_from("x", memoryview(b"1234"))
    faulty.read_into("x", 10, memory(100))
    put, get = heads
    assert put.startswith("PUT /bucket/prefix/x HTTP/1.1")
    assert "Credential=AKTEST/" in put
    assert "/eu-west-1/s3/aws4_request" in put
    assert "x-amz-security-token: tok/en" in put
    assert "x-amz-content-sha256: UNSIGNED-PAYLOAD" in put
    assert "x-amz-checksum-crc64nvme: " in put
    assert get.startswith("GET /bucket/prefix/x?X-Amz-Algorithm=AWS4-HMAC-SHA256&")
    assert "X-Amz-Security-Token=tok%2Fen" in get
    assert "%2Feu-west-1%2Fs3%2Faws4_request" in get


def test_one_connection_serves_many_ranges_and_its_end_is_not_noticed(
    server: Server, faulty: Storage
) -> None:
    server.answer = lambda connection, said, head: _ranged(connection, head)
    target = memory(100)
    for _ in range(5):
        faulty.read_into("x", 256, target)
    assert len(server._open) == 1
    server._open[0].shutdown(socket.SHUT_RDWR)
    faulty.patience_s = 0
    faulty.read_into("x", 256, target)
    assert bytes(target) == OBJECT[256:356]


@pytest.mark.parametrize("fault", ["cut", "503", "SlowDown", "wrong range", "no length"])
def test_a_fault_of_the_moment_is_read_through(server: Server, faulty: Storage, fault: str) -> None:
    def answer(connection: socket.socket, said: str, head: bytes) -> None:
        if len(server.requests) > 2:
            _ranged(connection, head)
        elif fault == "cut":
            connection.sendall(
                b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-99/1000\r\nContent-Length: 100\r\n\r\n12"
            )
            connection.shutdown(socket.SHUT_RDWR)
        elif fault == "503":
            _refuse(connection, head, "503 Service Unavailable", "ServiceUnavailable")
        elif fault == "SlowDown":
            _refuse(connection, head, "429 Too Many", "SlowDown")
        elif fault == "wrong range":
            _say(connection, "206 Partial Content", b"x" * 100, "Content-Range: bytes 5-104/1000")
        else:
            connection.sendall(b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-99/1000\r\n\r\n")

    server.answer = answer
    target = memory(100)
    faulty.read_into("x", 0, target)
    assert bytes(target) == OBJECT[:100]
    assert len(server.requests) == 3


@pytest.mark.parametrize("size", [1000, 40 * MIB])
@pytest.mark.parametrize("fault", ["cut", "503"])
@needs_obstore
def test_a_fault_of_the_moment_is_written_through(
    server: Server, faulty: Storage, fault: str, size: int
) -> None:
    faults = iter([fault] * 2)
    lock = threading.Lock()
    begun: list[str] = []
    uploads: set[str] = set()

    def answer(connection: socket.socket, said: str, head: bytes) -> None:
        if said.startswith("GET"):
            with lock:
                left = [
                    f"<Upload><Key>prefix/x</Key><UploadId>{n}</UploadId></Upload>"
                    for n in sorted(uploads)
                ]
            _say(
                connection,
                "200 OK",
                f"<ListMultipartUploadsResult>{''.join(left)}</ListMultipartUploadsResult>".encode(),
            )
            return
        if said.startswith("DELETE"):
            with lock:
                uploads.discard(parse_qs(urlsplit(said).query)["uploadId"][0])
            _say(connection, "204 No Content")
            return
        if said.startswith("POST") and "uploads" in said:
            with lock:
                name = f"u{len(begun)}"
                begun.append(name)
                uploads.add(name)
            _say(
                connection,
                "200 OK",
                f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>".encode(),
            )
            return
        if said.startswith("PUT"):
            with lock:
                now = next(faults, "")
            if now == "cut":
                connection.shutdown(socket.SHUT_RDWR)
                return
            if now:
                _refuse(connection, head, "503 Service Unavailable", "SlowDown")
                return
        _take(connection, head)
        done = b"<CompleteMultipartUploadResult><ETag>x</ETag></CompleteMultipartUploadResult>"
        _say(connection, "200 OK", done if said.startswith("POST") else b"")

    server.answer = answer
    faulty.write_from("x", pattern(size))
    if size > MIB:
        assert len(begun) >= 2
        assert uploads <= {begun[-1]}  # the parts of broken ones are gone


@pytest.mark.parametrize(("status", "code"), [("403 Forbidden", "AccessDenied"), ("403 Forbidden", "InvalidAccessKeyId")])  # fmt: skip
def test_a_refusal_is_said_at_once(server: Server, faulty: Storage, status: str, code: str) -> None:
    server.answer = lambda connection, said, head: _refuse(connection, head, status, code)
    faulty.patience_s = 30
    for call in (
        lambda: faulty.write_from("x", memoryview(b"1")),
        lambda: faulty.read_into("x", 0, memory(9)),
        lambda: faulty.delete_many(["x"]),
    ):
        with pytest.raises(StorageDenied, match="Check the credentials"):
            call()
    assert len(server.requests) == 3


def test_a_missing_bucket_is_said_at_once(server: Server, faulty: Storage) -> None:
    server.answer = lambda connection, said, head: _refuse(
        connection, head, "404 Not Found", "NoSuchBucket"
    )
    faulty.patience_s = 30
    for call in (
        lambda: faulty.write_from("x", memoryview(b"1")),
        lambda: faulty.read_into("x", 0, memory(9)),
        lambda: faulty.delete_many(["x"]),
    ):
        with pytest.raises(StorageDenied, match="no such bucket"):
            call()


@needs_obstore
def test_credentials_of_a_role_are_renewed_in_time(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, or on an instance: they end soon, and come from an address."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"http://127.0.0.1:{server.port}/role")
    heads: list[str] = []
    given: list[str] = []

    def answer(connection: socket.socket, said: str, head: bytes) -> None:
        if said == "GET /role":
            given.append(f"KEY{len(given)}")
            ends = datetime.now(timezone.utc) + timedelta(minutes=5)
            keys = {"AccessKeyId": given[-1], "SecretAccessKey": "s", "Token": f"T{given[-1]}"}
            _say(connection, "200 OK", json.dumps(keys | {"Expiration": f"{ends:%FT%TZ}"}).encode())
            return
        heads.append(head.decode())
        if said.startswith("PUT"):
            _take(connection, head)
            _say(connection, "200 OK")
        else:
            _ranged(connection, head)

    server.answer = answer
    storage = open_storage("s3://role-bucket/x")
    for number in range(2):
        storage.write_from("x", memoryview(b"1"))
        newest = given[-1]
        assert f"Credential={newest}/" in heads[-1]
        assert f"x-amz-security-token: T{newest}" in heads[-1]
        storage.read_into(f"x{number}", 0, memory(10))
        assert f"X-Amz-Credential={given[-1]}%2F" in heads[-1]
    assert len(set(given)) >= 3


def test_wrong_credentials_are_said_at_once(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "WRONGWRONGWRONG")
    storage = open_storage(s3_url)
    for call in (
        lambda: storage.write_from("x", memoryview(b"1")),
        lambda: storage.read_into("x", 0, memory(9)),
    ):
        with pytest.raises(StorageDenied, match="Check the credentials"):
            call()


def test_no_credentials_are_said_at_once(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(StorageDenied, match="Check the credentials"):
        open_storage(s3_url).write_from("x", memoryview(b"1"))


def test_credentials_may_come_from_a_profile_or_from_options(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = os.environ["AWS_ACCESS_KEY_ID"]
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    endpoint = os.environ["AWS_ENDPOINT_URL_S3"]
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    profile = tmp_path / "credentials"
    profile.write_text(f"[lab]\naws_access_key_id={key}\naws_secret_access_key={secret}\n")
    config = tmp_path / "config"
    config.write_text(f"[profile lab]\nregion=us-east-1\nendpoint_url={endpoint}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(profile))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    # Of somebody else: it must not be mixed with the keys of the options.
    monkeypatch.setenv("AWS_SESSION_TOKEN", "stale")
    given = {"key": key, "secret": secret, "endpoint_url": endpoint}
    for number, options in enumerate([{"profile": "lab"}, given]):
        storage = open_storage(s3_url, options=options)
        storage.write_from(f"x{number}", pattern(5000))
        target = memory(5000)
        storage.read_into(f"x{number}", 0, target)
        assert target == pattern(5000)


def test_credentials_that_run_out_are_replaced(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage: Any = open_storage(s3_url)
    storage.write_from("x", pattern(5000))
    bulk, key = storage._bulk(storage._full("x"))
    good = bulk._sign(key)
    bulk._signed[key] = (good.replace("Signature=", "Signature=0"), time.monotonic() + 100)
    target = memory(5000)
    storage.read_into("x", 0, target)
    assert target == pattern(5000)


def test_an_option_that_only_s3fs_knows_goes_through_it(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(_bulk_s3.Bulk, "put", no)
    monkeypatch.setattr(_bulk_s3.Bulk, "get_into", no)
    options = {"s3_additional_kwargs": {"StorageClass": "STANDARD"}}
    storage = open_storage(s3_url, options=options)
    storage.write_from("x", pattern(5000))
    target = memory(5000)
    storage.read_into("x", 0, target)
    assert target == pattern(5000)


@pytest.fixture(params=["TRUE", "FALSE"])
def certificate(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """One for "localhost", and its key, signed by itself; with or without an authority's right."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl to make a certificate with")
    path = tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
        " -addext subjectAltName=DNS:localhost"
        f" -addext basicConstraints=critical,CA:{request.param} -keyout {path}.key -out {path}"
    )
    subprocess.run(command.split(), check=True, capture_output=True)
    return path


def test_a_certificate_is_verified_with_the_bundle_of_the_environment(
    server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, f"{certificate}.key")
    secure = Server(tls)

    def answer(connection: socket.socket, said: str, head: bytes) -> None:
        if said.startswith("PUT"):
            _take(connection, head)
            _say(connection, "200 OK")
        else:
            _ranged(connection, head, OBJECT * 500)

    secure.answer = answer
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"https://localhost:{secure.port}")
    stranger = open_storage("s3://bucket/x")
    stranger.patience_s = 0
    for call in (
        lambda: stranger.write_from("x", memoryview(b"1")),
        lambda: stranger.read_into("x", 0, memory(9)),
    ):
        with pytest.raises(StorageError):
            call()
    assert secure.requests == []
    monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
    # For s3fs, which has to help where rustls takes no authority for a server.
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    storage = open_storage("s3://bucket/x")
    storage.write_from("x", memoryview(b"1"))
    target = memory(3 * MIB)
    storage.read_into("x", 5, target)
    assert bytes(target) == (OBJECT * 500)[5 : 5 + 3 * MIB]
    assert [said.split()[0] for said in secure.requests] == ["PUT", "GET"]
    secure.close()


def test_a_dead_server_is_known_within_patience(server: Server, faulty: Storage) -> None:
    server.close()
    for call in (
        lambda: faulty.write_from("x", memoryview(b"1")),
        lambda: faulty.read_into("x", 0, memory(9)),
        lambda: faulty.delete_many(["x"]),
    ):
        began = time.monotonic()
        with pytest.raises(StorageUnavailable, match="could not"):
            call()
        assert time.monotonic() - began < PATIENCE_S


@needs_obstore
def test_a_server_that_falls_silent_is_known(
    server: Server, faulty: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bulk_s3, "_SILENCE_S", 0.5)
    monkeypatch.setattr(_bulk_s3, "_LOOK_S", 0.5)
    server.answer = lambda *_: threading.Event().wait(2 * PATIENCE_S)
    for call in (
        lambda: faulty.write_from("x", pattern(20 * MIB)),
        lambda: faulty.read_into("x", 0, memory(9)),
    ):
        began = time.monotonic()
        with pytest.raises(StorageUnavailable, match="Timeout"):
            call()
        assert time.monotonic() - began < PATIENCE_S


@needs_obstore
def test_a_slow_server_is_waited_for(
    server: Server, faulty: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_bulk_s3, "_SILENCE_S", 0.5)
    monkeypatch.setattr(_bulk_s3, "_LOOK_S", 0.3)

    def answer(connection: socket.socket, said: str, head: bytes) -> None:
        if said.startswith("PUT"):
            _take(connection, head, rate=4 * MIB)
        _say(connection, "200 OK")

    server.answer = answer
    began = time.monotonic()
    faulty.write_from("x", pattern(10 * MIB))
    assert time.monotonic() - began > 2
    assert sum(said.startswith("PUT") for said in server.requests) == 1
    assert any(said.startswith("HEAD") for said in server.requests)


@needs_obstore
def test_a_server_without_the_checksum_does_without(server: Server, faulty: Storage) -> None:
    def answer(connection: socket.socket, said: str, head: bytes) -> None:
        _take(connection, head)
        if b"crc64nvme" in head:
            _say(connection, "501 Not Implemented", b"<Error><Code>NotImplemented</Code></Error>")
        else:
            _say(connection, "200 OK")

    server.answer = answer
    for _ in range(3):
        faulty.write_from("x", memoryview(b"1"))
    assert len(server.requests) == 4


def test_the_endpoint_of_a_bucket_is_in_its_own_region() -> None:
    assert _bulk_s3._regional("b.s3.amazonaws.com", "eu-west-1") == "b.s3.eu-west-1.amazonaws.com"
    assert _bulk_s3._regional("s3.us-east-1.amazonaws.com", "x-y-2") == "s3.x-y-2.amazonaws.com"
    special = "b.s3.dualstack.eu-west-1.amazonaws.com"
    assert _bulk_s3._regional(special, "eu-west-1") == special
