"""S3 with access points, for agents that run: moto's server, behind what decides on each request.

A bucket's name that ends like an alias leads to the bucket, if the access point's policy allows the
request. Whoever asks says which instance it is by its access key.
"""

from __future__ import annotations

import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer
from typing_extensions import Self

from tests.fleets.ec2.policies import decide

ACCOUNT = "123456789012"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/spotfirst"
_DROPPED = {"host", "connection", "transfer-encoding", "content-length"}
_KEY = re.compile(r"Credential=([^/%]+)[/%]")


class Gateway:
    """Use it as a context manager."""

    def __init__(self) -> None:
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.policies: dict[str, str] = {}
        """By alias."""
        self.bucket = ""
        self.denied: list[tuple[str, str, str]] = []
        """(instance, action, path) of each request that was refused."""
        gateway = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                gateway.serve(self)

            def log_message(self, *_: object) -> None:
                pass

        for verb in ("PUT", "POST", "DELETE", "HEAD"):
            setattr(Handler, f"do_{verb}", Handler.do_GET)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._moto.start()
        host, port = self._moto.get_host_and_port()
        self._behind = f"http://{host}:{port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._moto.stop()

    def point_arn(self, alias: str) -> str:
        """The access point's."""
        return f"arn:aws:s3:us-east-1:{ACCOUNT}:accesspoint/{alias.removesuffix('-s3alias')}"

    def serve(self, request: Any) -> None:
        parts = urllib.parse.urlsplit(request.path)
        bucket, _, key = urllib.parse.unquote(parts.path).lstrip("/").partition("/")
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        body = _body(request)
        asked = (
            [("", "")]
            if not bucket.endswith("-s3alias")
            else _asked(request.command, key, query, body)
        )
        found = _KEY.search(request.headers.get("Authorization", ""))
        who = found[1] if found else query.get("X-Amz-Credential", "").partition("/")[0]
        refused = [each for each in asked if each[0] and not self._may(bucket, who, *each, query)]
        if refused:
            self.denied += [(who, *each) for each in refused]
            _answer(request, 403, {}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        place = parts.path if not asked[0][0] else parts.path.replace(bucket, self.bucket, 1)
        url = f"{self._behind}{place}?{parts.query}".rstrip("?")
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _DROPPED}
        headers.setdefault("Content-Type", "application/octet-stream")
        forward = urllib.request.Request(
            url, data=body if request.command in {"PUT", "POST"} else None,
            method=request.command, headers=headers,
        )  # fmt: skip
        try:
            with urllib.request.urlopen(forward, timeout=60) as answer:
                _answer(request, answer.status, dict(answer.headers), answer.read())
        except urllib.error.HTTPError as error:
            _answer(request, error.code, dict(error.headers), error.read())

    def _may(self, alias: str, who: str, action: str, path: str, query: dict[str, str]) -> bool:
        arn = self.point_arn(alias)
        context = {
            "aws:PrincipalArn": ROLE,
            "ec2:SourceInstanceARN": f"arn:aws:ec2:us-east-1:{ACCOUNT}:instance/{who}",
        }
        if action == "s3:ListBucket" and "prefix" in query:
            context["s3:prefix"] = query["prefix"]
        statements = json.loads(self.policies[alias])["Statement"]
        resource = f"{arn}/object/{path}" if path else arn
        return decide(statements, action, resource, context) == "allowed"


def _asked(method: str, key: str, query: dict[str, str], body: bytes) -> list[tuple[str, str]]:
    """The actions of a request, and on what."""
    if not key:
        if "delete" in query:
            keys = re.findall(rb"<Key>([^<]+)</Key>", body)
            return [("s3:DeleteObject", each.decode()) for each in keys]
        listing = not query or "list-type" in query or "prefix" in query
        return [("s3:ListBucket" if listing and "uploads" not in query else "s3:Other", "")]
    action = {"GET": "GetObject", "HEAD": "GetObject", "DELETE": "DeleteObject"}.get(
        method, "PutObject"
    )
    if "uploadId" in query and method in {"GET", "DELETE"}:
        action = "ListMultipartUploadParts" if method == "GET" else "AbortMultipartUpload"
    return [(f"s3:{action}", key)]


def _body(request: Any) -> bytes:
    if "chunked" in request.headers.get("Transfer-Encoding", ""):
        data = b""
        while size := int(request.rfile.readline().split(b";")[0], 16):
            data += request.rfile.read(size)
            request.rfile.readline()
        request.rfile.readline()
        return data
    return bytes(request.rfile.read(int(request.headers.get("Content-Length") or 0)))


def _answer(request: Any, status: int, headers: dict[str, str], body: bytes) -> None:
    request.send_response_only(status)
    length = headers.pop("Content-Length", None) if request.command == "HEAD" else None
    for name, value in headers.items():
        if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
            request.send_header(name, value)
    request.send_header("Content-Length", length or str(len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
