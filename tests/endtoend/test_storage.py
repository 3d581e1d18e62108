"""A storage that goes away, a storage that is full, a disk that is full: training goes on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from devstack.s3 import S3Server
from spotfirst.state import Phase
from tests.endtoend.conftest import STEPS
from tests.endtoend.driving import SCRIPTS, Drive, Place, can_mount, driving, together

pytestmark = pytest.mark.slow

OUTAGE_S = 60.0


def cut_off(one: Place, other: Place, server: S3Server) -> tuple[Drive, Drive]:
    """Two runs whose storage is killed for a minute; the other's instance is taken meanwhile.

    In the main thread: a server dies with the thread that started it.
    """
    pace = {"E2E_PACE_S": "0.4"}
    trains = one.request(str(STEPS), env=pace)
    is_taken = other.request(str(STEPS), env=pace, fleet_options={"notice_s": 8.0})
    with driving(one, trains, "one") as drive, driving(other, is_taken, "other") as taken:
        for each in (drive, taken):
            each.until(each.has_checkpoint)
        fleet, token = taken.fleet, taken.state.attempt(1).token
        server.kill()
        began, back_at = len(drive.trace()), time.time() + OUTAGE_S
        assert fleet.interrupt(token)
        while time.time() < back_at:
            for each in (drive, taken):
                each.look()  # must not raise, whatever it finds
            time.sleep(0.5)
        during = drive.trace()[began:]
        server.start()
        gaps = [b.at - a.at for a, b in pairwise(during)]
        print(f"{len(during)} steps during an outage of {OUTAGE_S:g} s, longest {max(gaps):.2f} s")
        trained_all = during[-1].step == STEPS - 1
        assert trained_all or during[-1].at > back_at - 5, "training stopped for the storage"
        for each in (drive, taken):
            each.pace(0.02)
        for each in (drive, taken):
            assert each.until_over().phase is Phase.SUCCEEDED, each.story()
    return drive, taken


def short_of_space(place: Place, how: str, **wishes: Any) -> Drive:
    """A run whose first attempt is on a machine with too little space."""
    command = [sys.executable, str(SCRIPTS / "poor_agent.py"), how]
    options = {"agent_command": command}
    request = place.request(str(STEPS), fleet_options=options, **wishes)
    with driving(place, request) as drive:
        if how == "small-files":
            drive.until(lambda: any("Free some space" in w for w in drive.state.warnings))
            drive.until_step(1, STEPS // 2)
            assert not drive.has_checkpoint(), "half of one"
            drive.interrupt(1, notice=False)
        assert drive.until_over().phase is Phase.SUCCEEDED, drive.story()
    return drive


def test_neither_an_outage_nor_a_full_disk_changes_the_result(
    tmp_path: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        outage, taken, storage, disk = (
            Place(url, tmp_path / name)
            for name, url in {
                "outage": f"{server.url}/outage",
                "taken": f"{server.url}/taken",
                "storage": str(tmp_path / "full"),
                "disk": str(tmp_path / "roomy"),
            }.items()
        )
        fill = {"E2E_FILL": str(STEPS // 2)}
        actions: list[Callable[[], Any]] = [
            partial(cut_off, outage, taken, server),
            partial(short_of_space, storage, "small-files"),
        ]
        if can_mount():
            actions.append(partial(short_of_space, disk, "small-disk", env=fill))
        else:
            print("no full disk: this machine permits no mount")
        (cut, lost), short, *full = together(*actions)
        # While it trains, nobody replaces it: an outage is no death of the trainer.
        assert cut.causes() == ["completed"]
        assert cut.repeated() == []
        assert any("trying again in" in line for line in cut.log.lines), cut.log.lines
        assert any("run can be reached again" in line for line in cut.log.lines), cut.log.lines
        # Taken while nobody could be told: what was not checkpointed is trained again.
        assert lost.causes() == ["interrupted", "completed"], lost.story()
        print(f"interrupted during the outage: {len(lost.repeated())} steps done again")
        for drive in (cut, lost, short, *full):
            assert drive.result()["weights_sha256"] == weights, drive.story()
        assert short.causes() == ["interrupted", "completed"]
        for drive in full:
            print("full disk:", drive.state.warnings, drive.causes())
            assert drive.causes() == ["completed"]
