"""One trainer at a time, whoever races; and what *continue* and *replay* mean."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest

from spotfirst import events as e
from spotfirst.checkpoints.chain import Claim
from spotfirst.checkpoints.manifest import read_manifest
from spotfirst.errors import NewerFormat
from spotfirst.state import Phase
from tests.endtoend.conftest import STEPS
from tests.endtoend.driving import SCRIPTS, WAIT_S, Drive, Place, driving, see_through, together


def raced(place: Place, after_s: float) -> Drive:
    """A run with two controllers in two processes, interrupted once; one of them is killed."""
    with driving(place, place.request(str(STEPS))) as drive:
        command = [sys.executable, str(SCRIPTS / "controller.py"), place.storage, "run"]
        racers = [subprocess.Popen(command, cwd=Path.cwd()) for _ in range(2)]
        try:
            drive.wait_for(lambda: len(drive.trace()) > 5)
            drive.slow(True)
            drive.interrupt(1, notice=True)
            time.sleep(after_s)
            racers[0].kill()
            drive.wait_for(lambda: any(done.attempt == 2 for done in drive.trace()))
            drive.slow(False)
            assert racers[1].wait(WAIT_S) == 0
        finally:
            for racer in racers:
                racer.kill()
                racer.wait()
    return drive


def woken(place: Place) -> Drive:
    """A run whose first instance is frozen, replaced, and goes on after its replacement began."""
    options = {"notice_s": 3.0}
    request = place.request(str(STEPS), fleet_options=options, checkpoint_period_s=0.3)
    roles = ("supervisor", "guard", "agent", "trainer")
    with driving(place, request) as drive:
        drive.until(drive.has_checkpoint)
        drive.slow(True)
        drive.interrupt(1, notice=True)
        drive.until(lambda: (beat := drive.heartbeat(1)) and beat.notice)
        for role in roles:  # the supervisor first: it would see the others stop
            drive.kill(role, 1, signal.SIGSTOP)
        drive.until_training(2)
        before = len(drive.trace())
        drive.slow(False)
        drive.kill("trainer", 1, signal.SIGCONT)
        drive.until(lambda: "trainer" not in drive.roles(1))
        zombie = [done for done in drive.trace()[before:] if done.attempt == 1]
        print(f"the zombie did {len(zombie)} steps that nobody needs, and left")
        drive.kill("agent", 1, signal.SIGCONT)
        drive.kill("guard", 1, signal.SIGCONT)
        drive.kill("supervisor", 1, signal.SIGCONT)
        assert drive.until_over().phase is Phase.SUCCEEDED, drive.story()
    return drive


def test_two_controllers_and_a_zombie_trainer_change_nothing(
    place: Place, chance: random.Random, weights: str
) -> None:
    race = Place(f"{place.storage}/race", place.folder / "race")
    zombie = Place(f"{place.storage}/zombie", place.folder / "zombie")
    one, two = together(partial(raced, race, chance.uniform(0, 2)), partial(woken, zombie))

    assert one.state.phase is Phase.SUCCEEDED, one.story()
    assert one.result()["weights_sha256"] == weights
    assert [a.number for a in one.state.attempts] == [1, 2]
    journal = one.run.journal()
    journal.refresh()
    launched = [event.attempt for event in journal.events if isinstance(event, e.Launched)]
    assert launched == [1, 2]
    assert [attempt for attempt, _ in groupby(one.trace(), key=lambda done: done.attempt)] == [1, 2]
    assert one.repeated() == []

    assert two.result()["weights_sha256"] == weights
    committers = [entry.attempt for entry in two.chain_entries() if not isinstance(entry, Claim)]
    assert committers == sorted(committers), "attempt 1 wrote after attempt 2 had claimed"
    assert two.causes()[1] == "completed"


def stopped_half_way(place: Place) -> Drive:
    """A run that was stopped by a person after a few checkpoints."""
    with driving(place, place.request(str(STEPS), checkpoint_period_s=0.3)) as drive:
        drive.until(lambda: len(drive.run.chain().refresh().commits) >= 3)
        drive.stop()
        assert drive.until_over().phase is Phase.STOPPED, drive.story()
    return drive


def continued(drive: Drive, run_id: str = "run") -> Drive:
    """A stopped run, attached to again."""
    with driving(drive.place, drive.request, run_id) as again:
        assert again.until_over().phase is Phase.SUCCEEDED, again.story()
    return again


# -- what a stopped run can come back from --------------------------------------------------------

DAMAGES = ("nothing", "pack damaged", "pack missing", "manifest missing")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Drive:
    folder = tmp_path_factory.mktemp("stopped")
    return stopped_half_way(Place(str(folder / "storage"), folder / "place"))


@pytest.fixture(scope="module")
def revived(stopped: Drive, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drive]:
    """The stopped run, continued after each damage to its newest checkpoint; and replayed."""

    def damaged(how: str) -> Drive:
        folder = tmp_path_factory.mktemp(how.replace(" ", "-"))
        place = Place(str(folder / "storage"), folder / "place")
        shutil.copytree(stopped.place.storage, place.storage)
        place.folder.mkdir()
        copy = Drive.watching(place, type(stopped.run)(place.open(), "run"))
        damage(copy, how)
        copy.request = place.request(str(STEPS))
        return continued(copy)

    def replayed() -> Drive:
        folder = tmp_path_factory.mktemp("replayed")
        place = Place(stopped.place.storage, folder / "place")
        step = stopped.run.chain().refresh().commits[1][1].step
        return see_through(place, place.request(str(STEPS), resume_from=f"run@{step}"), "replay")

    names = [*DAMAGES, "replayed"]
    drives = together(*(partial(damaged, how) for how in DAMAGES), replayed)
    return dict(zip(names, drives, strict=True))


def damage(drive: Drive, how: str) -> None:
    """Damage what only the newest checkpoint has."""
    packs = drive.run.packs()
    commits = [commit for _, commit in drive.run.chain().refresh().commits[-2:]]
    old, new = (
        {pack.name for pack in read_manifest(packs, commit.manifest, commit.digest).packs}
        for commit in commits
    )
    name = commits[1].manifest if how == "manifest missing" else min(new - old)
    path = Path(drive.place.storage) / "runs" / "run" / "packs" / name
    if how.endswith("missing"):
        path.unlink()
    elif how == "pack damaged":
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("how", [*DAMAGES, "replayed"])
def test_a_stopped_run_comes_to_the_same_weights(
    how: str, revived: dict[str, Drive], weights: str
) -> None:
    assert revived[how].result()["weights_sha256"] == weights


def test_a_cleared_run_goes_on_from_its_newest_checkpoint(
    stopped: Drive, revived: dict[str, Drive]
) -> None:
    newest = stopped.run.chain().refresh().commits[-1][1]
    ended = revived["nothing"].state.attempts[-1].ended
    assert ended
    assert ended.start_step == newest.step
    # How fast this machine's disk is at the moment says nothing of the takeover.
    warnings = revived["nothing"].state.warnings
    assert [told for told in warnings if "checkpoints are slow" not in told] == []


@pytest.mark.parametrize("how", DAMAGES[1:])
def test_a_damaged_checkpoint_is_passed_over_loudly(
    how: str, stopped: Drive, revived: dict[str, Drive]
) -> None:
    (_, before), (seq, newest) = stopped.run.chain().refresh().commits[-2:]
    state = revived[how].state
    ended = state.attempts[-1].ended
    assert ended
    assert ended.start_step == before.step
    [warning] = [w for w in state.warnings if "going back" in w]
    assert f"checkpoint {seq} of step {newest.step} cannot be read" in warning
    assert any(warning in line for line in revived[how].log.lines), "nobody was told"


def test_a_replay_starts_where_it_was_told_to(stopped: Drive, revived: dict[str, Drive]) -> None:
    replay = revived["replayed"]
    started = replay.state.attempts[0].ended
    assert started
    assert started.start_step == stopped.run.chain().refresh().commits[1][1].step
    assert replay.run.spec().resume_from
    assert {done.step for done in replay.trace()} == set(range(started.start_step, STEPS))


def test_a_journal_of_a_newer_release_is_left_alone(place: Place) -> None:
    with driving(place, place.request(str(STEPS))) as drive:
        name = f"{drive.state.seq + 1:08d}.json"
        path = Path(place.storage) / "control" / "runs" / "run" / "journal" / name
        assert not path.exists()
        assert path.with_name(f"{drive.state.seq:08d}.json").exists()
        path.write_text('{"v": 99, "kind": "teleported", "at": "2030-01-01T00:00:00Z"}')
        with pytest.raises(NewerFormat, match=r"has format 99.*upgrade"):
            drive.look()
        assert drive.fleet.owned() == []
        assert drive.processes() == []
