"""`spotfirst simulate`: what a training would have cost, as people and scripts see it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from spotfirst_airflow.cli import app

# An hour each: spot for a day, none for a day.
TRACE = {"metadata": {"gap_seconds": 3600}, "data": [*[1] * 24, *[0] * 24], "prices": [0.5] * 48}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("SPOTFIRST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "us-east-1a_v100.json").write_text(json.dumps(TRACE))
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["simulate", "--starts", "4", *words])


def ok(*words: str) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def told(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ok(*words, "--json"))
    return found


def test_it_works_from_the_length_of_the_training_alone() -> None:
    shown = ok("--work", "2h")
    assert "a calibrated market" in shown
    assert "as no --market is given" in shown
    assert "1.5 x the work (3 h), as none is given" in shown
    assert "AWS's list price" in shown
    for policy in ("spotfirst", "uniform_progress", "greedy", "fallback", "on_demand"):
        assert policy in shown


def test_scripts_get_one_object_with_every_run() -> None:
    found = told("--work", "2h", "--deadline", "3h,4h", "--policy", "greedy,on_demand")
    assert len(found["rows"]) == 2 * 2
    assert len(found["runs"]) == 2 * 2 * 4
    assert sum(row["is_best"] for row in found["rows"]) == 2
    assert {row["deadline_s"] for row in found["rows"]} == {3 * 3600, 4 * 3600}


def test_the_same_seed_tells_the_same_and_another_one_another() -> None:
    words = ("--work", "8h", "--policy", "spot_only", "--market", "synthetic", "--seed")
    assert told(*words, "1") == told(*words, "1")
    assert told(*words, "1")["runs"] != told(*words, "2")["runs"]


def test_a_recording_is_played_with_its_prices(home: Path) -> None:
    words = ("--work", "2h", "--deadline", "4h", "--on-demand-price", "3", "--changeover", "0s")
    market = ("--market", "us-east-1a_v100.json", "--policy", "spot_only,on_demand")
    found = told(*words, *market)
    assert found["pools"][0]["pool"]["zone"] == "us-east-1a"
    assert found["on_demand_usd"] == "6.0000"
    costs = {row["policy"]: float(row["mean_usd"]) for row in found["rows"]}
    assert costs["on_demand"] == 6
    assert costs["spot_only"] == 0.5  # from two of four moments on there is spot: a dollar each


def test_the_other_polarity_is_for_recordings_that_say_1_for_none() -> None:
    words = ("--work", "2h", "--on-demand-price", "3", "--market", "us-east-1a_v100.json")
    starts_with_spot = [
        [
            run["finished_s"] is not None
            for run in told(*words, *more, "--policy", "spot_only")["runs"]
        ]
        for more in ((), ("--inverted",))
    ]
    assert starts_with_spot == [[True, True, False, False], [False, False, True, True]]


def test_several_files_or_a_folder_are_several_zones(home: Path) -> None:
    (home / "us-west-2b_v100.json").write_text(json.dumps(TRACE))
    words = ("--work", "2h", "--on-demand-price", "3", "--policy", "spot_only")
    both = ("--market", "us-east-1a_v100.json", "--market", "us-west-2b_v100.json")
    for market in (both, ("--market", "."), ("--market", "us-*.json")):
        zones = [pool["pool"]["zone"] for pool in told(*words, *market)["pools"]]
        assert zones == ["us-east-1a", "us-west-2b"]
    named = ("--market", "x=us-east-1a_v100.json", "--market", "y=us-west-2b_v100.json")
    assert [pool["pool"]["zone"] for pool in told(*words, *named)["pools"]] == ["x", "y"]


def test_what_missed_its_deadline_is_counted() -> None:
    shown = ok(
        "--work", "2h", "--on-demand-price", "3", "--market", "us-east-1a_v100.json",
        "--policy", "spot_only",
    )  # fmt: skip
    assert "2 missed, 2/4" in shown


def test_a_spec_says_what_options_do_not(home: Path) -> None:
    spec = {
        "command": ["python", "train.py"], "instance_types": ["g5.xlarge"], "deadline": "5h",
        "budget_usd": 9, "policy": "fallback", "policy_options": {"losses": 1},
    }  # fmt: skip
    (home / "spec.json").write_text(json.dumps(spec))
    found = told("spec.json", "--work", "2h", "--policy", "fallback")
    assert {pool["pool"]["instance_type"] for pool in found["pools"]} == {"g5.xlarge"}
    assert {row["deadline_s"] for row in found["rows"]} == {5 * 3600}
    assert found["task"]["budget"]["usd"] == "9"
    assert told("spec.json", "--work", "2h", "--budget", "4")["task"]["budget"]["usd"] == "4"


def test_a_budget_stops_runs() -> None:
    found = told("--work", "8h", "--budget", "2", "--policy", "on_demand")
    assert all("budget" in run["stopped"] for run in found["runs"])
    assert all(float(run["cost_usd"]) <= 2 for run in found["runs"])
    alert = told("--work", "8h", "--budget", "2", "--on-budget", "alert", "--policy", "on_demand")
    assert not any(run["stopped"] for run in alert["runs"])


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "Give --work"),
        (("--work", "long"), "--work 'long' is no duration"),
        (("--work", "2h", "--deadline", "3h,soon"), "--deadline 'soon' is no duration"),
        (("--work", "2h", "--policy", "lucky"), "unknown policy 'lucky'"),
        (("--work", "2h", "--market", "nowhere.csv"), "is no file, and no market of that name"),
        (("--work", "2h", "--market", "synthetic", "--market", "x.csv"), "a market of its own"),
        (("--work", "2h", "--market", "us-east-1a_v100.json"), "--instance-type"),
        (("--work", "2h", "--instance-type", "x9.huge"), "no price of 'x9.huge' is known"),
        (("--work", "60h", "--market", ".", "--on-demand-price", "3"), "but a run may take"),
        (("--work", "2h", "--checkpoint-size", "much"), "is no size"),
        (("--work", "2h", "--budget", "much"), "is no number of dollars"),
        (("--work", "2h", "--budget", "0"), "it buys nothing"),
        (("--work", "2h", "--on-budget", "pray", "--budget", "3"), "on_budget"),
        (("--work", "2h", "--scarcity", "huge"), "scarcity"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(words: tuple[str, ...], why: str) -> None:
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert why in result.output
