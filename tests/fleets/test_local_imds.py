"""The metadata service keeps IMDSv2's formats and status codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timezone

import pytest

from spotfirst_airflow.fleets.local.imds import MetadataService
from tests.fleets.worlds import ask

TTL = "X-aws-ec2-metadata-token-ttl-seconds"
ACTION = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(clock: Clock) -> Iterator[MetadataService]:
    service = MetadataService(
        {
            "meta-data/instance-id": "i-1",
            "meta-data/instance-type": "g5.xlarge",
            "meta-data/placement/availability-zone": "local-a",
        },
        clock=clock,
    )
    service.start()
    yield service
    service.close()


def token(service: MetadataService, ttl: str = "60") -> dict[str, str]:
    status, text = ask(service.endpoint + "/latest/api/token", method="PUT", headers={TTL: ttl})
    assert status == 200
    return {"X-aws-ec2-metadata-token": text}


@pytest.mark.parametrize("ttl", ["0", "21601", "", "-5", "soon", "1.5", "²"])
def test_a_token_lives_for_1_to_21600_seconds(service: MetadataService, ttl: str) -> None:
    url = service.endpoint + "/latest/api/token"
    headers = {TTL.encode(): ttl.encode()}
    assert ask(url, method="PUT", headers=headers)[0] == 400  # type: ignore[arg-type]
    assert ask(url, method="PUT")[0] == 400
    for good in ("1", "21600"):
        token(service, good)


def test_nothing_is_told_without_a_valid_token(service: MetadataService, clock: Clock) -> None:
    url = service.endpoint + "/latest/meta-data/instance-id"
    assert ask(url)[0] == 401
    assert ask(url, headers={"X-aws-ec2-metadata-token": "made-up"})[0] == 401
    held = token(service, "60")
    assert ask(url, headers=held) == (200, "i-1")
    clock.now += 60
    assert ask(url, headers=held)[0] == 401
    assert ask(url, headers=token(service)) == (200, "i-1")


def test_a_forwarded_request_gets_no_token(service: MetadataService) -> None:
    headers = {TTL: "60", "X-Forwarded-For": "10.0.0.1"}
    assert ask(service.endpoint + "/latest/api/token", method="PUT", headers=headers)[0] == 403


def test_404_means_no_notice(service: MetadataService) -> None:
    held = token(service)
    assert ask(service.endpoint + ACTION, headers=held)[0] == 404
    assert ask(service.endpoint + REBALANCE, headers=held)[0] == 404


def test_a_notice_tells_the_second_and_never_a_later_one(service: MetadataService) -> None:
    kill_at = datetime(2020, 1, 7, 1, 3, 47, 999_000, tzinfo=timezone.utc)
    service.post_notice(kill_at=kill_at, now=datetime(2020, 1, 7, 1, 1, 47, tzinfo=timezone.utc))
    held = token(service)
    _, action = ask(service.endpoint + ACTION, headers=held)
    assert json.loads(action) == {"action": "terminate", "time": "2020-01-07T01:03:47Z"}
    _, rebalance = ask(service.endpoint + REBALANCE, headers=held)
    assert json.loads(rebalance) == {"noticeTime": "2020-01-07T01:01:47Z"}


def test_it_tells_what_the_instance_is(service: MetadataService) -> None:
    held = token(service)
    told = [
        ask(f"{service.endpoint}/latest/meta-data/{path}", headers=held)
        for path in ("instance-type", "placement/availability-zone", "placement/availability-zone/")
    ]
    assert told == [(200, "g5.xlarge"), (200, "local-a"), (200, "local-a")]
