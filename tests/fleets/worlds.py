"""A local fleet in a folder of the test's own, and what tests ask about it."""

from __future__ import annotations

import itertools
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spotfirst.market import Market, Pool
from spotfirst.wire import utc_now
from spotfirst_airflow.fleets import Instance, InstanceState, LaunchRequest
from spotfirst_airflow.fleets.local import LocalFleet
from tests.waiting import wait_until

SLEEPER = (sys.executable, "-S", "-c", "import time; time.sleep(300)")


def request(token: str, *, zone: str = "local-a", **changes: Any) -> LaunchRequest:
    fields: dict[str, Any] = {
        "token": token,
        "run_id": "run-1",
        "attempt": 1,
        "market": Market.SPOT,
        "pool": Pool(instance_type="g5.xlarge", zone=zone),
        "storage_url": "file:///nowhere",
        "max_life_s": 600.0,
        "tags": {"team": "search"},
    }
    return LaunchRequest(**(fields | changes))


def processes_of(root: Path) -> dict[int, str]:
    """Processes whose command line or environment names this root; the test's own are not."""
    mark = str(root).encode()
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid():
            try:
                command = (path / "cmdline").read_bytes()
                environment = (path / "environ").read_bytes()
            except OSError:
                continue
            if mark in command or mark in environment:
                found[int(path.name)] = command.replace(b"\0", b" ").decode()
    return found


class World:
    """A root, and fleets in it as several processes would make them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tokens = (f"token-{n}" for n in itertools.count(1))

    def fleet(self, environment: Mapping[str, str] | None = None, **options: Any) -> LocalFleet:
        given = {"root": str(self.root), "agent_command": list(SLEEPER)} | options
        return LocalFleet(LocalFleet.settle(given, now=utc_now()), environment=environment or {})

    def token(self) -> str:
        return next(self._tokens)

    def folder(self, token: str) -> Path:
        return self.root / "instances" / token

    def processes(self) -> dict[int, str]:
        return processes_of(self.root)


def one(fleet: LocalFleet, token: str) -> Instance:
    return fleet.describe([token])[token]


def running(fleet: LocalFleet, token: str) -> Instance:
    """The instance once its agent was started."""
    wait_until(lambda: one(fleet, token).state is not InstanceState.PENDING)
    return one(fleet, token)


def ended(fleet: LocalFleet, token: str) -> Instance:
    wait_until(lambda: one(fleet, token).state is InstanceState.TERMINATED)
    return one(fleet, token)


def ask(
    url: str, *, method: str = "GET", headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Status and text of a request to the metadata service."""
    call = urllib.request.Request(url, method=method, headers=dict(headers or {}))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(call, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
