"""A doctor in a healthy account of moto's, until a test plants something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from moto import mock_aws

from spotfirst.storage import Storage, open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.fleets.checks import Check
from spotfirst_airflow.fleets.ec2.doctor import Ec2Doctor
from tests.fleets.ec2.stacks import REGION, Stack

TYPES = ("g6.xlarge", "g5.xlarge")
Checks = dict[str, Check]


class World:
    """One look at an account, and what to change before it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.options: dict[str, Any] = dict(self.stack.options)
        self.storage_url = self.stack.storage_url
        self.types: tuple[str, ...] = TYPES
        self.aws = self.stack.aws()
        self.ahead = timedelta(0)
        self.opener: Callable[[str], Storage] = lambda url: open_storage("memory://doctor")

    def ask(self) -> Checks:
        doctor = Ec2Doctor(
            self.options,
            storage_url=self.storage_url,
            instance_types=self.types,
            aws=self.aws,
            clock=lambda: utc_now() + self.ahead,
            opener=self.opener,
        )
        checks = [check for step in doctor.steps() for check in step.run()]
        assert len({check.name for check in checks}) == len(checks), "two checks of one name"
        for check in checks:
            assert check.verdict in {"ok", "skipped"} or check.fix, f"{check.name} has no fix"
        return {check.name: check for check in checks}

    def client(self, service: str) -> Any:
        return self.stack.client(service)


def wrong(checks: Checks) -> dict[str, str]:
    return {c.name: c.verdict for c in checks.values() if c.verdict in {"warning", "failed"}}


@contextmanager
def an_account(**parameters: str) -> Iterator[Stack]:
    """A new one, with the stack of deploy/aws.yaml, and no way to any other."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        with mock_aws():
            yield Stack(**parameters)
