"""``spotfirst run`` in the foreground, also through Ctrl-C and death."""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import typer

from spotfirst import events as e
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.state import Phase
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.arguments import to_request
from spotfirst_airflow.budget import OnBudget
from spotfirst_airflow.cli._running import see_through
from spotfirst_airflow.cli._specfile import read_spec_file
from spotfirst_airflow.fleets.local import LocalFleet
from spotfirst_airflow.submission import attach
from tests.cli.conftest import Finished
from tests.cli.shell import Shell, launched
from tests.waiting import PATIENCE_S, wait_until

ENDLESS = ("-e", "STEPS=100000")


def test_a_run_tells_what_happens_as_it_happens(finished: Finished) -> None:
    text = finished.output.stdout
    wanted = (
        "attempt 1: launching spot, g6.xlarge in local-a",
        "[1] begins at 0",
        "attempt 1: interruption notice",
        "attempt 2: launching spot, g6.xlarge in local-b",
        "attempt 2: completed",
        "succeeded with attempt 2",
    )
    places = [text.find(line) for line in wanted]
    assert -1 not in places, text
    assert places == sorted(places)


def test_a_replacement_goes_on_where_the_notice_found_the_first_attempt(finished: Finished) -> None:
    [resumed] = [
        int(line.rsplit(" ", 1)[1])
        for line in finished.output.stdout.splitlines()
        if line.startswith("[2] begins at")
    ]
    assert resumed > 0


def test_a_summary_ends_it(finished: Finished) -> None:
    summary = finished.output.stdout.rpartition("succeeded with attempt")[2]
    for word in (
        "run done succeeded",
        "interrupted, with notice",
        "steps lost    -",
        "changeovers",
    ):
        assert word in summary


def test_json_is_all_that_standard_output_gets(shell: Shell) -> None:
    done = shell.call("run", shell.spec(), "--run-id", "quiet", "--json")
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert (outcome["run_id"], outcome["phase"], outcome["attempts"]) == ("quiet", "succeeded", 1)
    assert "attempt 1: completed" in done.stderr


def test_a_script_that_fails_gives_its_last_lines_and_code_1(shell: Shell) -> None:
    done = shell.call("run", shell.spec(), "--run-id", "bad", "-e", "EXIT_CODE=7", "-e", "STEPS=10")
    assert done.returncode == 1
    assert "script failed (exit code 7)" in done.stdout
    assert "  | step 10" in done.stdout


def test_a_command_on_the_command_line_needs_no_spec_file(shell: Shell) -> None:
    out = shell.ok(
        "run", "--set", "checkpoint_mode=files", "--run-id", "short", "--", "python", "-c", "print(6*7)"
    )  # fmt: skip
    assert "[1] 42" in out


def test_a_run_that_succeeded_is_not_trained_again(finished: Finished) -> None:
    before = finished.shell.state("done").seq
    out = finished.shell.ok("run", "--run-id", "done")
    assert "run done succeeded" in out
    assert len(finished.shell.state("done").attempts) == 2
    assert finished.shell.state("done").seq == before


def test_ctrl_c_stops_with_a_checkpoint_and_the_same_id_goes_on(shell: Shell) -> None:
    process = shell.start("run", shell.spec(), "--run-id", "night", *ENDLESS)
    wait_until(lambda: shell.is_training("night"))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, out + err
    assert "run night stopped" in out
    assert shell.fleet().owned() == []
    kept = shell.state("night").checkpoint_step
    assert kept
    # The request as it reads now counts: it asks for few steps, so it soon ends.
    again = shell.ok("run", shell.spec(), "--run-id", "night", "-e", "STEPS=20")
    assert "run night succeeded" in again
    assert "begins at 0" not in again


def test_two_signals_detach_and_the_run_can_be_taken_up_again(shell: Shell) -> None:
    # A machine under load may need longer than two seconds for a signal.
    patient = (
        "from spotfirst_airflow.cli import app, foreground;"
        "foreground.SECOND_THOUGHTS_S = 600.0; app()"
    )
    words = ("run", shell.spec(), "--run-id", "long", *ENDLESS)
    process = shell.start(*words, program=(sys.executable, "-c", patient))
    wait_until(lambda: shell.is_training("long"))
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    shown = ""
    while "Ctrl-C again" not in shown:
        line = process.stdout.readline()
        assert line, f"it ended before it asked: {shown}"
        shown += line
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0
    assert "spotfirst run --run-id long" in out
    assert shell.state("long").phase is Phase.ACTIVE
    assert len(shell.fleet().owned()) == 1
    again = shell.start("run", "--run-id", "long")
    wait_until(lambda: shell.state("long").owner.endswith(f":{again.pid}"))
    again.send_signal(signal.SIGTERM)
    out, err = again.communicate(timeout=PATIENCE_S)
    assert "run long stopped" in out, err
    assert len(shell.state("long").attempts) == 1


def test_a_command_line_that_was_killed_is_replaced_by_the_next(shell: Shell) -> None:
    process = shell.start("run", shell.spec(), "--run-id", "killed", "-e", "STEPS=120")
    wait_until(lambda: shell.is_training("killed"))
    process.kill()
    process.communicate()
    out = shell.ok("run", "--run-id", "killed")
    assert "run killed succeeded" in out
    assert len(shell.state("killed").attempts) == 1


def test_a_run_whose_deadline_has_passed_asks_for_another(shell: Shell) -> None:
    late = RunSpec(
        run_id="late",
        created_at=utc_now() - timedelta(hours=2),
        command=("true",),
        deadline=utc_now() - timedelta(hours=1),
    )
    journal = create_run(open_storage(str(shell.storage)), late).journal()
    journal.append(e.Created(at=late.created_at))
    journal.append(e.Stopped(at=utc_now(), reason="the deadline has passed"))
    done = shell.call("run", "--run-id", "late")
    assert done.returncode == 2
    assert "with another --deadline" in done.stderr


@pytest.mark.parametrize(("on_budget", "code"), [("stop", 2), ("alert", 0)])
def test_a_budget_that_only_warns_lets_a_run_be_taken_up_again(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, on_budget: OnBudget, code: int
) -> None:
    monkeypatch.setenv("SPOTFIRST_LOCAL_FLEET", str(shell.home / "fleet"))
    at = utc_now() - timedelta(hours=2)
    spec = RunSpec(
        run_id="spent", created_at=at, command=("true",), checkpoint_mode="files",
        budget_usd=Decimal(1), on_budget=on_budget,
        fleet_options=LocalFleet.settle({}, now=utc_now()),
    )  # fmt: skip
    journal = create_run(open_storage(str(shell.storage)), spec).journal()
    for event in (
        *launched(at),
        e.Ended(at=utc_now(), attempt=1, cause="handed_over", ended_at=utc_now()),
        e.Stopped(at=utc_now(), reason="somebody stopped it"),
    ):  # fmt: skip
        journal.append(event)
    done = shell.call("run", "--run-id", "spent")
    assert done.returncode == code, done.stderr
    assert ("with another --budget" in done.stderr) is (code == 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_a_run_is_taken_over_stops_it_before_a_launch(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("SPOTFIRST_LOCAL_FLEET", str(shell.home / "fleet"))
    storage = open_storage(str(shell.storage))
    request = to_request(read_spec_file(Path(shell.spec())))

    def take_over() -> Run:
        os.kill(os.getpid(), number)
        return attach(storage, "brief", request, owner="me", environment={})

    with pytest.raises(typer.Exit):
        see_through(take_over, owner="me", quiet=True, json=False)
    state = shell.state("brief")
    assert state.phase is Phase.STOPPED
    assert state.attempts == ()


def test_a_second_signal_gives_up_an_attachment_that_takes_too_long(shell: Shell) -> None:
    def take_over() -> Run:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt):
        see_through(take_over, owner="me", quiet=True, json=False)
