"""SIGKILL of any process of a run, at any moment: the run ends with the same weights."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sysconfig
import time
from functools import partial
from pathlib import Path

import msgspec

from spotfirst.run import Run
from spotfirst.state import Phase
from spotfirst.storage import open_storage
from tests.endtoend.conftest import STEPS
from tests.endtoend.driving import Drive, Place, driving, kill_all, together

ROLES = ("trainer", "agent", "supervisor")


def killed(place: Place, role: str, chance: random.Random) -> Drive:
    """A run one of whose processes is killed: while it starts, or while it trains."""
    with driving(place, place.request(str(STEPS))) as drive:
        drive.until(lambda: role in drive.roles(1))
        if chance.random() < 0.7:
            drive.until_step(1, chance.randint(0, STEPS - 50))
        else:
            moment = time.monotonic() + chance.uniform(0, 2)
            drive.until(lambda: time.monotonic() >= moment)
        drive.kill(role, 1)
        print(f"{role}: killed after {len(drive.trace())} steps")
        assert drive.until_over().phase is Phase.SUCCEEDED, drive.story()
    return drive


def test_trainer_agent_or_supervisor_may_be_killed_at_any_moment(
    place: Place, chance: random.Random, weights: str
) -> None:
    places = {role: Place(f"{place.storage}/{role}", place.folder / role) for role in ROLES}
    drives = together(
        *(partial(killed, places[role], role, random.Random(chance.random())) for role in ROLES)
    )
    for role, drive in zip(ROLES, drives, strict=True):
        assert drive.result()["weights_sha256"] == weights, drive.story()
        assert len(drive.causes()) == 2
        assert drive.causes()[0] == ("killed" if role == "trainer" else "lost")


def test_the_controlling_process_may_be_killed_at_any_moment(
    place: Place, chance: random.Random, weights: str
) -> None:
    place.folder.mkdir()
    wishes = msgspec.to_builtins(place.request(str(STEPS)))
    named = ("command", "code", "env", "fleet_options", "policy", "checkpoint_period_s")
    spec = place.folder / "spec.json"
    spec.write_text(json.dumps({name: wishes[name] for name in named}))
    program = Path(sysconfig.get_path("scripts")) / "spotfirst"
    command = [
        str(program),
        "run",
        str(spec),
        "--storage",
        place.storage,
        "--run-id",
        "run",
        "--json",
    ]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SPOTFIRST_")}
    run = Run(open_storage(place.storage), "run")
    watched = Drive.watching(place, run)
    try:
        for _ in range(2):
            first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
            time.sleep(chance.uniform(0.3, 4))
            first.send_signal(signal.SIGKILL)
            first.wait()
            print(f"killed with {len(run.journal().refresh().attempts)} attempts")
        last = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        assert last.returncode == 0, last.stderr + watched.story()
        told = json.loads(last.stdout)
        assert told["weights_sha256"] == weights
        assert told["attempts"] == 1, watched.story()
        assert watched.until_gone() == []
    finally:
        kill_all(watched.processes)
