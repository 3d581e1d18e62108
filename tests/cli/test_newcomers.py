"""What people who begin do: another storage than they think, an id that was used before."""

from __future__ import annotations

import pytest

from tests.cli.shell import Shell


@pytest.mark.parametrize("words", [["runs"], ["cost"], ["datasets", "ls"], ["show", "r"]])
def test_a_storage_that_is_a_file_is_not_an_empty_one(shell: Shell, words: list[str]) -> None:
    file = shell.home / "runs.txt"
    file.write_text("notes")
    for url in (str(file), f"file://{file}", "/dev/null"):
        done = shell.call(*words, "--storage", url)
        assert done.returncode == 2
        assert "is a file; give a folder" in done.stderr


def test_a_script_without_files_succeeds_with_a_warning_and_a_second_run_is_said_not_to_start(
    shell: Shell,
) -> None:
    words = ["run", shell.spec(command=["true"]), "--run-id", "r"]
    first = shell.ok(*words)
    assert "attempt 1: completed" in first
    assert "WARNING: the script wrote no file into $SPOTFIRST_CHECKPOINT_DIR" in first
    assert "attempt 2" not in first
    assert "it has succeeded before, and nothing is started" in shell.ok(*words)


def test_costs_have_one_total_where_a_run_cost_nothing(shell: Shell) -> None:
    shell.ok("run", shell.spec(), "--run-id", "a", "-e", "STEPS=1")
    shell.call("run", shell.spec(budget_usd="0.0000001"), "--run-id", "b")
    totals = [line for line in shell.ok("cost").splitlines() if line.startswith("total")]
    assert len(totals) == 1
    assert totals[0].endswith("simulated")


def test_doctor_looks_at_the_local_fleet_when_runs_are_kept_in_a_folder(shell: Shell) -> None:
    told = shell.call("doctor").stdout
    assert "credentials" not in told
    assert "storage" in told
    assert "credentials" in shell.call("doctor", "--fleet", "ec2").stdout
