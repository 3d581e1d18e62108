"""Interruption notices and rebalance recommendations, from the instance metadata service.

The rules are those of AWS's "Spot Instance interruption notices" and "Use the Instance Metadata
Service": IMDSv2 needs a session token, 401 asks for a new one, and 404 means that there is no
notice. Anything else says nothing: an unreachable or confused service is never taken for a
notice, since acting on one destroys a healthy attempt.
"""

from __future__ import annotations

import http.client
import json
import urllib.parse
from datetime import datetime, timezone

from spotfirst.market import Notice
from spotfirst.wire import Clock, utc_now

__all__ = ["NoticeSource"]

_INTERRUPTION = "/latest/meta-data/spot/instance-action"
_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
_ACTIONS = {"terminate", "stop", "hibernate"}
_FIRST_YEAR, _LAST_YEAR = 2000, 2300
_TOKEN_TTL_S = 21600
_MAX_ANSWER_BYTES = 4096


class NoticeSource:
    """Asks one metadata service. Not thread-safe."""

    def __init__(self, url: str, *, timeout_s: float = 1.0, clock: Clock = utc_now) -> None:
        parts = urllib.parse.urlsplit(url)
        self._host, self._port = parts.hostname or "169.254.169.254", parts.port or 80
        self._base = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._clock = clock
        self._token = ""
        self.trouble = ""
        """Why the last :meth:`poll` could not tell whether there is an interruption; else empty."""

    def poll(self) -> Notice | None:
        """The gravest notice that is up now, or ``None`` when none is known. Never raises.

        Afterwards :attr:`trouble` says whether that is known, or the service did not tell.
        """
        self.trouble = ""
        return self._interruption() or self._rebalance()

    def _interruption(self) -> Notice | None:
        answer = self._get(_INTERRUPTION)
        if answer is None:
            return None
        try:
            fields = json.loads(answer)
            time = _parse_time(fields["time"])
            is_known = fields["action"] in _ACTIONS
        except (ValueError, KeyError, TypeError, RecursionError):
            is_known, time = False, None
        if not is_known:
            self.trouble = f"it answers {_shown(answer)}, which is no notice"
            return None
        return Notice(kind="interruption", seen_at=self._clock(), time=time)

    def _rebalance(self) -> Notice | None:
        trouble = self.trouble  # without recommendations an attempt does without
        answer = self._get(_REBALANCE)
        self.trouble = trouble
        if answer is None:
            return None
        try:
            _parse_time(json.loads(answer)["noticeTime"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return Notice(kind="rebalance", seen_at=self._clock())

    def _get(self, path: str) -> bytes | None:
        """The answer's body, or ``None`` for every answer but 200."""
        status, body = 0, b""
        for _ in range(2):  # once more with a new token, when the old one has expired
            if not self._token:
                status, body = self._ask(
                    "PUT",
                    "/latest/api/token",
                    {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)},
                )
                if status != http.client.OK:
                    self._note("a session token", status, body)
                    return None
                self._token = body.decode("latin-1").strip()
            status, body = self._ask("GET", path, {"X-aws-ec2-metadata-token": self._token})
            if status == http.client.OK:
                return body
            if status == http.client.NOT_FOUND:
                return None
            if status != http.client.UNAUTHORIZED:
                self._note(path, status, body)
                return None
            self._token = ""
        self._note(f"{path} with a new token", status, body)
        return None

    def _note(self, asked: str, status: int, body: bytes) -> None:
        answer = f"status {status}" if status else _shown(body)
        self.trouble = f"asked for {asked}, it answers {answer}"

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        """(status, body); status 0 when there was no answer, and then the body says why."""
        # No proxy and no pool: the service is on the instance, and asked every few seconds.
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        try:
            connection.request(method, self._base + path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(_MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            return 0, f"nothing ({type(error).__name__}: {error})".encode()
        finally:
            connection.close()


def _parse_time(text: object) -> datetime:
    if not isinstance(text, str):
        raise TypeError
    # Python 3.10 does not know the Z.
    time = datetime.fromisoformat(text.replace("Z", "+00:00"))
    if not _FIRST_YEAR <= time.year <= _LAST_YEAR:
        raise ValueError(text)
    return time if time.tzinfo else time.replace(tzinfo=timezone.utc)


def _shown(body: bytes) -> str:
    text = body[:80].decode("utf-8", "replace")
    return text if text.startswith("nothing (") else repr(text)
