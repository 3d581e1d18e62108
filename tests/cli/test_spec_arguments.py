"""A spec file says the same as the operator's arguments, from its storage to its export."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.shell import Shell


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def test_the_files_of_a_run_are_exported_into_a_folder(shell: Shell) -> None:
    target = shell.home / "models" / "v1"
    target.mkdir(parents=True)
    (target / "notes.txt").write_text("stays")
    spec = shell.spec(
        checkpoint_period_s=None, export=str(target), storage=str(shell.home / "elsewhere"), env={"STEPS": 5},
        checkpoint_period="1s", max_life="20m",
    )  # fmt: skip
    del shell.environment["SPOTFIRST_STORAGE"]
    found = shell.json("run", spec, "--run-id", "r")
    assert found["exported"] == str(target)
    assert found["storage"] == str(shell.home / "elsewhere")
    assert (target / "step").read_text() == "5"
    assert (target / "notes.txt").read_text() == "stays"
    assert isinstance(found["cost_usd"], float)
    assert found["is_simulated"] is True


def test_a_missing_program_is_named_wherever_the_failure_is_told(shell: Shell) -> None:
    done = shell.call("run", "--run-id", "r", "--code", "code", "--", "pyhton", "train.py")
    assert done.returncode == 1
    assert "no program 'pyhton' was found on the instance's PATH" in done.stdout
    assert "exited with None" not in done.stdout
    shown = shell.ok("show", "r")
    assert "no program 'pyhton'" in shown
    assert "saved" not in shown


def test_show_has_the_variables_and_the_metrics_of_a_run(shell: Shell) -> None:
    shell.call("run", shell.spec(env={"STEPS": 3, "NOTE": "two words"}), "--run-id", "r")
    shown = shell.ok("show", "r")
    assert "STEPS=3" in shown
    assert "NOTE='two words'" in shown
    assert "simulated" in shown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"deadline": 8}, "deadline 8: a number has no unit"),
        ({"checkpoint_period": 300}, "checkpoint_period 300"),
        ({"env": {"A": None}}, "variable A"),
        ({"deadline": "1h", "training_time": "2h"}, "training_time"),
        ({"export": "model.safetensors"}, "export 'model.safetensors'"),
        (
            {"checkpoint_period_s": 1, "checkpoint_period": "5m"},
            "checkpoint_period_s and checkpoint_period are both given",
        ),
        ({"command": ["python", "trian.py"]}, "has no 'trian.py' (did you mean train.py?)"),
        ({"max_life_s": 300}, "before its first checkpoint"),
        ({"script_retries": "many"}, "script_retries 'many'"),
    ],
)
def test_a_wrong_value_in_a_spec_is_one_line_and_code_2(
    shell: Shell, changes: dict[str, object], said: str
) -> None:
    values = {"checkpoint_period_s": None, **changes}
    done = shell.call("run", shell.spec(**values))
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
