"""Objects in S3 and its likes, through s3fs."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spotfirst._bulk_s3 import Bulk, Unable, can_serve, failed
from spotfirst.errors import InvalidSpec, ObjectMissing, StorageError
from spotfirst.storage import Storage, denied, missing, unavailable

__all__ = ["S3Storage"]

_AT_ONCE = 32
"""Small requests in flight at a time."""

_CONFIG = {
    # Short, because Storage retries anyway: a dead server is known to be dead after
    # patience_s and the 6 s of one last call. Time spent sending does not count.
    "connect_timeout": 3,
    "read_timeout": 6,
    # Only Storage retries: botocore's backoff draws from the global random generator, and would
    # change the random numbers of the training script beside which this runs.
    "retries": {"mode": "standard", "total_max_attempts": 1},
    "max_pool_connections": _AT_ONCE,
}

# By name: botocore must not be imported only to compare with its classes.
_WITHOUT_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError"}
_UNUSABLE = {
    "InvalidConfigError",
    "InvalidEndpointConfigurationError",
    "InvalidRegionError",
    "NoRegionError",
    "ParamValidationError",
    "ProfileNotFound",
    "UnknownEndpointError",
}
_PASSING_STATUS = {408, 409, 425, 429}
_PASSING_CODES = {
    "BadDigest",
    "IncompleteBody",
    "OperationAborted",
    "ConditionalRequestConflict",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}

_DENIED_STATUS = {401, 403}
_DENIED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
"""S3 has the status 400 for them; and as ``KMS.…`` it passes on what a key's policy says."""

_DELETED_AT_ONCE = 1000
"""What one DeleteObjects takes."""

_clients: dict[tuple[Any, ...], Any] = {}
_bulks: dict[tuple[int, str], Bulk] = {}
_clients_lock = threading.Lock()


def _client(options: Mapping[str, Any]) -> Any:
    """The s3fs filesystem of this process for these options and this environment.

    One for all threads: fsspec would make one per thread, each with its own connections. Another
    one after a fork, because connections do not survive it.
    """
    environment = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    key = (os.getpid(), repr(sorted(options.items())), environment)
    client = _clients.get(key)  # without the lock: it may have been held during a fork
    if client is not None:
        return client
    with _clients_lock:
        if key not in _clients:
            from aiobotocore.session import AioSession
            from s3fs import S3FileSystem

            session = AioSession(profile=options.get("profile"))
            session.register("before-sign.s3", _expect_nothing)
            config = {**_CONFIG, **options.get("config_kwargs", {})}
            client = S3FileSystem(
                **{
                    # Listings must not be cached: other processes write beside us.
                    "use_listings_cache": False,
                    "skip_instance_cache": True,
                    "session": session,
                    **options,
                    "config_kwargs": config,
                }
            )
            client.retries = 1  # Storage retries, and knows how long
            _clients[key] = client
        return _clients[key]


def _expect_nothing(request: Any, **_: Any) -> None:
    """Send a body at once, without asking first (``Expect: 100-continue``).

    While aiohttp waits for the server's consent no timeout runs, so a PutObject to a server that
    is stuck would hang for ever; and small objects are written in half the time.
    """
    del request.headers["Expect"]  # no error when there is none


def _after_fork() -> None:
    global _clients_lock  # noqa: PLW0603 - another thread may have held it, and is not here
    _clients_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


class S3Storage(Storage):
    """Objects below a prefix of a bucket. ``options`` are s3fs's."""

    def __init__(self, url: str, root: str, options: Mapping[str, Any]) -> None:
        super().__init__(url, root)
        self._options = dict(options)

    @property
    def _fs(self) -> Any:
        return _client(self._options)

    def _at(self, url: str, root: str) -> Storage:
        return S3Storage(url, root, self._options)

    def _full(self, path: str) -> str:
        if "?versionId=" in path:  # s3fs cuts it off, and so would mix two objects up
            msg = f"path {path!r} has '?versionId=' in it, which S3 names cannot have; rename it"
            raise InvalidSpec(msg)
        return super()._full(path)

    def read_many(
        self, paths: Iterable[str], *, limit_bytes: int | None = None
    ) -> dict[str, bytes]:
        """Several small objects at once; one that is missing raises :class:`ObjectMissing`."""
        wanted = list(dict.fromkeys(paths))
        found: dict[str, bytes] = {}

        def read(_: str) -> None:
            left = [path for path in wanted if path not in found]
            for path, result in zip(left, self._fetch(left, limit_bytes), strict=True):
                if isinstance(result, FileNotFoundError) and not _no_bucket(result):
                    raise ObjectMissing(str(missing(f"read {self.url}/{path}")), path=path)
                if isinstance(result, BaseException):
                    raise result
                if limit_bytes is not None:
                    self._check_limit(path, result, limit_bytes)
                found[path] = result

        if wanted:
            self._call("read from", "", read)
        return {path: found[path] for path in wanted}

    def _fetch(self, paths: list[str], limit_bytes: int | None) -> list[bytes | BaseException]:
        from fsspec.asyn import sync

        client = self._fs
        part = {} if limit_bytes is None else {"start": 0, "end": limit_bytes + 1}

        async def gather() -> list[bytes | BaseException]:
            free = asyncio.Semaphore(_AT_ONCE)

            async def fetch(full: str) -> bytes:
                async with free:
                    try:
                        found = await client._cat_file(full, max_concurrency=1, **part)  # noqa: SLF001 - fsspec's coroutines are named so
                    except OSError as error:
                        if part and _response(error)[1] == 416:  # an empty object has no range
                            return b""
                        raise
                    return bytes(found)

            calls = [fetch(self._full(path)) for path in paths]
            return await asyncio.gather(*calls, return_exceptions=True)

        results: list[bytes | BaseException] = sync(client.loop, gather)
        return results

    def _read(self, full: str) -> bytes:
        # With more concurrency it would ask for the size first: two requests for a small object.
        return bytes(self._fs.cat_file(full, max_concurrency=1))

    def _read_range(self, full: str, start: int, end: int) -> bytes:
        if start == end:
            return b""
        try:
            return bytes(self._fs.cat_file(full, start=start, end=end))
        except OSError as error:
            if _response(error)[1] == 416:  # it starts behind the object's end
                return b""
            raise

    def _write(self, full: str, data: bytes) -> None:
        self._fs.pipe_file(full, data)

    def _write_from(self, full: str, data: memoryview) -> None:
        try:
            bulk, key = self._bulk(full)
            bulk.put(key, data)
        except Unable:
            self._write(full, bytes(data))

    def _read_into(self, full: str, start: int, target: memoryview) -> int:
        try:
            bulk, key = self._bulk(full)
            return bulk.get_into(key, start, [target])
        except Unable:
            return super()._read_into(full, start, target)

    reads_apart = False  # a request costs more than the bytes of a small tensor

    def read_scattered(self, path: str, start: int, targets: Sequence[memoryview]) -> None:
        """One request for all of them."""
        pieces = [target.cast("B") for target in targets]

        def read(full: str) -> int | None:
            try:
                bulk, key = self._bulk(full)
                return bulk.get_into(key, start, pieces)
            except Unable:
                return None

        found = self._call("read", path, read, tries=3)
        if found is None:
            super().read_scattered(path, start, pieces)
            return
        self._check_end(path, start, sum(map(len, pieces)), found)

    def _bulk(self, full: str) -> tuple[Bulk, str]:
        client = self._fs
        bucket, key, _ = client.split_path(full)
        if not can_serve(bucket, self._options):
            raise Unable
        place = (id(client), bucket)  # clients are never forgotten
        bulk = _bulks.get(place)
        if bulk is None:
            made = Bulk(client, bucket)
            with _clients_lock:
                bulk = _bulks.setdefault(place, made)
        return bulk, key

    def delete_many(self, paths: Iterable[str]) -> None:
        """Remove objects, several at once; no error for those that are not there."""
        names = list(dict.fromkeys(self._full(path) for path in paths))
        for start in range(0, len(names), _DELETED_AT_ONCE):
            some = names[start : start + _DELETED_AT_ONCE]
            self._call("delete from", "", partial(self._delete_several, some))

    def _delete_several(self, names: list[str], _: str) -> None:
        client = self._fs
        places = [client.split_path(name) for name in names]
        wanted = {"Objects": [{"Key": key} for _, key, _ in places], "Quiet": True}
        answer = client.call_s3("delete_objects", Bucket=places[0][0], Delete=wanted)
        for error in answer.get("Errors") or ():
            if error.get("Code") != "NoSuchKey":
                raise failed(error)

    def _create(self, full: str, data: bytes) -> None:
        try:
            self._fs.pipe_file(full, data, mode="create")
        except OSError as error:
            # s3fs knows the precondition only by a field that not every server sends.
            if _response(error)[1] == 412:
                raise FileExistsError(full) from error
            raise

    def _size_bytes(self, full: str) -> int:
        bucket, key, _ = self._fs.split_path(full)
        return int(self._fs.call_s3("head_object", Bucket=bucket, Key=key)["ContentLength"])

    def _list(self, full: str) -> Iterable[str]:
        found = (str(name).rstrip("/") for name in self._fs.ls(full, detail=False))
        return [name.rsplit("/", 1)[-1] for name in found if name != full]

    def _walk(self, full: str) -> Iterable[tuple[str, int]]:
        found = self._fs.find(full, detail=True)
        start = f"{full}/"
        return [
            (name.removeprefix(start), int(info["size"]))
            for name, info in found.items()
            if name.startswith(start) and not name.endswith("/")
        ]

    def _delete(self, full: str) -> None:
        self._fs.rm_file(full)

    def _upload(self, local: Path, full: str) -> None:
        self._fs.put_file(str(local), full)

    def _download(self, full: str, local: Path) -> None:
        self._fs.get_file(full, str(local))

    def _translate(self, error: Exception, what: str) -> StorageError | None:
        code, status = _response(error)
        if _no_bucket(error):
            advice = "Create it, or correct its name"
            # A new access point is not known everywhere at once.
            lasting = not self._root.partition("/")[0].endswith("-s3alias")
            return denied(what, "there is no such bucket", advice, lasting=lasting)
        if isinstance(error, FileNotFoundError):
            return missing(what)
        name = type(error).__name__
        may_pass = (
            isinstance(error, PermissionError)
            or name in _WITHOUT_CREDENTIALS
            or status in _DENIED_STATUS
            or code in _DENIED_CODES
            or code.startswith("KMS.")
        )
        if may_pass or name in _UNUSABLE:
            return denied(
                what,
                f"{name}: {error}",
                "Check the credentials (AWS_ACCESS_KEY_ID, …, or the instance's role), what they "
                "allow, and the endpoint (AWS_ENDPOINT_URL_S3)",
                lasting=not may_pass,
            )
        if isinstance(error, ValueError):  # how botocore refuses an endpoint
            advice = "Check AWS_ENDPOINT_URL_S3 and the bucket's name"
            return denied(what, error, advice, lasting=True)
        if 400 <= status < 500 and status not in _PASSING_STATUS and code not in _PASSING_CODES:
            advice = "The server will not take this request"
            return denied(what, f"{code}: {error}", advice, lasting=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSYS:
            advice = "The server lacks what Spotfirst needs"
            return denied(what, f"{code}: {error}", advice, lasting=True)
        home = type(error).__module__.partition(".")[0]
        if isinstance(error, (OSError, TimeoutError, asyncio.TimeoutError)) or home in {
            "aiobotocore",
            "aiohttp",
            "botocore",
            "http",
        }:
            return unavailable(what, error)
        return None


def _response(error: BaseException) -> tuple[str, int]:
    """The S3 error code and HTTP status behind an error; ``("", 0)`` when there was no answer."""
    seen: BaseException | None = error
    while seen is not None:
        response = getattr(seen, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            return code, int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        seen = seen.__cause__
    return "", 0


def _no_bucket(error: BaseException) -> bool:
    return _response(error)[0] == "NoSuchBucket"
