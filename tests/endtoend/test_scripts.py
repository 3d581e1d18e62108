"""Scripts that fail: told with their last words, tried again only as often as asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

from spotfirst.state import Phase
from tests.endtoend.driving import Drive, Place, driving, together


def driven(place: Place, name: str, *command: str, **wishes: Any) -> Drive:
    """A run of a script without torch, to its end."""
    here = Place(place.storage, place.folder / name)
    request = here.request(*command, code="plain.py", **wishes)
    with driving(here, request, name) as drive:
        drive.until_over()
    return drive


def test_what_becomes_of_scripts_that_fail(place: Place) -> None:
    fails, once, retried, dies, crashes = together(
        partial(driven, place, "fails", "fail"),
        partial(driven, place, "once", "fail-once"),
        partial(driven, place, "retried", "fail-once", script_retries=1),
        partial(driven, place, "dies", "die"),
        partial(driven, place, "crashes", "fail", script_retries=100),
    )
    # Not tried again unless asked for, and told by its own last words.
    for drive in (fails, once):
        failure = drive.state.failure
        assert drive.state.phase is Phase.FAILED
        assert failure
        assert "code 3" in failure.message
        assert failure.log_tail[-1] == "Traceback: the disk of the moon is full"
        assert drive.causes() == ["script_failed"]
    # As often as asked for.
    assert retried.state.phase is Phase.SUCCEEDED
    assert retried.causes() == ["script_failed", "completed"]
    # A crash loop ends by itself, however many tries were asked for.
    assert dies.causes() == ["killed"] * 3
    assert crashes.causes() == ["script_failed"] * 3
    for drive in (dies, crashes):
        assert drive.state.phase is Phase.FAILED
        assert drive.state.failure
        assert "3 attempts in a row" in drive.state.failure.message
    assert len(dies.trace()) == 3
