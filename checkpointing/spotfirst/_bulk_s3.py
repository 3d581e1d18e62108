"""Large objects to and from S3 at the speed of the network, beside s3fs, which has the rest.

Written with obstore: several connections per object, unsigned payload, a CRC-64 that the server
verifies. Read by plain HTTP range requests straight into the memory that the bytes are for. Where
the bucket is, and with which credentials, is asked of s3fs's client, so that both always agree.

What s3fs can do and these cannot (proxies, redirects, directory buckets, ...) raises
:class:`Unable`, and then goes through s3fs.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import http.client
import os
import re
import ssl
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import wait
from datetime import timedelta
from typing import Any
from urllib.parse import quote, urlsplit

__all__ = ["Bulk", "Unable", "can_serve", "failed"]

_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 4
_CONNECT_S = 3.0
_SILENCE_S = 6.0
"""How long a server may say nothing, as with s3fs."""
_LOOK_S = 4.0
"""A transfer that takes longer is looked after: does the server still answer others?"""
_SLOWEST_BYTES_PER_S = 50_000
"""What is slower than this, after a minute, has stopped."""
_SIGNED_S = 900
_RESIGN_S = 300.0
_IDLE = 32
_OPTIONS = {
    "anon",
    "client_kwargs",
    "config_kwargs",
    "endpoint_url",
    "key",
    "password",
    "profile",
    "secret",
    "session",
    "token",
    "use_ssl",
    "username",
}
_CLIENT_OPTIONS = {"endpoint_url", "region_name"}
_CONFIG_OPTIONS = {"connect_timeout", "max_pool_connections", "read_timeout", "retries", "s3"}
_AWS_HOST = re.compile(r"((?:.+\.)?s3)(?:\.[a-z0-9-]+)?\.(amazonaws\.com(?:\.cn)?)")
_SAFE_KEY = re.compile(r"[A-Za-z0-9_.=+@,/-]+")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_STATUS = re.compile(r"\bstatus(?: code)?:? (\d{3})\b")

_forked = False


def _after_fork() -> None:
    global _forked  # noqa: PLW0603 - a fact about this process
    _forked = _forked or "obstore" in sys.modules


# obstore's threads stay behind in a fork, and whoever calls it there waits for ever.
os.register_at_fork(after_in_child=_after_fork)


class Unable(Exception):
    """Not an error of the storage: s3fs has to do it."""


def can_serve(bucket: str, options: Mapping[str, Any]) -> bool:
    """Whether these s3fs options ask for nothing that only s3fs can do."""
    return (
        options.keys() <= _OPTIONS
        and (options.get("client_kwargs") or {}).keys() <= _CLIENT_OPTIONS
        and (options.get("config_kwargs") or {}).keys() <= _CONFIG_OPTIONS
        and not bucket.startswith("arn:")
        and not bucket.endswith("--x-s3")  # a directory bucket has sessions of its own
    )


class Bulk:
    """One bucket, in one process. Thread-safe.

    Errors are those of :mod:`http.client` and :class:`OSError`; one with an answer of the server
    has it in ``response``, as botocore's do.
    """

    def __init__(self, client: Any, bucket: str) -> None:
        """``client`` is s3fs's. Asks AWS for the bucket's region."""
        from fsspec.asyn import sync

        self._client = client
        self._bucket = bucket
        self._lock = threading.Lock()
        self._stores: dict[tuple[Any, bool], Any] = {}
        self._signed: dict[str, tuple[str, float]] = {}
        self._idle: deque[http.client.HTTPConnection] = deque()
        self._checksum = True
        url, self._region, self._credentials = sync(client.loop, _resolve, client, bucket)
        parts = urlsplit(url)
        self._base = f"{parts.scheme}://{parts.netloc}{parts.path}"
        self._path = parts.path
        self._netloc = parts.netloc
        self._certificates = ""
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            self._certificates = _certificates(client)
            self._tls = ssl.create_default_context(cafile=self._certificates)
        self._proxied = bool(urllib.request.getproxies().get(parts.scheme)) and not (
            urllib.request.proxy_bypass(parts.hostname or "")
        )
        atexit.register(self._close)

    def _close(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    # -- writing ------------------------------------------------------------------------------

    def put(self, key: str, data: memoryview) -> None:
        """Create or replace the object: it appears whole or not at all.

        A process that is killed, or cut off, leaves the parts of an unfinished multipart upload
        behind, which cost money and are seen by nobody: give the bucket a lifecycle rule that
        aborts incomplete multipart uploads after a day.
        """
        if _forked or self._proxied or not _SAFE_KEY.fullmatch(key):
            raise Unable
        try:
            self._put(key, data)
        except OSError as error:
            status = (
                getattr(error, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode")
            )
            if not self._checksum or status not in {400, 501} or self._is_aws:
                raise
            # A server of another make, perhaps older than this checksum.
            self._checksum = False
            self._put(key, data)

    def _put(self, key: str, data: memoryview) -> None:
        try:
            import obstore
            from obstore.exceptions import BaseError, InvalidPathError
        except ImportError as error:
            raise Unable from error
        store = self._store()
        try:
            self._attend(
                lambda: obstore.put_async(
                    store,
                    key,
                    data,
                    use_multipart=len(data) > _PART_BYTES,
                    chunk_size=_PART_BYTES,
                    max_concurrency=_PARTS_AT_ONCE,
                ),
                len(data),
            )
        except InvalidPathError as error:
            raise Unable from error
        except (BaseError, FileNotFoundError) as error:
            if len(data) > _PART_BYTES:
                self._abort(key)
            raise _from_obstore(error) from error

    def _abort(self, key: str) -> None:
        """Remove the parts of an upload that failed: obstore does not always.

        Should another writer be uploading the same object, it begins again.
        """
        place = {"Bucket": self._bucket}
        with contextlib.suppress(Exception):  # the error that led here is the one to tell
            found = self._client.call_s3("list_multipart_uploads", **place, Prefix=key)
            for upload in found.get("Uploads") or ():
                if upload["Key"] == key:
                    self._client.call_s3(
                        "abort_multipart_upload", **place, Key=key, UploadId=upload["UploadId"]
                    )

    def _attend(self, begin: Callable[[], Awaitable[object]], size_bytes: int) -> None:
        """Wait for a transfer, but not for a server that has gone.

        No time limit of obstore serves: each counts from a request's beginning, so one that ends
        a dead transfer soon would also end every slow one.
        """

        async def transfer() -> object:
            return await begin()

        future = asyncio.run_coroutine_threadsafe(transfer(), self._client.loop)
        ends = time.monotonic() + _longest_s(size_bytes)
        silent = 0
        try:
            while not wait([future], timeout=_LOOK_S).done:
                silent = 0 if self._answers() else silent + 1
                if silent > 1 or time.monotonic() > ends:
                    raise TimeoutError("the server does not answer any more")
            future.result()
        finally:
            future.cancel()

    def _answers(self) -> bool:
        """Whether the server says anything at all, in time, to somebody new."""
        try:
            with contextlib.closing(self._connect()) as connection:
                connection.request("HEAD", self._path)
                connection.getresponse().close()
        except (OSError, http.client.HTTPException):
            return False
        return True

    def _store(self) -> Any:
        from obstore.store import S3Store

        credentials = self._frozen()
        which = (credentials, self._checksum)
        with self._lock:
            if which not in self._stores:
                self._stores.clear()  # those of credentials that have run out
                options: Any = {
                    "allow_http": self._tls is None,
                    "connect_timeout": timedelta(seconds=_CONNECT_S),
                    "timeout": timedelta(hours=24),  # _attend knows better
                }
                if self._certificates:
                    with open(self._certificates, "rb") as file:  # noqa: PTH123 - a name, not a path
                        options["root_certificate"] = file.read()
                credential: Any = None
                config: Any = {
                    # Both names, as either may be in the environment.
                    "endpoint": self._base.rstrip("/"),
                    "aws_endpoint_url_s3": self._base.rstrip("/"),
                    # Of the one in the path too: the endpoint is said with its bucket.
                    "virtual_hosted_style_request": True,
                    "region": self._region,
                    "unsigned_payload": True,
                    "skip_signature": credentials is None,
                    "s3_express": False,
                }
                if self._checksum:
                    config["checksum_algorithm"] = "crc64nvme"
                if credentials is not None:
                    access_key, secret_key, token = credentials
                    credential = {
                        "access_key_id": access_key,
                        "secret_access_key": secret_key,
                        "token": token,
                        "expires_at": None,
                    }
                self._stores[which] = S3Store(
                    self._bucket,
                    config=config,
                    client_options=options,
                    retry_config={"max_retries": 0},  # only Storage retries
                    # Not in the config: then a token in the environment would be added.
                    credential_provider=None if credentials is None else lambda: credential,
                )
            return self._stores[which]

    # -- reading ------------------------------------------------------------------------------

    def get_into(self, key: str, start: int, targets: Sequence[memoryview]) -> int:
        """Fill ``targets`` with the object's bytes from ``start`` on; how many there were."""
        if self._proxied:
            raise Unable
        targets = [target for target in targets if len(target)]
        if not targets:
            return 0
        signed = key in self._signed
        try:
            return self._get_into(key, start, targets)
        except PermissionError:
            if not signed:
                raise
            self._signed.pop(key, None)  # with credentials that have run out since
            return self._get_into(key, start, targets)

    def _get_into(self, key: str, start: int, targets: Sequence[memoryview]) -> int:
        url = self._sign(key)
        headers = {"Range": f"bytes={start}-{start + sum(map(len, targets)) - 1}"}
        connection, response = self._get(url, headers)
        try:
            found = self._body(response, start, targets)
        except BaseException:
            connection.close()
            raise
        finally:
            response.close()
        if response.will_close or len(self._idle) >= _IDLE:
            connection.close()
        else:
            self._idle.append(connection)
        return found

    def _get(
        self, url: str, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        with contextlib.suppress(IndexError):
            kept = self._idle.pop()
            try:
                kept.request("GET", url, headers=dict(headers))
                return kept, kept.getresponse()
            except (ConnectionError, http.client.HTTPException):
                kept.close()  # the server had ended it meanwhile: no fault of anybody's
            except BaseException:
                kept.close()
                raise
        connection = self._connect()
        try:
            connection.request("GET", url, headers=dict(headers))
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _body(
        self, response: http.client.HTTPResponse, start: int, targets: Sequence[memoryview]
    ) -> int:
        if response.status == 416:  # it begins behind the object's end
            response.read()
            return 0
        said = response.getheader("Content-Range", "")
        if response.status in {301, 302, 307, 308} or (response.status == 200 and start):
            raise Unable
        if response.status not in {200, 206}:
            text = response.read(1 << 16).decode(errors="replace")
            raise _refused(response.status, text, f"{response.status} {response.reason}")
        size = int(response.getheader("Content-Length") or -1)
        wrong = response.status == 206 and not said.startswith(f"bytes {start}-{start + size - 1}/")
        wanted = sum(map(len, targets))
        if not 0 <= size <= wanted or wrong:
            msg = f"asked for {wanted} bytes from {start}, it sends {size}, range {said!r}"
            raise http.client.HTTPException(msg)
        done = 0
        left = list(reversed(targets))
        ends = time.monotonic() + _longest_s(size)
        while done < size:
            # One recv each, without the GIL, into the target itself.
            got = response.fp.readinto1(left[-1][: size - done])
            if not got:
                msg = f"it ended after {done} of {size} bytes"
                raise ConnectionResetError(msg)
            done += got
            target = left.pop()
            if got < len(target):
                left.append(target[got:])
            if time.monotonic() > ends:
                msg = f"only {done} of {size} bytes have come so far"
                raise TimeoutError(msg)
        return size

    def _connect(self) -> http.client.HTTPConnection:
        if self._tls is None:
            connection = http.client.HTTPConnection(self._netloc, timeout=_CONNECT_S)
        else:
            connection = http.client.HTTPSConnection(
                self._netloc, timeout=_CONNECT_S, context=self._tls
            )
        try:
            connection.connect()
        except BaseException:
            connection.close()
            raise
        connection.sock.settimeout(_SILENCE_S)
        return connection

    def _sign(self, key: str) -> str:
        """Path and query of the object, for any range of it."""
        now = time.monotonic()
        url, until = self._signed.get(key, ("", 0.0))
        if now < until:
            return url
        url = self._base + quote(key, safe="/-_.~")
        credentials = self._frozen()
        if credentials is not None:
            from botocore.auth import S3SigV4QueryAuth
            from botocore.awsrequest import AWSRequest
            from botocore.credentials import ReadOnlyCredentials

            request = AWSRequest(method="GET", url=url)
            S3SigV4QueryAuth(
                ReadOnlyCredentials(*credentials), "s3", self._region, expires=_SIGNED_S
            ).add_auth(request)
            url = request.url
        parts = urlsplit(url)
        url = f"{parts.path}?{parts.query}" if parts.query else parts.path
        with self._lock:
            if len(self._signed) > 10_000:
                self._signed.clear()
            self._signed[key] = (url, now + _RESIGN_S)
        return url

    # -- both -----------------------------------------------------------------------------------

    @property
    def _is_aws(self) -> bool:
        return _is_aws(urlsplit(self._base).hostname or "")

    def _frozen(self) -> tuple[str, str, str | None] | None:
        """Access key, secret and token as they are now; botocore renews them in time."""
        if self._credentials is None or isinstance(self._credentials, tuple):
            return self._credentials
        from fsspec.asyn import sync

        frozen = sync(self._client.loop, self._credentials.get_frozen_credentials)
        now = (frozen.access_key, frozen.secret_key, frozen.token)
        if not hasattr(self._credentials, "refresh_needed"):
            self._credentials = now
        return now


async def _resolve(client: Any, bucket: str) -> tuple[str, str, Any]:
    """The bucket's URL with a slash at the end, its region, and what credentials come from."""
    from botocore.exceptions import ClientError, NoCredentialsError

    s3 = await client.set_session()
    region = str(s3.meta.region_name)
    url = await s3.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
    parts = urlsplit(url)
    netloc = parts.netloc
    if _is_aws(parts.hostname or ""):
        try:
            answer = await s3.head_bucket(Bucket=bucket)
        except ClientError as error:
            answer = error.response
        told = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
        region = told or ("us-east-1" if region == "aws-global" else region)
        netloc = _regional(netloc, region)
    if client.anon:
        credentials: Any = None
    elif client.key and client.secret:
        credentials = (client.key, client.secret, client.token)
    else:
        credentials = await client.session.get_credentials()
        if credentials is None:
            raise NoCredentialsError
    return f"{parts.scheme}://{netloc}{parts.path.removesuffix('k')}", region, credentials


def _is_aws(host: str) -> bool:
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def _regional(netloc: str, region: str) -> str:
    """The endpoint of the bucket's own region, where s3fs's client would be redirected to it."""
    found = _AWS_HOST.fullmatch(netloc)
    return f"{found[1]}.{region}.{found[2]}" if found else netloc


def _certificates(client: Any) -> str:
    from botocore.httpsession import get_cert_path

    session = client.session
    return str(session.get_config_variable("ca_bundle") or get_cert_path(True))


def _longest_s(size_bytes: int) -> float:
    return 60 + size_bytes / _SLOWEST_BYTES_PER_S


def _from_obstore(error: Exception) -> OSError:
    text = str(error)
    kind = type(error).__name__
    # Certificates too: rustls does not take every one that OpenSSL, and so s3fs, accepts.
    if "redirect" in text.lower() or "InvalidCertificate" in text:
        raise Unable from error
    status = {"FileNotFoundError": 404, "PermissionDeniedError": 403, "UnauthenticatedError": 401}
    found = _STATUS.search(text)
    number = status.get(kind) or (int(found[1]) if found else 0)
    if number == 404 and "NoSuchBucket" not in text:
        number = 0  # of an upload, which somebody has aborted
    return _refused(number, text, text.partition("\n")[0])


def _refused(status: int, text: str, says: str) -> OSError:
    """An answer of the server as an error, with what S3's code for it is."""
    found = _CODE.search(text)
    code = found[1] if found else ""
    kinds = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}
    error = kinds.get(status, OSError)(f"{code}: {says}" if code else says)
    error.response = {  # type: ignore[attr-defined]
        "Error": {"Code": code},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return error


def failed(entry: Mapping[str, str]) -> OSError:
    """One of the ``Errors`` of an answer to DeleteObjects."""
    code = entry.get("Code", "")
    status = 403 if code == "AccessDenied" else 0
    return _refused(status, f"<Code>{code}</Code>", f"{entry.get('Key')}: {entry.get('Message')}")
