"""How an attempt ended: every exit code, with and without a request to stop."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.agent.exits import Ending, StopReason, classify, is_finished
from spotfirst.events import EndCause
from spotfirst.heartbeat import Progress

WORKING = Progress(phase="training", step=40, total_steps=100, checkpoint_step=30)
SAVED = Progress(phase="training", step=40, total_steps=100, checkpoint_step=40)
DRAINED = Progress(phase="draining", step=40, total_steps=100, checkpoint_step=40, released=True)
FINISHED = Progress(phase="training", step=100, total_steps=100, checkpoint_step=100)
CODES = (0, 1, 75, 143, -9, -15, -11)


def cause(code: int | None, progress: Progress = WORKING, **seen: object) -> EndCause:
    return classify(Ending(code=code, progress=progress, **seen))[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "expected"),
    [(code, "killed") for code in (-9, 137, -15, 143, -2)]
    + [(code, "script_failed") for code in (0, 1, 75, -11)],
)
def test_an_unasked_end_with_steps_left_is_no_success(code: int, expected: str) -> None:
    assert cause(code) == expected


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("progress", [WORKING, SAVED, Progress(), Progress(step=3)])
@pytest.mark.parametrize("seen", ["interruption", "shutdown", "terminated", "killed"])
def test_a_script_that_left_when_its_instance_was_to_go_was_stopped_whatever_its_code(
    code: int, progress: Progress, seen: str
) -> None:
    expected = "interrupted" if seen in {"interruption", "shutdown"} else "handed_over"
    assert cause(code, progress, **{seen: True}) == expected


@pytest.mark.parametrize("seen", ["interruption", "shutdown", "terminated", "superseded"])
def test_a_script_whose_last_step_is_checkpointed_has_completed_even_so(seen: str) -> None:
    assert cause(0, FINISHED, **{seen: True}) == "completed"
    assert cause(1, FINISHED, **{seen: True}) != "completed", "what follows the steps is left"


def test_early_stopping_is_a_success_when_its_last_step_is_checkpointed() -> None:
    assert cause(0, SAVED) == "completed"
    assert cause(0, Progress(step=7, checkpoint_step=7)) == "completed"


@pytest.mark.parametrize(
    "progress",
    [
        WORKING,
        Progress(step=40),
        Progress(step=0, total_steps=5),
        Progress(step=40, total_steps=40),
    ],
)
def test_a_success_without_a_checkpoint_of_its_last_step_is_none(progress: Progress) -> None:
    found, message = classify(Ending(code=0, progress=progress))
    assert found == "script_failed"
    assert f"step {progress.step}" in message
    assert "checkpointer.close()" in message


def test_a_script_that_tells_no_steps_has_completed_with_its_0() -> None:
    assert cause(0, Progress()) == "completed"


@given(
    code=st.none() | st.integers(-64, 255),
    asked=st.none() | st.sampled_from(get_args(StopReason)),
    seen=st.fixed_dictionaries(
        dict.fromkeys(
            ("interruption", "shutdown", "terminated", "killed", "superseded"), st.booleans()
        )
    ),
    progress=st.builds(
        Progress,
        phase=st.sampled_from(["starting", "training", "draining"]),
        start_step=st.none() | st.integers(0, 3),
        step=st.none() | st.integers(0, 6),
        total_steps=st.none() | st.integers(0, 6),
        checkpoint_step=st.none() | st.integers(0, 6),
        released=st.booleans(),
    ),
)
def test_completed_means_that_the_work_is_done(
    *, code: int | None, asked: StopReason | None, seen: dict[str, bool], progress: Progress
) -> None:
    found = cause(code, progress, asked=asked, **seen)
    if found == "completed":
        assert code == 0
        step, saved = progress.step, progress.checkpoint_step
        assert step is None or (saved or 0) >= step, "its last step is in a checkpoint"
        if any(seen.values()) or (asked and progress.total_steps is not None):
            assert is_finished(progress), "it left because it was asked to"
    if any(seen.values()):
        assert found not in {"script_failed", "killed"}, "a request never fails a run"


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


@pytest.mark.parametrize("code", [1, 75, 143, -15, -11, -9])
@pytest.mark.parametrize("asked", ["handover", "max_life", "deadline", "budget"])
def test_a_script_that_fails_during_a_drain_goes_on_elsewhere_and_says_so(
    code: int, asked: StopReason
) -> None:
    found, message = classify(Ending(code=code, progress=WORKING, asked=asked))
    assert found == ("max_life" if asked == "max_life" else "handed_over")
    assert "before its last checkpoint" in message


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


@pytest.mark.parametrize(("asked", "words"), [("deadline", "deadline"), ("budget", "budget")])
def test_an_end_by_a_limit_says_which(asked: StopReason, words: str) -> None:
    found, message = classify(Ending(code=0, progress=DRAINED, asked=asked))
    assert found == "handed_over"
    assert words in message
