"""`spotfirst prices`: the table as people see it, and a fresh one from AWS's list."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from datetime import datetime, timezone
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
from spotfirst_airflow.fleets.ec2.pricelist import list_url
from tests.fleets.ec2.offers import price_list, row

OFFERS = price_list(
    row(),
    row(Instance_Type="g6.2xlarge", PricePerUnit="1.2225000000"),
    row(Instance_Type="g6.2xlarge", Operating_System="Windows", PricePerUnit="2"),
    row(Instance_Type="g4ad.xlarge", PricePerUnit="0.47"),
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("SPOTFIRST_PRICES", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["prices", *words])


def ok(*words: str) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.output


class Server:
    """Serves one body; ``cut`` bytes of it are promised and not sent."""

    def __init__(self, body: bytes, *, status: int = 200, cut: int = 0) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) - cut])

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/index.csv"

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Any]:
    servers = []

    def start(*args: Any, **kwargs: Any) -> str:
        servers.append(Server(*args, **kwargs))
        return servers[-1].url

    yield start
    for server in servers:
        server.stop()


def test_the_table_is_shown_with_its_date_and_source(home: Path) -> None:
    shown = ok("--region", "us-east-1")
    assert "g6.xlarge" in shown
    assert "1 x L4" in shown
    assert "$0.8048" in shown
    assert "2026-07-20" in shown
    assert "https://" in shown


def test_types_can_be_named(home: Path) -> None:
    rows = json.loads(ok("g6.xlarge", "p5en.48xlarge", "--json"))
    assert {(each["region"], each["instance_type"]) for each in rows} == {
        ("us-east-1", "g6.xlarge"),
        ("us-east-1", "p5en.48xlarge"),
        ("us-east-2", "p5en.48xlarge"),
        ("us-west-2", "p5en.48xlarge"),
    }
    assert rows[0]["on_demand_usd_h"] == "0.8048"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--region", "eu-central-1"), "prices refresh --region eu-central-1"),
        (("g6.medium",), "no instance type 'g6.medium'"),
        (("p5e.48xlarge",), "no price of p5e.48xlarge"),
        (("refresh",), "give --region"),
    ],
)
def test_what_is_not_known_says_how_to_get_it(home: Path, words: tuple[str, ...], why: str) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert why in result.output


def test_a_region_is_read_from_a_file_and_used_from_then_on(home: Path) -> None:
    (home / "index.csv").write_text(OFFERS)
    told = ok("refresh", "--region", "eu-central-1", "--from", str(home / "index.csv"))
    assert "2 prices in eu-central-1" in told
    assert "2026-11-20" in told
    assert "g4ad.xlarge" in told
    shown = ok("--region", "eu-central-1")
    assert "$1.0064" in shown
    assert "$1.2225" in shown
    assert "$0.8048" in ok("--region", "us-east-1")


def test_a_region_is_read_from_a_server(home: Path, serve: Any) -> None:
    url = serve(OFFERS.encode())
    ok("refresh", "--region", "eu-central-1", "--from", url)
    assert url in ok("--region", "eu-central-1")


def test_aws_is_asked_when_no_list_is_given() -> None:
    assert list_url("eu-central-1") == (
        "https://pricing.us-east-1.amazonaws.com/offers/v1.0/aws/AmazonEC2/current/"
        "eu-central-1/index.csv"
    )


def test_another_file_keeps_its_other_regions(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "de.csv").write_text(OFFERS)
    (home / "ie.csv").write_text(price_list(row(Region_Code="eu-west-1", PricePerUnit="0.9")))
    out = str(home / "shared" / "prices.json")
    ok("refresh", "--region", "eu-central-1", "--from", str(home / "de.csv"), "--out", out)
    told = ok("refresh", "--region", "eu-west-1", "--from", str(home / "ie.csv"), "--out", out)
    assert f"SPOTFIRST_PRICES={out}" in told
    assert call("--region", "eu-west-1").exit_code == 2
    monkeypatch.setenv("SPOTFIRST_PRICES", out)
    assert "$0.9" in ok("--region", "eu-west-1")
    assert "$1.0064" in ok("--region", "eu-central-1")


@pytest.mark.parametrize(
    ("answer", "code", "why"),
    [
        ({"body": OFFERS.encode(), "cut": 20}, 2, "get it again"),
        ({"body": OFFERS.encode() + b"\n" * 99, "cut": 99}, 1, "broke off after"),
        ({"body": b"no", "status": 503}, 1, "503"),
        ({"body": b"no", "status": 403}, 2, "is eu-central-1 a region"),
        ({"body": b"<html>sign in</html>"}, 2, "no price list"),
    ],
)
def test_a_list_that_does_not_arrive_whole_changes_nothing(
    home: Path, serve: Any, answer: dict[str, Any], code: int, why: str
) -> None:
    result = call("refresh", "--region", "eu-central-1", "--from", serve(**answer))
    assert result.exit_code == code
    assert why in result.output
    assert not (home / ".local").exists()


def test_a_file_that_is_not_there_and_a_url_of_another_kind_are_refused(home: Path) -> None:
    for source, why in ((str(home / "none.csv"), "cannot be read"), ("file:///x", "http")):
        result = call("refresh", "--region", "eu-central-1", "--from", source)
        assert result.exit_code == 2
        assert why in result.output


def test_what_a_pool_cost_while_it_ran_is_in_the_costs_of_a_run(home: Path) -> None:
    at = datetime(2026, 1, 1, tzinfo=timezone.utc)
    pool = Pool(instance_type="g6.xlarge", zone="us-east-1a")
    run = create_run(
        open_storage(str(home / "runs")), RunSpec(run_id="r", created_at=at, command=("true",))
    )
    usd, journal = Decimal("0.36"), run.journal()
    for event in (
        e.Created(at=at),
        e.Launching(at=at, attempt=1, token="t", market=Market.SPOT, pool=pool, reason=""),
        e.Launched(
            at=at, attempt=1, instance_id="i", started_at=at, price_at=at, price_usd_h=usd,
            price_source="test", on_demand_usd_h=usd,
        ),
        e.Ended(at=at, attempt=1, cause="lost", ended_at=at, price_timeline=((at, usd),)),
    ):  # fmt: skip
        journal.append(event)
    result = CliRunner().invoke(app, ["cost", "r", "--storage", str(home / "runs"), "--json"])
    [charge] = json.loads(result.stdout)[0]["charges"]
    assert charge["price_timeline"] == [["2026-01-01T00:00:00Z", "0.36"]]
