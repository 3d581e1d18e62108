"""The loop of ``spotfirst run`` in the foreground."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.cli import foreground
from spotfirst_airflow.cli.display import Display
from spotfirst_airflow.cli.foreground import Interrupts, follow


class Clock:
    """Passes only while somebody waits; then the user detaches."""

    def __init__(self, interrupts: Interrupts, until_s: float) -> None:
        self.now_s = 0.0
        self._interrupts, self._until_s = interrupts, until_s

    def monotonic(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        if self.now_s >= self._until_s:
            self._interrupts.detach = True


def test_a_fleet_that_fails_is_asked_again_as_late_as_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = RunSpec(run_id="r", created_at=utc_now(), command=("true",))
    run = create_run(open_storage(str(tmp_path)), spec)
    run.journal().append(e.Created(at=utc_now()))
    interrupts = Interrupts()
    clock = Clock(interrupts, until_s=200)
    monkeypatch.setattr(foreground, "time", clock)
    monkeypatch.setattr(interrupts, "wait", clock.wait)
    asked_at: list[float] = []

    def fail(*_: Any, **__: Any) -> None:
        asked_at.append(clock.now_s)
        msg = "the disk is full"
        raise FleetUnavailable(msg)

    monkeypatch.setattr("spotfirst_airflow.following.open_controller", fail)
    said = io.StringIO()
    with Display(Console(file=said, width=200)) as display:
        assert follow(run, display, interrupts, owner="me") is None
    assert asked_at == [0, 2, 6, 14, 30, 62, 122, 182]
    assert said.getvalue().count("Cannot look after the run now") == len(asked_at)
