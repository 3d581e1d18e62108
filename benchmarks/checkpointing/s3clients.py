"""The best bare clients of S3: they move bytes, and know nothing of checkpoints."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from functools import partial
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import obstore
import xxhash
from obstore.store import S3Store

from benchmarks.checkpointing.clock import Clock, Took
from benchmarks.checkpointing.limits import warm
from spotfirst.checkpoints.memory import Block, move

__all__ = ["LEAST", "BareClients"]

LEAST = "copied, hashed, checksummed"
"""The client that does what a checkpoint needs beside a training, and nothing else."""

_OBJECT_BYTES = 64 << 20
_PART_BYTES = 16 << 20
_RANGE_BYTES = 8 << 20
_THREADS = 4


class BareClients:
    """Put and get for one bucket, without a signature over the bytes and without checksums."""

    def __init__(self, environment: dict[str, str], bucket: str, clock: Clock) -> None:
        self._clock = clock

        def store(**more: Any) -> S3Store:
            return S3Store(
                bucket, endpoint=environment["AWS_ENDPOINT_URL_S3"],
                access_key_id=environment["AWS_ACCESS_KEY_ID"],
                secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
                region=environment["AWS_DEFAULT_REGION"], unsigned_payload=True,
                virtual_hosted_style_request=False, client_options={"allow_http": True}, **more,
            )  # fmt: skip

        self._store = store()
        self._checked = store(checksum_algorithm="crc64nvme")
        self._copies: Block | None = None

    def put(self, memory: memoryview) -> dict[str, Took]:
        """What it took to put all of it, by client; what was put is deleted."""
        ways: dict[str, Callable[[str, memoryview], None]] = {
            "obstore, multipart": self._put_parts,
            "obstore, objects": self._put_objects,
            "http, objects": self._put_http,
            LEAST: self._put_checked,
        }
        self._copies = self._copies or warm(len(memory))
        found = {}
        for number, (name, put) in enumerate(ways.items()):
            prefix = f"bare/{number}"
            found[name] = self._clock(lambda put=put, prefix=prefix: put(prefix, memory))  # type: ignore[misc]
            for batch in obstore.list(self._store, prefix):
                obstore.delete(self._store, [entry["path"] for entry in batch])
        return found

    def get(
        self, objects: Sequence[tuple[str, int]], target: memoryview, *, hashed: bool = False
    ) -> Took:
        """What it took to read objects (key, size) by plain ranges into ``target``.

        ``hashed``: and to hash each, without which nobody knows that it is what was written.
        """
        signed = {key: self._signed("GET", key) for key, _ in objects}
        calls = []
        position = 0
        for key, size in objects:
            for start in range(0, size, _RANGE_BYTES):
                length = min(_RANGE_BYTES, size - start)
                calls.append((signed[key], start, target[position : position + length]))
                position += length
        action = partial(_get_all, hashed=hashed)
        return self._clock(lambda: _in_threads(action, calls))

    def _put_parts(self, prefix: str, memory: memoryview) -> None:
        obstore.put(
            self._store, f"{prefix}/whole", memory, use_multipart=True, chunk_size=_PART_BYTES,
            max_concurrency=_THREADS,
        )  # fmt: skip

    def _put_objects(self, prefix: str, memory: memoryview) -> None:
        def put(call: tuple[str, memoryview]) -> None:
            obstore.put(self._store, call[0], call[1], use_multipart=False)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(put, _pieces(prefix, memory)))

    def _put_checked(self, prefix: str, memory: memoryview) -> None:
        assert self._copies is not None
        copies = self._copies.view[: len(memory)]

        def put(call: tuple[str, memoryview], piece: tuple[str, memoryview]) -> None:
            key, copied = call
            move(_address_of(copied), _address_of(piece[1]), len(copied))
            for start in range(0, len(copied), _RANGE_BYTES):
                xxhash.xxh3_128_hexdigest(copied[start : start + _RANGE_BYTES])
            obstore.put(self._checked, key, copied, use_multipart=False)

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(put, _pieces(prefix, copies), _pieces(prefix, memory)))

    def _put_http(self, prefix: str, memory: memoryview) -> None:
        pieces = _pieces(prefix, memory)
        calls = [(self._signed("PUT", key), 0, piece) for key, piece in pieces]
        _in_threads(_put_all, calls)

    def _signed(self, method: Any, key: str) -> str:
        return obstore.sign(self._store, method, key, timedelta(hours=1))


def _pieces(prefix: str, memory: memoryview) -> list[tuple[str, memoryview]]:
    starts = range(0, len(memory), _OBJECT_BYTES)
    return [(f"{prefix}/{n:06d}", memory[s : s + _OBJECT_BYTES]) for n, s in enumerate(starts)]


def _address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


_Call = tuple[str, int, memoryview]


def _in_threads(action: Callable[[Sequence[_Call]], None], calls: Sequence[_Call]) -> None:
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(action, (calls[n::_THREADS] for n in range(_THREADS))))


def _put_all(calls: Sequence[_Call]) -> None:
    if not calls:
        return
    with closing(_connection(calls[0][0])) as connection:
        for url, _, memory in calls:
            connection.request("PUT", _target(url), body=memory)
            _expect(connection.getresponse(), 200).read()


def _get_all(calls: Sequence[_Call], *, hashed: bool) -> None:
    if not calls:
        return
    with closing(_connection(calls[0][0])) as connection:
        for url, start, memory in calls:
            end = start + len(memory) - 1
            connection.request("GET", _target(url), headers={"Range": f"bytes={start}-{end}"})
            response = _expect(connection.getresponse(), 206)
            begun = 0
            while begun < len(memory):
                got = response.readinto(memory[begun:])
                if not got:
                    msg = f"{url} ended after {begun} of {len(memory)} bytes"
                    raise ConnectionError(msg)
                begun += got
            response.read()
            if hashed:
                xxhash.xxh3_128_hexdigest(memory)


def _connection(url: str) -> HTTPConnection:
    connection = HTTPConnection(urlsplit(url).netloc)
    connection.blocksize = 1 << 20
    return connection


def _target(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.path}?{parts.query}"


def _expect(response: HTTPResponse, status: int) -> HTTPResponse:
    if response.status != status:
        msg = f"the S3 server answered {response.status}: {response.read()[:500]!r}"
        raise ConnectionError(msg)
    return response
