"""From an event in the queue to the decision that follows from it: within a second.

The controller, the fleet, the watcher and its thread are production's, and wait in real time. The
cloud's own time stands still meanwhile.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from spotfirst import events as e
from spotfirst_airflow.controller import Controller
from spotfirst_airflow.fleets.ec2.fleet import Ec2Fleet
from spotfirst_airflow.fleets.ec2.watching import Watcher
from spotfirst_airflow.waking import Bell
from tests.fakes.clients import FakeAws
from tests.fakes.cloud import Weather
from tests.fakes.world import World
from tests.waiting import PATIENCE_S, wait_until


class Live:
    """A run that trains, and a process that looks after runs on the same account."""

    def __init__(self) -> None:
        # The world's own controller brings the run to where it trains, and then has no turn more.
        self.world = World("live", weather=Weather(event_lost_share=1, up_s=1e9))
        for _ in range(600):
            self.world.tick()
            beat = self.world.run.heartbeat(1)
            if beat is not None and beat.phase == "training":
                break
        self.aws: Any = FakeAws(self.world.cloud, process="live")
        self.watcher = Watcher.of(
            self.aws,
            self.world.spec.fleet_options["queue_url"],
            clock=self.world.clock,
            open_storage=lambda *_: self.world.storage,
        )
        for _ in range(2):
            self.watcher.refresh()  # from the second look on, a process listens

    def controller(self) -> Controller:
        fleet = Ec2Fleet(
            self.world.spec.fleet_options,
            environment={},
            clock=self.world.clock,
            aws=self.aws,
            watcher=self.watcher,
            publish=lambda *_: "0" * 64,
        )
        return Controller(self.world.run, fleet, self.world.policy, clock=self.world.clock)

    def announce(self) -> None:
        """AWS's warning for the instance."""
        (instance,) = self.world.cloud.running()
        event = {
            "detail-type": "EC2 Spot Instance Interruption Warning",
            "time": f"{self.world.now:%Y-%m-%dT%H:%M:%SZ}",
            "detail": {"instance-id": instance.instance_id, "instance-action": "terminate"},
        }
        self.world.cloud.enqueue(json.dumps(event))

    def has_launched_another(self) -> bool:
        journal = self.world.run.journal()
        journal.refresh()
        return any(isinstance(x, e.Launched) and x.attempt == 2 for x in journal.events)


@pytest.fixture
def live() -> Iterator[Live]:
    live = Live()
    yield live
    live.world.close()


def test_a_controller_that_waits_launches_the_successor(live: Live) -> None:
    controller, bell, over = live.controller(), Bell("run"), threading.Event()
    waits: list[float] = []

    def look_after() -> None:
        while not over.is_set():
            waits.append(controller.step().wait_s)
            bell.wait(PATIENCE_S)  # so only a ring makes it look again

    thread = threading.Thread(target=look_after)
    thread.start()
    try:
        wait_until(lambda: waits)
        assert waits[-1] == 5.0  # it would look again only then
        live.announce()
        wait_until(live.has_launched_another, patience_s=PATIENCE_S / 2)
    finally:
        over.set()
        bell.ring()
        thread.join()


def test_so_does_whoever_receives_it_when_another_process_looks_after_the_run(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "spotfirst_airflow.submission.open_controller", lambda run, environment: live.controller()
    )
    live.announce()
    wait_until(live.has_launched_another)
