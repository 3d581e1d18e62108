"""How an attempt ended: every exit code, with and without a request to stop."""

from __future__ import annotations

import pytest

from spotfirst.agent.exits import Ending, StopReason, classify
from spotfirst.events import EndCause
from spotfirst.heartbeat import Progress

WORKING = Progress(phase="training", step=40, total_steps=100, checkpoint_step=30)
DRAINED = Progress(phase="draining", step=40, total_steps=100, checkpoint_step=40, released=True)
FINISHED = Progress(phase="training", step=100, total_steps=100, checkpoint_step=100)
CODES = (0, 1, 75, 143, -9, -15, -11)


def cause(code: int | None, progress: Progress = WORKING, **seen: object) -> EndCause:
    return classify(Ending(code=code, progress=progress, **seen))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "expected"),
    [(0, "completed"), (-9, "killed")]
    + [(code, "script_failed") for code in (1, 75, 143, -15, -11)],
)
@pytest.mark.parametrize("interruption", [False, True])
def test_what_was_not_asked_for_is_the_scripts_own_end(
    code: int, expected: str, interruption: bool
) -> None:
    assert cause(code, interruption=interruption) == expected


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    ("asked", "interruption", "expected"),
    [
        ("handover", False, "handed_over"),
        ("handover", True, "interrupted"),
        ("interruption", True, "interrupted"),
        ("max_life", False, "max_life"),
    ],
)
def test_a_trainer_that_released_because_it_was_asked_was_stopped_whatever_its_code(
    code: int, asked: StopReason, interruption: bool, expected: str
) -> None:
    assert cause(code, DRAINED, asked=asked, interruption=interruption) == expected


@pytest.mark.parametrize("code", [1, 75, 143, -15, -11])
def test_a_failure_during_a_drain_is_the_scripts(code: int) -> None:
    assert cause(code, asked="interruption", interruption=True) == "script_failed"


def test_a_trainer_that_finishes_during_a_drain_has_completed() -> None:
    assert cause(0, FINISHED, asked="handover") == "completed"


def test_a_trainer_that_finished_before_it_was_taken_over_has_completed() -> None:
    assert cause(0, FINISHED, superseded=True) == "completed"


def test_a_script_without_steps_that_exits_with_0_during_a_drain_has_completed() -> None:
    assert cause(0, Progress(), asked="handover") == "completed"


def test_leaving_the_loop_for_a_drain_does_not_complete_it_even_without_a_release() -> None:
    left = Progress(phase="draining", step=40, total_steps=100)
    assert cause(0, left, asked="handover") == "handed_over"


def test_a_drain_that_was_ignored_ends_with_our_kill() -> None:
    assert cause(-9, asked="interruption", interruption=True, killed=True) == "interrupted"
    assert cause(-9, asked="handover", killed=True) == "handed_over"
    assert cause(-9, asked="max_life", killed=True) == "max_life"


def test_a_kill_by_someone_else_during_a_drain_is_a_kill() -> None:
    assert cause(-9, asked="handover") == "killed"


@pytest.mark.parametrize("code", [0, 1, 143, -15])
def test_a_script_in_files_mode_that_was_sent_sigterm_was_stopped(code: int) -> None:
    assert cause(code, Progress(), asked="handover", terminated=True) == "handed_over"


def test_the_shutdown_of_the_instance_reaches_the_command_as_well() -> None:
    assert cause(-15, shutdown=True) == "interrupted"


@pytest.mark.parametrize("code", [0, 1, 75, None])
def test_an_attempt_that_was_taken_over_has_handed_over(code: int | None) -> None:
    assert cause(code, superseded=True) == "handed_over"


def test_an_attempt_that_stops_before_its_command_has_not_failed() -> None:
    assert cause(None, Progress(), asked="handover") == "handed_over"
    assert cause(None, Progress(), asked="interruption", interruption=True) == "interrupted"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-9, "ran out of memory"),
        (-11, "SIGSEGV, not sent by Spotfirst"),
        (137, "code 137 .*SIGKILL"),
        (3, "exited with code 3"),
    ],
)
def test_the_message_says_what_happened(code: int, words: str) -> None:
    import re

    assert re.search(words, classify(Ending(code=code))[1].replace("the system ", ""))
