"""Looking at runs, paying for them, replaying and stopping them."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from spotfirst import events as e
from spotfirst.market import Market, Pool
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage, open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.cli import app
from spotfirst_airflow.fleets import LaunchRequest
from spotfirst_airflow.fleets.local import LocalFleet
from tests.cli.conftest import Finished
from tests.cli.shell import Shell, launched
from tests.waiting import PATIENCE_S, wait_until


def test_runs_lists_the_newest_first_and_by_prefix(finished: Finished) -> None:
    storage = open_storage(str(finished.shell.storage))
    later = RunSpec(run_id="later", created_at=utc_now(), command=("true",))
    create_run(storage, later).journal().append(e.Created(at=utc_now()))
    rows = finished.shell.json("runs")
    assert [row["run_id"] for row in rows][:2] == ["later", "done"]
    assert [row["run_id"] for row in finished.shell.json("runs", "--prefix", "do")] == ["done"]


def test_show_has_attempts_checkpoints_cost_and_changeovers(finished: Finished) -> None:
    text = finished.shell.ok("show", "done", "--events")
    for word in (
        "python train.py",
        "team=search",
        "checkpoints",
        "cost $",
        "changeovers 1",
        "created",
    ):
        assert word in text
    found = finished.shell.json("show", "done")
    [change] = found["changeovers"]
    assert (change["why"], change["lost_steps"]) == (
        "notice",
        None,
    )  # files mode: no steps are known
    assert len(found["state"]["attempts"]) == 2


def test_cost_rows_add_up_to_the_total(finished: Finished) -> None:
    [account] = finished.shell.json("cost", "done")
    costs = [Decimal(charge["cost_usd"]) for charge in account["charges"]]
    assert len(costs) == 2
    assert sum(costs) == Decimal(account["total_usd"]) > 0
    assert account["charges"][0]["tags"] == {"team": "search"}


def test_cost_is_summed_by_a_tag(finished: Finished) -> None:
    rows = {row["team"]: row for row in finished.shell.json("cost", "--by", "team")}
    [account] = finished.shell.json("cost", "done")
    assert rows["search"]["cost_usd"] == account["total_usd"]
    assert rows["search"]["on_demand_usd"] == account["on_demand_usd"]
    line = next(
        line for line in finished.shell.ok("cost", "--by", "team").splitlines() if "search" in line
    )
    assert line.count("simulated") == 2


def test_cost_shows_apart_what_crossed_regions(shell: Shell) -> None:
    at = utc_now()
    storage = open_storage(str(shell.storage))
    run = create_run(storage, RunSpec(run_id="far", created_at=at, command=("true",)))
    journal = run.journal()
    pool = Pool(instance_type="g", zone="west-2a")
    for event in (
        e.Created(at=at),
        e.Launching(at=at, attempt=1, token="t", market=Market.SPOT, pool=pool, reason=""),
        e.Launched(
            at=at, attempt=1, instance_id="i", started_at=at, price_usd_h=Decimal(1),
            price_source="", price_at=at, on_demand_usd_h=Decimal(1), write_usd_gb=Decimal("0.02"),
        ),
        e.Ended(at=at, attempt=1, cause="completed", ended_at=at, written_bytes=100 * 10**9),
    ):  # fmt: skip
        journal.append(event)
    [account] = shell.json("cost", "far")
    assert (account["total_usd"], account["egress_usd"]) == ("2.0000", "2.0000")
    assert "between regions" in shell.ok("cost", "far")
    assert "$2.00 of it between regions" in shell.ok("show", "far")


def test_logs_gives_each_line_once_and_those_of_one_attempt(finished: Finished) -> None:
    every = finished.shell.ok("logs", "done").splitlines()
    assert every.count("[1] begins at 0") == 1
    second = finished.shell.ok("logs", "done", "--attempt", "2").splitlines()
    assert "step 100" in second
    assert "begins at 0" not in second


def test_replay_starts_at_the_checkpoint_with_what_is_set(finished: Finished) -> None:
    chosen = finished.shell.json("show", "done")["checkpoints"][-1]["step"]
    out = finished.shell.ok(
        "replay", f"done@{chosen}", "--run-id", "again", "--set", "policy=on_demand",
        "--set", "env.STEPS=110",
    )  # fmt: skip
    assert "[1] begins at 100" in out
    found = finished.shell.json("show", "again")
    source = found["spec"]["resume_from"]
    assert (source["run_id"], source["step"]) == ("done", chosen)
    assert found["state"]["attempts"][0]["market"] == "on-demand"


def test_stop_waits_until_every_instance_is_gone(shell: Shell) -> None:
    process = shell.start("run", shell.spec(), "--run-id", "busy", "-e", "STEPS=100000")
    wait_until(lambda: shell.is_training("busy"))
    out = shell.ok("stop", "busy", "--reason", "enough")
    assert "run busy stopped; its newest checkpoint is at step" in out
    assert shell.fleet().owned() == []
    told, _ = process.communicate(timeout=PATIENCE_S)
    assert "stopped: enough" in told


def test_reap_takes_the_fleet_options_that_a_run_has(shell: Shell) -> None:
    words = ["--fleet-option", 'market={"kind": "calm"}']
    assert shell.ok("reap", *words) == "no instances are running\n"


def test_reap_ends_what_no_live_run_owns_and_nothing_else(shell: Shell) -> None:
    storage = open_storage(str(shell.storage))
    fleet = LocalFleet(
        LocalFleet.settle(
            {"root": str(shell.home / "fleet"), "agent_command": ["sleep", "300"]}, now=utc_now()
        ),
        environment={},
    )
    places = {"alive": storage.url, "over": storage.url, "foreign": "s3://elsewhere/runs"}
    for run_id, url in places.items():
        if url == storage.url:
            journal = create_run(
                storage, RunSpec(run_id=run_id, created_at=utc_now(), command=("true",))
            ).journal()
            journal.append(e.Created(at=utc_now() - timedelta(hours=1)))
            journal.append(
                e.Launching(
                    at=utc_now() - timedelta(hours=1), attempt=1, token=f"{run_id}-1",
                    market=Market.SPOT, pool=Pool(instance_type="g6.xlarge", zone="local-a"),
                    reason="spot first",
                )
            )  # fmt: skip
            if run_id == "over":
                journal.append(e.Failed(at=utc_now() - timedelta(minutes=30), message="gave up"))
        fleet.launch(
            LaunchRequest(
                token=f"{run_id}-1", run_id=run_id, attempt=1, market=Market.SPOT,
                pool=Pool(instance_type="g6.xlarge", zone="local-a"), storage_url=url,
                max_life_s=300.0,
            )
        )  # fmt: skip
    assert "over" in shell.ok("reap")  # the grace time spares what began just now
    assert len(fleet.owned()) == 3
    assert "would end" in shell.ok("reap", "--grace", "0", "--dry-run")
    assert len(fleet.owned()) == 3
    verdicts = shell.json("reap", "--grace", "0")
    assert {v["run_id"] for v in verdicts if v["standing"] == "orphan"} == {"over"}
    assert {v["run_id"]: v["standing"] for v in verdicts}["foreign"] == "foreign"
    assert {i.token for i in fleet.owned()} == {"alive-1", "foreign-1"}


def test_datasets_are_committed_listed_and_compared(shell: Shell) -> None:
    corpus = shell.home / "corpus"
    corpus.mkdir()
    (corpus / "a.txt").write_text("one")
    assert "corpus@1: 1 files, 3 B" in shell.ok("datasets", "commit", "corpus", str(corpus))
    (corpus / "b.txt").write_text("two!")
    shell.ok("datasets", "commit", "corpus", str(corpus), "-m", "more")
    versions = shell.json("datasets", "ls", "corpus")["corpus"]
    assert [v["version"] for v in versions] == [1, 2]
    assert "+ b.txt" in shell.ok("datasets", "diff", "corpus@1", "corpus@latest")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show", "nothing"), "there is no run 'nothing'"),
        (("run",), "nothing to run"),
        (("run", "missing.json"), "cannot be read"),
        (("run", "--policy", "lucky", "--", "true"), "unknown policy 'lucky'"),
        (("run", "--deadline", "soon", "--", "true"), "deadline 'soon'"),
        (("run", "--set", "polcy=x", "--", "true"), "unknown keys polcy"),
        (("run", "--env", "API_KEY=1", "--", "true"), "looks like a secret"),
        (("replay", "nothing@3"), "there is no run 'nothing'"),
        (("cost", "--by", "mood"), "costs are summed by"),
        (("datasets", "ls", "none"), "there is no dataset"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    finished: Finished, words: tuple[str, ...], message: str
) -> None:
    done = finished.shell.call(*words)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


ODD = {
    "a price that is none": ("journal/00000003.json", {"price_usd_h": "NaN"}),
    "an endless price": ("journal/00000003.json", {"price_usd_h": "1E+999999999"}),
    "a price below 0": ("journal/00000003.json", {"price_usd_h": "-5"}),
    "a step of the wrong type": ("journal/00000002.json", {"attempt": "one"}),
    "a newer format": ("journal/00000001.json", {"v": 99}),
    "no JSON": ("journal/00000002.json", b"\xff{"),
    "a huge object": ("journal/00000002.json", b" " * (5 << 20)),
    "a damaged spec": ("spec.json", b"{"),
    "no spec": ("spec.json", None),
}


def invoke(storage: Storage, *words: str) -> Any:
    """A command in this process: a dozen processes for each case would take minutes."""
    ended = CliRunner().invoke(app, [*words, "-s", storage.url])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), words
    return ended


@pytest.mark.parametrize("name", ODD)
def test_a_broken_run_is_named_by_its_url_and_the_others_are_listed(
    tmp_path: Path, name: str
) -> None:
    at = utc_now()
    storage = open_storage(str(tmp_path))
    pool = Pool(instance_type="g", zone="a")
    for run_id in ("good", "odd"):
        spec = RunSpec(run_id=run_id, created_at=at, command=("true",), tags={"team": "t"})
        journal = create_run(storage, spec).journal()
        for event in (
            e.Created(at=at),
            e.Launching(at=at, attempt=1, token=run_id, market=Market.SPOT, pool=pool, reason=""),
            e.Launched(
                at=at, attempt=1, instance_id="i", started_at=at, price_usd_h=Decimal(1),
                price_source="", price_at=at, on_demand_usd_h=Decimal(1),
            ),
        ):  # fmt: skip
            journal.append(event)
    path, change = ODD[name]
    [file] = [file for file in tmp_path.rglob(path) if "odd" in file.parts]
    if change is None:
        file.unlink()
    elif isinstance(change, bytes):
        file.write_bytes(change)
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    where = Run(storage, "odd").url

    listed = invoke(storage, "runs")
    assert listed.exit_code == 0
    assert "good" in listed.stdout
    assert re.search(r"odd +unreadable", listed.stdout)
    assert where in listed.stderr
    rows = json.loads(invoke(storage, "runs", "--json").stdout)
    assert [row["phase"] for row in rows] == ["active", "unreadable"]
    for words in (("cost",), ("cost", "--by", "team"), ("cost", "--json")):
        summed = invoke(storage, *words)
        assert summed.exit_code == 1, "a sum without it must not pass for the whole"
        assert where in summed.stderr
        assert summed.stdout
    assert invoke(storage, "cost", "good").exit_code == 0
    for words in (("cost", "odd"), ("show", "odd"), ("logs", "odd"), ("stop", "odd")):
        assert invoke(storage, *words).exit_code in {1, 2}, words


def test_what_only_holds_checkpoints_is_no_broken_run(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.write("runs/by-hand/checkpoints/00000001.json", b"{}")
    listed = invoke(storage, "runs")
    assert "no runs" in listed.stdout
    assert listed.stderr == ""


def test_a_run_past_its_limits_is_said_to_be_by_runs_and_show(tmp_path: Path) -> None:
    at = utc_now() - timedelta(hours=2)
    storage = open_storage(str(tmp_path))
    limits = {"deadline": at + timedelta(hours=1), "budget_usd": Decimal("1.50")}
    spec = RunSpec(run_id="late", created_at=at, command=("true",), **limits)
    journal = create_run(storage, spec).journal()
    for event in launched(at):
        journal.append(event)
    shown = invoke(storage, "show", "late").stdout
    assert re.search(r"passed +the deadline .* has passed", shown)
    assert re.search(r"passed +the budget of \$1.50 is used up: \$2.00", shown)
    assert "spotfirst reap" in shown
    assert set(json.loads(invoke(storage, "show", "late", "--json").stdout)["passed"]) == {
        "budget", "deadline",
    }  # fmt: skip
    assert "past its budget and deadline" in invoke(storage, "runs").stdout
    [row] = json.loads(invoke(storage, "runs", "--json").stdout)
    assert row["passed"] == ["budget", "deadline"]


def test_a_run_that_was_stopped_says_why(tmp_path: Path) -> None:
    at = utc_now()
    storage = open_storage(str(tmp_path))
    journal = create_run(storage, RunSpec(run_id="r", created_at=at, command=("true",))).journal()
    for event in (
        e.Created(at=at),
        e.StopRequested(at=at, reason="the budget of $5.00 is used up", cause="budget"),
        e.Stopped(at=at, reason="the budget of $5.00 is used up"),
    ):
        journal.append(event)
    assert re.search(r"stopped +the budget of \$5.00", invoke(storage, "show", "r").stdout)


def test_a_chain_that_cannot_be_read_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    storage, at = open_storage(str(tmp_path)), utc_now()
    run = create_run(storage, RunSpec(run_id="odd", created_at=at, command=("true",)))
    run.journal().append(e.Created(at=at))
    run.storage.write("checkpoints/00000001.json", b"garbage")
    shown = invoke(storage, "show", "odd")
    assert shown.exit_code == 0
    assert f"{run.url}/checkpoints/00000001.json" in shown.stdout.replace("\n", "")
    assert "cost" in shown.stdout
