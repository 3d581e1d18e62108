"""The page on policies: it names every policy, and its example is one."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from spotfirst_airflow.policies import load_policy
from spotfirst_airflow.simulation import Task, World, simulate
from tests.policies.test_spotfirst import place

PAGE = Path(__file__).parents[2].joinpath("docs", "policies.md").read_text()


def test_every_policy_that_is_installed_is_on_the_page() -> None:
    for entry in entry_points(group="spotfirst.policies"):
        assert f"`{entry.name}`" in PAGE


def test_the_options_on_the_page_exist() -> None:
    names = ("losses", "loss_window_s", "no_capacity_s", "return_after_s", "retry_s")
    for name in names:
        assert f"`{name}`" in PAGE
    load_policy("fallback", dict.fromkeys(names, 1))


def test_the_example_trains_by_night() -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, "docs/policies.md", "exec"), names)
    night = names["NightShift"](begins=20)
    played = simulate(Task(work_s=3600.0, changeover_s=60.0), World([place("a", (0, 1))]), night)
    assert played.finished_s is not None
    assert played.state.attempts[0].launched is not None
    assert played.state.attempts[0].launched.started_at.hour >= 20
