"""The instance metadata service, version 2, as far as a training instance asks it.

Formats and status codes are those of the EC2 user guide ("Use the Instance Metadata Service",
"Spot Instance interruption notices"): a session token from a PUT, and 404 for what is not there,
which is how the absence of a notice is told.
"""

from __future__ import annotations

import json
import secrets
import socketserver
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from threading import Lock, Thread

__all__ = ["MetadataService", "iso_second"]

_TTL_HEADER = "x-aws-ec2-metadata-token-ttl-seconds"
_TOKEN_HEADER = "x-aws-ec2-metadata-token"  # noqa: S105 - a header's name
_LONGEST_TTL_S = 21600
_LONGEST_LINE = 8192
_MOST_HEADERS = 100
_REASONS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
}


def iso_second(moment: datetime) -> str:
    """A time as EC2 writes it: UTC, whole seconds (the fraction is dropped), and a Z."""
    return moment.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class MetadataService:
    """Serves ``facts`` (path below ``/latest/`` to text) on a free port of 127.0.0.1.

    The port is bound at once; answers are given from :meth:`start` on.
    """

    def __init__(
        self, facts: Mapping[str, str], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._facts = dict(facts)
        self._clock = clock
        self._tokens: dict[str, float] = {}
        self._lock = Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.service = self

    @property
    def endpoint(self) -> str:
        """What to set AWS_EC2_METADATA_SERVICE_ENDPOINT to."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    def start(self) -> None:
        """Answer, in threads that end with the process."""
        Thread(target=self._server.serve_forever, args=(0.5,), daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()

    def post_notice(self, *, kill_at: datetime, now: datetime) -> None:
        """From now on, tell of the interruption at ``kill_at``, with a rebalance recommendation."""
        when = iso_second(kill_at)
        with self._lock:
            self._facts |= {
                "meta-data/spot/instance-action": json.dumps({"action": "terminate", "time": when}),
                "meta-data/spot/termination-time": when,
                "meta-data/events/recommendations/rebalance": json.dumps(
                    {"noticeTime": iso_second(now)}
                ),
            }

    def answer(
        self, method: str, path: str, headers: Mapping[str, str]
    ) -> tuple[int, str, dict[str, str]]:
        """Status, text and headers for a request; header names are in lower case."""
        if method == "PUT":
            return self._give_token(path, headers)
        if method not in {"GET", "HEAD"}:
            return 405, "", {}
        with self._lock:
            expires = self._tokens.get(headers.get(_TOKEN_HEADER, ""))
            if expires is None or expires <= self._clock():
                return 401, "", {}
            text = self._facts.get(path.partition("?")[0].removeprefix("/latest/").rstrip("/"))
        return (404, "", {}) if text is None else (200, text, {})

    def _give_token(self, path: str, headers: Mapping[str, str]) -> tuple[int, str, dict[str, str]]:
        if path.rstrip("/") != "/latest/api/token":
            return 405, "", {}
        if "x-forwarded-for" in headers:  # as EC2 does, against open proxies
            return 403, "", {}
        text = headers.get(_TTL_HEADER, "")
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _LONGEST_TTL_S):
            return 400, "", {}
        token = secrets.token_urlsafe(42)
        now = self._clock()
        with self._lock:
            self._tokens = {t: expires for t, expires in self._tokens.items() if expires > now}
            self._tokens[token] = now + int(text)
        return 200, token, {_TTL_HEADER: text}


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    service: MetadataService


class _Handler(socketserver.StreamRequestHandler):
    """Just enough of HTTP: ``http.server`` would double the time that a supervisor starts in."""

    timeout = 10
    server: _Server

    def handle(self) -> None:
        """Answer one request, and close the connection."""
        try:
            words = self._line().split(" ")
            headers = {}
            for _ in range(_MOST_HEADERS):
                line = self._line()
                if not line:
                    break
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            if len(words) == 3:
                status, text, extra = self.server.service.answer(words[0], words[1], headers)
            else:
                status, text, extra = 400, "", {}
            body = text.encode()
            head = [f"HTTP/1.1 {status} {_REASONS[status]}", "Server: EC2ws"]
            head += [f"{name}: {value}" for name, value in extra.items()]
            head += ["Content-Type: text/plain", f"Content-Length: {len(body)}"]
            head += ["Connection: close", "", ""]
            self.wfile.write("\r\n".join(head).encode() + (b"" if words[0] == "HEAD" else body))
        except OSError:
            return  # the caller went away

    def _line(self) -> str:
        return self.rfile.readline(_LONGEST_LINE).decode("latin-1").rstrip("\r\n")
