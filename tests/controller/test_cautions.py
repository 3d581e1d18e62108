"""What people are warned of in a run: what its fleet says, and what its instances wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from spotfirst.heartbeat import Heartbeat
from spotfirst.state import Phase
from tests.controller.world import FakeFleet, World


class Grumbling(FakeFleet):
    """A fleet that has something to say, each time in other numbers."""

    said = 0

    def warnings(self) -> Sequence[str]:
        Grumbling.said += 1
        return [f"messages of queue q cannot be read; {Grumbling.said} so far"]


class GrumblingWorld(World):
    def new_fleet(self) -> FakeFleet:
        return Grumbling(self)


def test_what_the_fleet_warns_of_is_in_the_run_once_whichever_controller_looks() -> None:
    world = GrumblingWorld()
    world.controllers.append(world.new_controller())
    world.until_done()
    warnings = world.run.journal().refresh().warnings
    assert len([text for text in warnings if "queue q cannot be read" in text]) == 1


def test_a_heartbeat_that_cannot_be_read_is_a_warning_and_the_run_goes_on() -> None:
    world = World()
    while not any(machine.phase == "training" for machine in world.alive()):
        world.reconcile()
        world.tick()
    path = world.run.attempt_path(1, "heartbeat.json")
    world.run.storage.write(path, b"\xffgarbage")
    world.reconcile()
    [warning] = world.run.journal().refresh().warnings
    assert f"{world.run.url}/{path}" in warning
    assert world.until_done().state.phase is Phase.SUCCEEDED


def test_a_report_of_the_end_that_cannot_be_read_counts_as_none_and_is_told() -> None:
    world = World()
    while not any(machine.phase == "training" for machine in world.alive()):
        world.reconcile()
        world.tick()
    path = world.run.attempt_path(1, "exit.json")
    world.run.storage.write(path, b"{}")
    state = world.until_done().state
    assert state.attempts[0].ended is not None
    assert state.attempts[0].ended.cause == "lost"
    assert any(path in warning for warning in state.warnings)


def test_warnings_without_end_do_not_fill_the_journal() -> None:
    world = World(total_steps=10**6)
    while not any(machine.phase == "training" for machine in world.alive()):
        world.reconcile()
        world.tick()
    for number in range(300):
        beat: Any = world.run.heartbeat(1)
        assert isinstance(beat, Heartbeat)
        progress = msgspec.structs.replace(beat.progress, warnings=(f"warning {number}",))
        world.run.beat(msgspec.structs.replace(beat, progress=progress))
        world.reconcile()
    warnings = world.run.journal().refresh().warnings
    assert 100 <= len(warnings) <= 101
    assert "left out" in warnings[-1]
