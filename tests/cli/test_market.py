"""`spotfirst market`: what an account saw goes into files, and files are shown."""

from __future__ import annotations

import json
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from spotfirst import events as e
from spotfirst.market import Market, Pool
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from spotfirst_airflow.cli import app
from spotfirst_airflow.fleets.ec2 import aws as aws_module
from spotfirst_airflow.markets.history import Price, Score, Seen, read
from tests.controller.world import START
from tests.fakes.faults import client_error
from tests.fleets.ec2.launches import REGION
from tests.fleets.ec2.launches import World as Account

TYPE = "g6.xlarge"


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["market", *words])


def ok(*words: str) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch) -> Account:
    account = Account()
    monkeypatch.setattr(aws_module.Aws, "of", lambda identity: account.aws())
    monkeypatch.setenv("COLUMNS", "200")
    return account


def test_prices_scores_and_what_runs_saw_are_recorded_once(
    account: Account, tmp_path: Path
) -> None:
    storage = open_storage(str(tmp_path / "runs"))
    run = create_run(storage, RunSpec(run_id="r", created_at=START, command=("train",)))
    pool = Pool(instance_type=TYPE, zone=f"{REGION}a")
    ended = START + timedelta(hours=2)
    journal = run.journal()
    for event in (
        e.Created(at=START),
        e.Launching(at=START, attempt=1, token="1", market=Market.SPOT, pool=pool, reason=""),
        e.Launched(at=START, attempt=1, instance_id="i", started_at=START, price_usd_h=Decimal(1),
                   price_source="t", price_at=START, on_demand_usd_h=Decimal(3)),
        e.Ended(at=ended, attempt=1, cause="interrupted", ended_at=ended, by_fleet=True),
        e.Launching(at=ended, attempt=2, token="2", market=Market.SPOT, pool=pool, reason=""),
        e.NotLaunched(at=ended + timedelta(minutes=5), attempt=2, cause="no_capacity", message=""),
    ):  # fmt: skip
        journal.append(event)
    words = ("record", str(tmp_path / "market"), "--instance-type", TYPE, "--region", REGION)
    assert "new lines" in ok(*words, "--storage", str(tmp_path / "runs"))
    lines = read(tmp_path / "market" / f"{TYPE}.jsonl")
    assert any(isinstance(line, Price) and line.zone for line in lines)
    assert any(isinstance(line, Score) for line in lines)
    assert [line.there for line in lines if isinstance(line, Seen)] == [True, False, False]
    ok(*words, "--storage", str(tmp_path / "runs"))
    fresh = read(tmp_path / "market" / f"{TYPE}.jsonl")[len(lines) :]
    assert all(isinstance(line, (Price, Score)) for line in fresh)
    assert len({line.at for line in fresh}) == 1  # only what holds at this moment


def test_without_the_permission_for_scores_the_rest_is_recorded(
    account: Account, tmp_path: Path
) -> None:
    denied = client_error("UnauthorizedOperation", "not allowed", "GetSpotPlacementScores")
    account.faults.before("GetSpotPlacementScores", denied)
    text = ok("record", str(tmp_path), "--instance-type", TYPE, "--region", REGION)
    assert "no placement scores" in text
    assert any(isinstance(line, Price) for line in read(tmp_path / f"{TYPE}.jsonl"))


def test_a_recording_is_shown_with_its_share_of_spot_and_prices(tmp_path: Path) -> None:
    csv = tmp_path / "us-east-1a.csv"
    csv.write_text(
        "date,availability,price_usd_h\n2026-01-01 00:00:00,1,0.4\n2026-01-01 01:00:00,0,0.4\n"
        "2026-01-01 02:00:00,1,0.8\n2026-01-01 03:00:00,1,0.8\n"
    )
    text = ok("show", str(csv))
    assert "us-east-1a" in text
    assert "75%" in text
    [row] = json.loads(ok("show", str(csv), "--json"))
    assert (row["losses"], row["up_h"], row["down_h"]) == (1, 1.5, 1.0)
    assert row["mean_usd_h"] == pytest.approx(0.6)
    [other] = json.loads(ok("show", str(csv), "--inverted", "--json"))
    assert other["share"] == 0.25


def test_a_recorded_market_can_be_simulated(account: Account, tmp_path: Path) -> None:
    ok("record", str(tmp_path), "--instance-type", TYPE, "--region", REGION)
    result: Any = CliRunner().invoke(
        app,
        ["simulate", "--market", str(tmp_path / f"{TYPE}.jsonl"), "--instance-type", TYPE,
         "--work", "1h", "--deadline", "3h", "--starts", "2", "--json"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
