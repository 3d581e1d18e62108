"""An S3 server that costs next to nothing: it forgets what is large, and knows no signatures.

``python -m benchmarks.checkpointing.s3server [--keep]`` prints its port and serves on 127.0.0.1
until its standard input ends. Small objects are kept, because a checkpoint's chain is read again;
with ``--keep`` large ones are too, in memory. It speaks what checkpoints need: put and put-if-absent,
multipart, get by ranges, head, delete, delete of many, list.
"""

from __future__ import annotations

import argparse
import re
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

__all__ = ["Bucket", "serve"]

_SMALL_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 20
_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"
_STATUS = {
    200: "OK", 204: "No Content", 206: "Partial Content", 404: "Not Found",
    412: "Precondition Failed", 416: "Range Not Satisfiable",
}  # fmt: skip


@dataclass
class Bucket:
    """Objects by ``bucket/key``: their bytes, or only how many there were."""

    keep: bool
    objects: dict[str, memoryview | int] = field(default_factory=dict)
    uploads: dict[str, dict[int, memoryview | int]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


class _Connection:
    def __init__(self, connection: socket.socket, bucket: Bucket) -> None:
        self._socket = connection
        self._bucket = bucket
        self._unread = b""
        self._scratch = memoryview(bytearray(_BUFFER_BYTES))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(self) -> None:
        try:
            while self._serve_one():
                pass
        except (ConnectionError, TimeoutError):
            pass
        finally:
            self._socket.close()

    def _serve_one(self) -> bool:
        while b"\r\n\r\n" not in self._unread:
            received = self._socket.recv(65536)
            if not received:
                return False
            self._unread += received
        head, _, self._unread = self._unread.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        pairs = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        if "100-continue" in headers.get("expect", ""):
            self._socket.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self._body(headers)
        url = urlsplit(target)
        query = parse_qs(url.query, keep_blank_values=True)
        self._answer(method, unquote(url.path).strip("/"), query, headers, body)
        return headers.get("connection", "").lower() != "close"

    def _body(self, headers: Mapping[str, str]) -> memoryview | int:
        size = int(headers.get("content-length", "0"))
        chunked = "aws-chunked" in headers.get("content-encoding", "")
        if size > _SMALL_BYTES and not self._bucket.keep:
            left = size - len(self._unread)
            self._unread = b""
            while left > 0:
                got = self._socket.recv_into(self._scratch, min(left, _BUFFER_BYTES))
                if not got:
                    raise ConnectionResetError
                left -= got
            return int(headers.get("x-amz-decoded-content-length", size))
        data = memoryview(bytearray(size))
        begun = min(size, len(self._unread))
        data[:begun] = self._unread[:begun]
        self._unread = self._unread[begun:]
        while begun < size:
            got = self._socket.recv_into(data[begun:])
            if not got:
                raise ConnectionResetError
            begun += got
        return memoryview(_unchunked(bytes(data))) if chunked else data

    def _answer(
        self,
        method: str,
        name: str,
        query: Mapping[str, list[str]],
        headers: Mapping[str, str],
        body: memoryview | int,
    ) -> None:
        bucket = self._bucket
        if method == "PUT" and "uploadId" in query:
            with bucket.lock:
                bucket.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
            self._send(200)
        elif method == "PUT":
            with bucket.lock:
                refused = headers.get("if-none-match") == "*" and name in bucket.objects
                if not refused:
                    bucket.objects[name] = body
            self._send(412 if refused else 200)
        elif method == "POST":
            self._post(name, query, body)
        elif method == "DELETE":
            with bucket.lock:
                bucket.objects.pop(name, None)
                bucket.uploads.pop(query.get("uploadId", [""])[0], None)
            self._send(204)
        elif "/" not in name and method == "GET":
            self._list(name, query)
        else:
            self._get(name, headers, send=method == "GET")

    def _post(self, name: str, query: Mapping[str, list[str]], body: memoryview | int) -> None:
        bucket = self._bucket
        if "delete" in query:
            assert not isinstance(body, int)
            keys = re.findall(r"<Key>(.*?)</Key>", bytes(body).decode())
            with bucket.lock:
                for key in keys:
                    bucket.objects.pop(f"{name}/{key}", None)
            deleted = "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys)
            self._xml("DeleteResult", deleted)
        elif "uploads" in query:
            with bucket.lock:
                upload = f"upload-{len(bucket.uploads)}-{name.replace('/', '-')}"
                bucket.uploads[upload] = {}
            place, _, key = name.partition("/")
            self._xml(
                "InitiateMultipartUploadResult",
                f"<Bucket>{place}</Bucket><Key>{key}</Key><UploadId>{upload}</UploadId>",
            )
        else:
            with bucket.lock:
                parts = [
                    part for _, part in sorted(bucket.uploads.pop(query["uploadId"][0]).items())
                ]
            kept = [part for part in parts if not isinstance(part, int)]
            size = sum(part if isinstance(part, int) else len(part) for part in parts)
            whole = memoryview(b"".join(kept)) if len(kept) == len(parts) else size
            with bucket.lock:
                bucket.objects[name] = whole
            place, _, key = name.partition("/")
            self._xml(
                "CompleteMultipartUploadResult",
                f'<Bucket>{place}</Bucket><Key>{key}</Key><ETag>"0"</ETag>',
            )

    def _get(self, name: str, headers: Mapping[str, str], *, send: bool) -> None:
        with self._bucket.lock:
            found = self._bucket.objects.get(name)
        if found is None:
            error = b"<Error><Code>NoSuchKey</Code><Message>absent</Message></Error>"
            self._send(404, error if send else b"", {"Content-Type": "application/xml"})
            return
        size = found if isinstance(found, int) else len(found)
        start, end, status = 0, size, 200
        extra = {"Last-Modified": _DATE}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if asked:
            start = int(asked[1])
            end = min(size, int(asked[2]) + 1 if asked[2] else size)
            if start >= size:
                self._send(416)
                return
            status = 206
            extra["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        if not send:
            self._head(status, end - start, extra)
        elif isinstance(found, int):
            self._head(status, end - start, extra)
            for position in range(start, end, _BUFFER_BYTES):
                self._socket.sendall(self._scratch[: min(_BUFFER_BYTES, end - position)])
        else:
            self._send(status, found[start:end], extra)

    def _list(self, place: str, query: Mapping[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        delimiter = query.get("delimiter", [""])[0]
        start = query.get("start-after", [""])[0]
        with self._bucket.lock:
            names = {
                name[len(place) + 1 :]: value if isinstance(value, int) else len(value)
                for name, value in self._bucket.objects.items()
                if name.startswith(f"{place}/{prefix}")
            }
        contents, folders = "", set()
        for name, size in sorted(names.items()):
            if name <= start:
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            contents += (
                f"<Contents><Key>{escape(name)}</Key><Size>{size}</Size><ETag>&quot;0&quot;</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            )
        common = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            for name in sorted(folders)
        )
        self._xml(
            "ListBucketResult",
            f"<Name>{place}</Name><Prefix>{escape(prefix)}</Prefix><MaxKeys>100000</MaxKeys>"
            f"<KeyCount>{len(names)}</KeyCount><IsTruncated>false</IsTruncated>{contents}{common}",
        )

    def _xml(self, name: str, content: str) -> None:
        space = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
        text = f'<?xml version="1.0" encoding="UTF-8"?><{name} {space}>{content}</{name}>'
        self._send(200, text.encode(), {"Content-Type": "application/xml"})

    def _send(
        self, status: int, body: bytes | memoryview = b"", extra: Mapping[str, str] | None = None
    ) -> None:
        self._head(status, len(body), extra or {})
        if len(body):
            self._socket.sendall(body)

    def _head(self, status: int, size: int, extra: Mapping[str, str]) -> None:
        fields = {"Content-Length": str(size), "ETag": '"0"', "Accept-Ranges": "bytes", **extra}
        if status == 204:
            del fields["Content-Length"]
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._socket.sendall(f"HTTP/1.1 {status} {_STATUS[status]}\r\n{lines}\r\n".encode())


def _unchunked(data: bytes) -> bytes:
    """The content of an ``aws-chunked`` body; its checksums are believed."""
    found: list[bytes] = []
    position = 0
    while True:
        line_end = data.index(b"\r\n", position)
        size = int(data[position:line_end].partition(b";")[0], 16)
        if not size:
            return b"".join(found)
        found.append(data[line_end + 2 : line_end + 2 + size])
        position = line_end + 2 + size + 2


def serve(bucket: Bucket, listener: socket.socket) -> None:
    """Answer until the listener is closed; a thread for each connection."""
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_Connection(connection, bucket).run, daemon=True).start()


def main() -> None:
    """Serve until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpointing.s3server")
    parser.add_argument("--keep", action="store_true", help="keep large objects too")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    print(listener.getsockname()[1], flush=True)
    arguments = (Bucket(keep=options.keep), listener)
    threading.Thread(target=serve, args=arguments, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
