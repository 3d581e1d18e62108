"""The metadata service of one simulated instance: what a path answers, without a network."""

from __future__ import annotations

import json

from spotfirst.agent.notices import NoticeSource
from spotfirst.wire import Clock
from tests.fakes.cloud import CloudInstance

_TOKEN = "a-session-token"
_TAGS = "/latest/meta-data/tags/instance/"


class Imds:
    """IMDSv2 as AWS documents it: a session token first, and 404 where there is nothing."""

    def __init__(self, instance: CloudInstance) -> None:
        self._instance = instance

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        """(status, body)."""
        if (method, path) == ("PUT", "/latest/api/token"):
            return 200, _TOKEN.encode()
        if headers.get("X-aws-ec2-metadata-token") != _TOKEN:
            return 401, b""
        body = self._get(path)
        return (404, b"") if body is None else (200, body.encode())

    def _get(self, path: str) -> str | None:
        it = self._instance
        if path == "/latest/meta-data/instance-id":
            return it.instance_id
        if path == "/latest/meta-data/instance-type":
            return it.pool[0]
        if path == "/latest/meta-data/placement/availability-zone":
            return it.pool[1]
        if path == "/latest/meta-data/instance-life-cycle":
            return "spot" if it.spot else "on-demand"
        if path.startswith(_TAGS):
            return it.tags.get(path.removeprefix(_TAGS))
        if path == "/latest/meta-data/spot/instance-action":
            if it.notice_at is None or it.now < it.notice_at or it.interrupted_at is None:
                return None
            time = f"{it.interrupted_at:%Y-%m-%dT%H:%M:%SZ}"
            return json.dumps({"action": "terminate", "time": time})
        if path == "/latest/meta-data/events/recommendations/rebalance":
            if it.rebalance_at is None or it.now < it.rebalance_at:
                return None
            return json.dumps({"noticeTime": f"{it.rebalance_at:%Y-%m-%dT%H:%M:%SZ}"})
        return None


class SimulatedNoticeSource(NoticeSource):
    """The agent's own reader of notices, on a metadata service without a network."""

    def __init__(self, instance: CloudInstance, clock: Clock) -> None:
        super().__init__("http://169.254.169.254", clock=clock)
        self._imds = Imds(instance)

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        return self._imds.answer(method, path, headers)
