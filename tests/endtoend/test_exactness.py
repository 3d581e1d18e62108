"""However often a run is interrupted, it ends with the weights that it would have had."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import pytest

from devstack.s3 import S3Server
from spotfirst.state import Phase
from tests.endtoend.conftest import STEPS
from tests.endtoend.driving import Drive, Place, driving, together

PERIOD_S = 1.0

SCENARIOS = {
    "never interrupted": "",
    "one notice": "n",
    "one kill": "k",
    "a notice and a kill": "nk",
    "seven of both": "knnknkn",
}
ON_S3 = "a notice and a kill"


def interrupted(place: Place, plan: str, chance: random.Random) -> Drive:
    """A run that is interrupted like this: n with a notice, k without."""
    request = place.request(str(STEPS), checkpoint_period_s=PERIOD_S)
    with driving(place, request) as drive:
        for attempt, kind in enumerate(plan, start=1):
            began = drive.until_training(attempt)
            step = began + chance.randint(0, 12)
            drive.until_step(attempt, step)
            drive.slow(True)  # the replacement's start must not outlast the training
            print(f"{place.folder.name}: attempt {attempt}, step {step}: {kind}")
            drive.interrupt(attempt, notice=kind == "n")
            drive.until_training(attempt + 1)
            drive.slow(False)
        assert drive.until_over().phase is Phase.SUCCEEDED, drive.story()
        assert len(drive.state.attempts) == len(plan) + 1, drive.story()
    return drive


@pytest.fixture(scope="module")
def drives(
    s3: S3Server, tmp_path_factory: pytest.TempPathFactory, chance: random.Random
) -> Iterator[dict[str, Drive]]:
    """All scenarios, at the same time; one of them on S3."""
    folder = tmp_path_factory.mktemp("exactness")
    actions = []
    for name, plan in SCENARIOS.items():
        storage = f"{s3.url}/{folder.name}" if name == ON_S3 else str(folder / "storage" / name)
        place = Place(storage, folder / name.replace(" ", "-"))
        actions.append(partial(interrupted, place, plan, random.Random(chance.random())))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.environment().items():
            patch.setenv(name, value)
        yield dict(zip(SCENARIOS, together(*actions), strict=True))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_last_weights_are_bit_for_bit_those_of_a_training_without_interruption(
    scenario: str, drives: dict[str, Drive], weights: str
) -> None:
    assert drives[scenario].result()["weights_sha256"] == weights


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_step_is_done(scenario: str, drives: dict[str, Drive]) -> None:
    assert {done.step for done in drives[scenario].trace()} == set(range(STEPS))


def test_a_notice_loses_no_step(drives: dict[str, Drive]) -> None:
    assert drives["one notice"].repeated() == []
    assert drives["one notice"].bill().lost_steps == 0


@pytest.mark.parametrize("scenario", [name for name, plan in SCENARIOS.items() if "k" in plan])
def test_a_kill_loses_what_no_checkpoint_has_and_a_notice_nothing(
    scenario: str, drives: dict[str, Drive]
) -> None:
    drive = drives[scenario]
    chain = drive.run.chain().refresh()
    commits = [*chain.pruned.values(), *(commit for _, commit in chain.commits)]
    for attempt, kind in enumerate(SCENARIOS[scenario], start=1):
        mine = [done for done in drive.trace() if done.attempt == attempt]
        again = {done.step for done in drive.trace() if done.attempt > attempt}
        lost = [done for done in mine if done.step in again]
        lost_s = lost[-1].at - lost[0].at if lost else 0.0
        print(f"{scenario}: attempt {attempt} ({kind}) lost {len(lost)} steps, {lost_s:.2f} s")
        saved = max((commit.step for commit in commits if commit.attempt <= attempt), default=0)
        assert {done.step for done in lost} == {done.step for done in mine if done.step >= saved}
        assert not lost or kind == "k"
    assert commits[-1].step == STEPS


def test_the_interruptions_are_those_that_the_bill_names(drives: dict[str, Drive]) -> None:
    for scenario, plan in SCENARIOS.items():
        drive = drives[scenario]
        assert drive.causes() == ["interrupted"] * len(plan) + ["completed"]
        free = [c.attempt for c in drive.bill().charges if c.rule.startswith("free")]
        assert set(free) <= set(range(1, len(plan) + 1))
        for change in drive.changeovers():
            print(
                f"{scenario}: change {change.from_attempt} to {change.to_attempt} ({change.why}): "
                f"{change.changeover_s:.2f} s, start-up {change.startup_s:.2f} s, "
                f"beyond it {change.beyond_startup_s:.2f} s, pause {change.pause_s:.2f} s, "
                f"{change.lost_steps} steps lost"
            )
