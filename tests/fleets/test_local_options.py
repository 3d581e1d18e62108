"""What a person can get wrong about a local fleet is said before anything starts."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest

from spotfirst.errors import InvalidSpec, LaunchRejected
from spotfirst.market import Market, Pool
from spotfirst.spec import RunSpec
from spotfirst_airflow.fleets import load_fleet
from spotfirst_airflow.fleets.base import Fleet
from spotfirst_airflow.fleets.local import LocalFleet
from tests.fleets.worlds import World, request

NOW = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zonez": []}, "'zonez'; allowed are root, zones, time_scale"),
        ({"time_scale": 0}, "time_scale is 0"),
        ({"time_scale": "fast"}, r"float.*time_scale"),
        ({"notice_s": -1}, "notice_s"),
        ({"zones": ["a", "a"]}, "zones"),
        ({"epoch": "yesterday"}, "epoch"),
        ({"agent_command": [""]}, "agent_command"),
        ({"storage_region": "east-1", "egress_usd_gb": -1}, "egress_usd_gb"),
        ({"egress_usd_gb": 0.02}, "storage_region does not say"),
        ({"market": {}}, "market.kind.*calm, scripted, synthetic, calibrated, recorded"),
        ({"market": {"kind": "bull"}}, "'bull'"),
        ({"market": {"kind": "calm", "seed": 1}}, "calm market option 'seed'; allowed are capac"),
        ({"market": {"kind": "synthetic", "mean_up_s": 0}}, "mean_up_s"),
        ({"market": {"kind": "synthetic", "silent_share": 2}}, "silent_share"),
        ({"market": {"kind": "scripted", "zones": {"a": []}}}, "zones.a"),
        ({"market": {"kind": "scripted", "zones": {"a": [{"from_s": 3, "capacity": 1}]}}}, "at 0"),
        ({"market": {"kind": "scripted", "zones": {"a": [{"at": 3}]}}}, r"a\[0\].*'at'"),
        ({"market": {"kind": "recorded", "zones": {"a": "f"}}, "zones": ["b"]}, "lacks; it has a"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        LocalFleet(options, environment={})


def test_settled_options_survive_json_and_settle_to_themselves(tmp_path: Path) -> None:
    settled = LocalFleet.settle({"root": str(tmp_path), "zones": ["x"]}, now=NOW)
    assert msgspec.json.decode(msgspec.json.encode(settled)) == settled
    assert LocalFleet.settle(settled, now=NOW + timedelta(days=1)) == settled


def test_a_market_begins_when_the_run_is_created_unless_it_is_said(world: World) -> None:
    assert LocalFleet.settle({}, now=NOW)["epoch"] == "2026-03-01T12:00:00Z"
    given = LocalFleet.settle({"epoch": "2020-01-01T00:00:00Z"}, now=NOW)
    assert given["epoch"] == "2020-01-01T00:00:00Z"


def test_the_root_comes_from_the_environment_and_stays_after_settling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOTFIRST_LOCAL_FLEET", str(tmp_path / "here"))
    assert LocalFleet.settle({}, now=NOW)["root"] == str(tmp_path / "here")


def test_the_fleet_is_found_by_its_name(tmp_path: Path) -> None:
    fleet = load_fleet("local", {"root": str(tmp_path)}, environment={})
    assert isinstance(fleet, LocalFleet)
    assert isinstance(fleet, Fleet)


def test_an_unknown_instance_type_is_refused_with_the_known_ones(world: World) -> None:
    spec = RunSpec(run_id="r", created_at=NOW, command=("x",), instance_types=("tpu.huge",))
    with pytest.raises(InvalidSpec, match=r"tpu\.huge.*g5\.xlarge"):
        world.fleet().check(spec)
    with pytest.raises(LaunchRejected, match=r"tpu\.huge"):
        world.fleet().launch(request("t", pool=Pool(instance_type="tpu.huge", zone="local-a")))


def test_a_missing_recording_is_refused_before_the_run_but_not_to_a_reaper(world: World) -> None:
    fleet = world.fleet(market={"kind": "recorded", "zones": {"a": "/no/such.csv"}})
    spec = RunSpec(run_id="r", created_at=NOW, command=("x",))
    with pytest.raises(InvalidSpec, match=r"no/such\.csv"):
        fleet.check(spec)
    assert fleet.owned() == []
    fleet.terminate(["t"])


def test_options_that_were_not_settled_cannot_launch(tmp_path: Path) -> None:
    fleet = LocalFleet({"root": str(tmp_path)}, environment={})
    with pytest.raises(InvalidSpec, match="settle"):
        fleet.launch(request("t"))


def test_offers_are_spot_and_on_demand_in_every_zone(world: World) -> None:
    script = {"a": [{"from_s": 0, "capacity": 0, "price_usd_h": 0.5}],
              "b": [{"from_s": 0, "capacity": 1}]}  # fmt: skip
    offers = world.fleet(market={"kind": "scripted", "zones": script}).offers(["g5.xlarge"])
    seen = {(o.pool.zone, o.market): (str(o.price_usd_h), o.available) for o in offers}
    assert seen == {
        ("a", Market.SPOT): ("0.5000", False),
        ("a", Market.ON_DEMAND): ("1.006", True),
        ("b", Market.SPOT): ("0.4400", True),
        ("b", Market.ON_DEMAND): ("1.006", True),
    }
