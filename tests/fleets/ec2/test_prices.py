"""What instances cost: the price table, AWS's list, and EC2's spot price history."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from spotfirst.errors import FleetUnavailable, InvalidSpec
from spotfirst.market import Market, Pool
from spotfirst_airflow.fleets import Instance, InstanceState
from spotfirst_airflow.fleets.ec2 import Ec2Fleet
from spotfirst_airflow.fleets.ec2.aws import Aws, Identity
from spotfirst_airflow.fleets.ec2.options import Requirements
from spotfirst_airflow.fleets.ec2.pricelist import read_price_list
from spotfirst_airflow.fleets.ec2.prices import Prices, forget_spot_prices
from spotfirst_airflow.fleets.ec2.pricetable import (
    PRICES_VARIABLE,
    PriceTable,
    RegionPrices,
    family,
    load_table,
    write_table,
)
from spotfirst_airflow.fleets.local.catalogue import CATALOGUE
from spotfirst_airflow.timelines import TellsPrices
from tests.fakes.clients import FakeAws
from tests.fakes.cloud import Cloud, Weather
from tests.fleets.ec2.offers import COLUMNS, HEAD, price_list, row
from tests.waiting import PATIENCE_S

NOW = datetime(2026, 11, 23, 12, tzinfo=timezone.utc)
L4_A = Pool(instance_type="g6.xlarge", zone="us-east-1a")
L4_B = Pool(instance_type="g6.xlarge", zone="us-east-1b")
T4_A = Pool(instance_type="g4dn.xlarge", zone="us-east-1a")


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv(PRICES_VARIABLE, raising=False)
    forget_spot_prices()
    yield
    forget_spot_prices()


class Ec2:
    """Answers DescribeSpotPriceHistory from a list of changes, ``page`` entries at a time."""

    def __init__(self, *changes: tuple[Pool, datetime, str], page: int = 1000) -> None:
        self.changes = list(changes)
        self.page = page
        self.calls: list[dict[str, Any]] = []

    def describe_spot_price_history(self, **asked: Any) -> dict[str, Any]:
        self.calls.append(asked)
        assert asked["ProductDescriptions"] == ["Linux/UNIX"]
        found = [
            {
                "InstanceType": pool.instance_type, "AvailabilityZone": pool.zone,
                "ProductDescription": "Linux/UNIX", "SpotPrice": price, "Timestamp": since,
            }
            for pool, since, price in sorted(self.changes, key=lambda c: c[1], reverse=True)
            if pool.instance_type in asked["InstanceTypes"]
            and asked.get("AvailabilityZone", pool.zone) == pool.zone
            and since <= asked.get("EndTime", NOW + timedelta(days=9))
            and not any(
                other == pool and since < later <= asked["StartTime"]
                for other, later, _ in self.changes
            )
        ]  # fmt: skip
        begin = int(asked.get("NextToken", "0"))
        more = str(begin + self.page) if begin + self.page < len(found) else ""
        return {"SpotPriceHistory": found[begin : begin + self.page], "NextToken": more}


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now

    def step(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def aws(ec2: Any = None, *, region: str = "us-east-1", key: str = "") -> Any:
    identity = SimpleNamespace(region=region, key=(region, key, "", ""))
    return SimpleNamespace(identity=identity, region=region, client=lambda service: ec2)


def ago(hours: float) -> datetime:
    return NOW - timedelta(hours=hours)


# -- the table ------------------------------------------------------------------------------------


def test_every_price_of_the_table_is_of_a_type_that_it_describes_and_has_a_source() -> None:
    table = load_table()
    for prices in table.regions.values():
        assert set(prices.usd_h) <= set(table.types)
        assert all(price > 0 for price in prices.usd_h.values())
        assert prices.url.startswith("https://")
        assert prices.at < NOW
    assert len(table.regions["us-east-1"].usd_h) >= 15


def test_types_of_one_family_have_the_same_gpu() -> None:
    gpus: dict[str, set[tuple[str, int]]] = {}
    for name, kind in load_table().types.items():
        gpus.setdefault(family(name), set()).add((kind.gpu_name, kind.gpu_memory_mib))
    assert all(len(found) == 1 for found in gpus.values()), gpus


def test_the_local_fleet_pretends_to_the_same_on_demand_prices() -> None:
    known = load_table().regions["us-east-1"].usd_h
    assert {name: kind.on_demand_usd_h for name, kind in CATALOGUE.items()} == {
        name: known[name] for name in CATALOGUE
    }


def test_an_on_demand_price_says_of_when_and_from_where_it_is() -> None:
    price = Prices(aws()).on_demand("g6.xlarge")
    assert price.usd_h == Decimal("0.8048")
    assert price.source.startswith("AWS price list")
    assert price.source.endswith("us-east-1")
    assert price.at == datetime(2026, 7, 20, 13, 44, 30, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("region", "instance_type"), [("sa-east-1", "g6.xlarge"), ("us-east-1", "p5e.48xlarge")]
)
def test_a_price_that_is_not_known_is_not_guessed(region: str, instance_type: str) -> None:
    with pytest.raises(InvalidSpec, match=f"prices refresh --region {region}"):
        Prices(aws(region=region)).on_demand(instance_type)


def own_table(path: Path, *, at: datetime, usd_h: str = "0.5") -> None:
    mine = RegionPrices(at=at, source="mine", usd_h={"g6.xlarge": Decimal(usd_h)})
    write_table(path, PriceTable(regions={"us-east-1": mine}))


def test_a_newer_table_in_the_home_folder_counts() -> None:
    own_table(Path.home() / ".local/share/spotfirst/prices.json", at=NOW)
    assert Prices(aws()).on_demand("g6.xlarge").source == "mine, us-east-1"
    assert "us-west-2" in load_table().regions


def test_an_older_table_in_the_home_folder_does_not() -> None:
    own_table(Path.home() / ".local/share/spotfirst/prices.json", at=NOW - timedelta(days=999))
    assert Prices(aws()).on_demand("g6.xlarge").usd_h == Decimal("0.8048")


def test_a_table_that_is_named_counts_however_old_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_table(tmp_path / "agreed.json", at=NOW - timedelta(days=999), usd_h="0.41")
    monkeypatch.setenv(PRICES_VARIABLE, str(tmp_path / "agreed.json"))
    assert Prices(aws()).on_demand("g6.xlarge").usd_h == Decimal("0.41")


def test_a_table_that_is_named_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="no such file"):
        load_table({PRICES_VARIABLE: str(tmp_path / "nowhere.json")})


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prices.json").write_text('{"v": 1, "regions": 7}')
    with pytest.raises(InvalidSpec, match=r"prices\.json"):
        load_table({PRICES_VARIABLE: str(tmp_path / "prices.json")})


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(InvalidSpec, match="--out"):
        own_table(blocked / "prices.json", at=NOW)
    own_table(tmp_path / "prices.json", at=NOW)
    own_table(tmp_path / "prices.json", at=NOW, usd_h="30")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["file", "prices.json"]
    assert '"30"' in (tmp_path / "prices.json").read_text()


# -- which types meet the requirements ------------------------------------------------------------


def matching(region: str = "us-east-1", **requirements: Any) -> list[str]:
    return Prices(aws(region=region)).matching(Requirements(**requirements))


def test_types_are_found_by_what_they_have_cheapest_first() -> None:
    found = matching(gpu_names=("L4", "a10g"), memory_gib=32)
    assert found[:3] == ["g6.2xlarge", "g5.2xlarge", "g6.4xlarge"]
    usd_h = load_table().regions["us-east-1"].usd_h
    assert [usd_h[name] for name in found] == sorted(usd_h[name] for name in found)


def test_the_number_of_gpus_is_met_exactly() -> None:
    types = load_table().types
    assert {types[name].gpus for name in matching(gpus=4)} == {4}


def test_gpu_memory_counts_as_makers_do() -> None:
    assert matching(gpu_memory_gib=24)[0] == "g6.xlarge"
    assert matching(gpu_memory_gib=48)[0] == "g6e.xlarge"
    assert matching(gpu_memory_gib=80)[0] == "g7e.2xlarge"
    assert matching(gpu_memory_gib=141, gpus=8)[0] == "p5en.48xlarge"


def test_the_nearest_type_is_named_when_none_meets_them() -> None:
    with pytest.raises(InvalidSpec, match=r"g6\.48xlarge, has 768 GiB of memory \(not 900\)"):
        matching(gpus=8, gpu_names=("L4",), memory_gib=900)


def test_a_gpu_that_nobody_has_is_named_with_those_there_are() -> None:
    with pytest.raises(InvalidSpec, match=r"'L5'.*A100, A10G.*V100"):
        matching(gpu_names=("L4", "L5"))


def test_types_without_a_price_in_the_region_are_not_taken() -> None:
    with pytest.raises(InvalidSpec, match=r"g6\.xlarge.*refresh --region us-west-2"):
        matching("us-west-2", gpu_names=("L4",))


# -- AWS's list -----------------------------------------------------------------------------------


def read(*rows: dict[str, str], **more: Any) -> Any:
    lines = price_list(*rows, **more).splitlines(keepends=True)
    return read_price_list(iter(lines), "eu-central-1", known=load_table())


def test_the_list_gives_the_price_of_linux_on_demand_alone() -> None:
    reading = read(
        row(),
        row(TermType="Reserved", PricePerUnit="0.6"),
        row(Operating_System="Windows", PricePerUnit="1.2"),
        row(Tenancy="Dedicated", PricePerUnit="1.3"),
        row(Tenancy="Host", PricePerUnit="0"),
        row(CapacityStatus="UnusedCapacityReservation", PricePerUnit="1.01"),
        row(Pre_Installed_SW="SQL Web", PricePerUnit="1.4"),
        row(Unit="Quantity", PricePerUnit="900"),
        row(operation="RunInstances:0010", PricePerUnit="1.5"),
        row(MarketOption="CapacityBlock", PricePerUnit="0.9"),
        row(Instance_Type="m7i.large", GPU="", PricePerUnit="0.1"),
        row(Instance_Type="p5e.48xlarge", GPU="8", PricePerUnit="0.0000000000"),
    )
    assert reading.prices.usd_h == {"g6.xlarge": Decimal("1.0064")}
    assert reading.prices.at == datetime(2026, 11, 20, 8, 15, tzinfo=timezone.utc)
    assert reading.types == {"g6.xlarge": load_table().types["g6.xlarge"]}


def test_a_new_size_of_a_known_family_is_described_by_its_row() -> None:
    reading = read(row(Instance_Type="g6.96xlarge", GPU="16", vCPU="384", Memory="1,536 GiB"))
    kind = reading.types["g6.96xlarge"]
    assert (kind.vcpus, kind.memory_gib, kind.gpus) == (384, 1536, 16)
    assert (kind.gpu_name, kind.gpu_memory_mib) == ("L4", 22888)


def test_gpus_that_we_cannot_name_are_told() -> None:
    assert read(row(), row(Instance_Type="g4ad.xlarge")).others == ("g4ad.xlarge",)


def test_whole_dollars_stay_readable() -> None:
    assert str(read(row(PricePerUnit="30.0000000000")).prices.usd_h["g6.xlarge"]) == "30"


@pytest.mark.parametrize(
    ("rows", "more", "why"),
    [
        ([row(Region_Code="us-east-1")], {}, "list of us-east-1, not of eu-central-1"),
        ([row(Currency="CNY")], {}, "in CNY"),
        ([row(), row(PricePerUnit="1.1")], {}, "two on-demand prices for g6.xlarge"),
        ([], {}, "no Linux instances"),
        ([row()], {"head": HEAD[:2]}, "when it was published"),
        ([row()], {"columns": tuple(c for c in COLUMNS if c != "GPU")}, "no column 'GPU'"),
    ],
)
def test_a_list_that_is_not_what_it_should_be_is_refused(
    rows: list[dict[str, str]], more: dict[str, Any], why: str
) -> None:
    with pytest.raises(InvalidSpec, match=why):
        read(*rows, **more)


@pytest.mark.parametrize("text", ["", "<html><body>no</body></html>", "a,b,c\n1,2,3\n"])
def test_something_else_than_a_list_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec, match="no price list"):
        read_price_list(text.splitlines(), "eu-central-1", known=load_table())


def test_a_list_that_breaks_off_is_refused() -> None:
    text = price_list(row(), row(Instance_Type="g6.2xlarge"))
    with pytest.raises(InvalidSpec, match="get it again"):
        read_price_list(text[:-40].splitlines(), "eu-central-1", known=load_table())


# -- spot -----------------------------------------------------------------------------------------


def test_one_call_tells_the_prices_of_all_types_in_the_zones() -> None:
    ec2 = Ec2(
        (L4_A, ago(9), "0.360000"), (L4_A, ago(2), "0.335500"), (L4_B, ago(5), "0.4"),
        (T4_A, ago(1), "0.21"),
    )  # fmt: skip
    found = Prices(aws(ec2), clock=Clock()).spot(["g6.xlarge", "g4dn.xlarge"], ["us-east-1a"])
    assert {pool: str(price.usd_h) for pool, price in found.items()} == {
        L4_A: "0.3355",
        T4_A: "0.21",
    }
    assert found[L4_A].at == NOW
    assert len(ec2.calls) == 1


def test_every_page_is_read() -> None:
    ec2 = Ec2((L4_A, ago(1), "0.3"), (L4_B, ago(1), "0.4"), (T4_A, ago(1), "0.2"), page=1)
    found = Prices(aws(ec2), clock=Clock()).spot(
        ["g6.xlarge", "g4dn.xlarge"], ["us-east-1a", "us-east-1b"]
    )
    assert len(found) == 3
    assert len(ec2.calls) == 3


def test_an_answer_serves_everyone_with_the_same_identity_for_a_minute() -> None:
    ec2, clock = Ec2((L4_A, ago(1), "0.3")), Clock()
    for _ in range(3):
        Prices(aws(ec2), clock=clock).spot(["g6.xlarge"], ["us-east-1a"])
    clock.step(59)
    Prices(aws(ec2), clock=clock).spot(["g6.xlarge"], ["us-east-1b"])
    assert len(ec2.calls) == 1
    clock.step(1)
    Prices(aws(ec2), clock=clock).spot(["g6.xlarge"], ["us-east-1a"])
    Prices(aws(ec2, key="another account"), clock=clock).spot(["g6.xlarge"], ["us-east-1a"])
    assert len(ec2.calls) == 3


def test_many_threads_that_ask_at_once_make_one_call() -> None:
    asked, go = threading.Event(), threading.Event()

    class Slow(Ec2):
        def describe_spot_price_history(self, **parameters: Any) -> dict[str, Any]:
            asked.set()
            assert go.wait(PATIENCE_S)
            return super().describe_spot_price_history(**parameters)

    ec2 = Slow((L4_A, ago(1), "0.3"))
    prices = Prices(aws(ec2), clock=Clock())
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(prices.spot, ["g6.xlarge"], ["us-east-1a"]) for _ in range(4)]
        assert asked.wait(PATIENCE_S)
        go.set()
        assert all(answer.result(10)[L4_A].usd_h == Decimal("0.3") for answer in answers)
    assert len(ec2.calls) == 1


def test_a_forked_child_does_not_wait_for_its_parents_call() -> None:
    ec2 = Ec2((L4_A, ago(1), "0.3"))
    asking, answer = threading.Event(), threading.Event()
    ask = ec2.describe_spot_price_history

    def slowly(**parameters: Any) -> Any:
        asking.set()
        answer.wait(PATIENCE_S)
        return ask(**parameters)

    ec2.describe_spot_price_history = slowly  # type: ignore[method-assign]
    parent = threading.Thread(
        target=lambda: Prices(aws(ec2), clock=Clock()).spot(["g6.xlarge"], ["us-east-1a"])
    )
    parent.start()
    assert asking.wait(PATIENCE_S)

    def in_child() -> None:
        answer.set()
        assert Prices(aws(ec2), clock=Clock()).spot(["g6.xlarge"], ["us-east-1a"])

    child = multiprocessing.get_context("fork").Process(target=in_child, daemon=True)
    child.start()
    child.join(30)
    child.kill()
    answer.set()
    parent.join(60)
    child.join(60)
    assert child.exitcode == 0


def test_a_failed_call_is_not_remembered() -> None:
    from botocore.exceptions import ConnectTimeoutError

    class Flaky(Ec2):
        def describe_spot_price_history(self, **parameters: Any) -> dict[str, Any]:
            answer = super().describe_spot_price_history(**parameters)
            if len(self.calls) == 1:
                raise ConnectTimeoutError(endpoint_url="https://ec2")
            return answer

    prices = Prices(aws(Flaky((L4_A, ago(1), "0.3"))), clock=Clock())
    with pytest.raises(FleetUnavailable):
        prices.spot(["g6.xlarge"], ["us-east-1a"])
    assert L4_A in prices.spot(["g6.xlarge"], ["us-east-1a"])


def test_no_types_need_no_call() -> None:
    assert Prices(aws(None)).spot([], ["us-east-1a"]) == {}


def test_the_history_begins_with_what_was_in_force_and_leaves_out_what_is_said_anew() -> None:
    ec2 = Ec2(
        (L4_A, ago(30), "0.30"), (L4_A, ago(5), "0.31"), (L4_A, ago(3), "0.33"),
        (L4_A, ago(2), "0.330000"), (L4_A, ago(1), "0.32"), (L4_A, ago(0.2), "0.5"),
        (L4_B, ago(2), "0.9"),
    )  # fmt: skip
    timeline = Prices(aws(ec2)).spot_between(L4_A, ago(4), ago(0.5))
    assert timeline == [
        (ago(4), Decimal("0.31")),
        (ago(3), Decimal("0.33")),
        (ago(1), Decimal("0.32")),
    ]


def test_a_history_that_is_gone_is_empty() -> None:
    assert Prices(aws(Ec2())).spot_between(L4_A, ago(9000), ago(8000)) == []


def test_ec2_accepts_the_calls_as_they_are_on_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    moto = pytest.importorskip("moto")
    for name in ("AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    with moto.mock_aws():
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
        real = Aws(Identity(region="us-east-1", environment=keys))
        prices = Prices(real)
        found = prices.spot(["g4dn.xlarge", "g5.xlarge"], ["us-east-1a", "us-east-1b"])
        assert {pool.instance_type for pool in found} == {"g4dn.xlarge", "g5.xlarge"}
        assert all(price.usd_h > 0 for price in found.values())
        timeline = prices.spot_between(T4_A, ago(1), NOW)
        assert timeline == [(ago(1), found[T4_A].usd_h)]


def test_a_table_survives_being_written_and_read(tmp_path: Path) -> None:
    table = load_table()
    write_table(tmp_path / "prices.json", table)
    again = load_table({PRICES_VARIABLE: str(tmp_path / "prices.json")})
    assert msgspec.structs.asdict(again) == msgspec.structs.asdict(table)


@pytest.mark.parametrize("seed", range(5))
def test_the_fleet_tells_what_a_pool_cost_while_an_instance_ran(seed: int) -> None:
    cloud = Cloud(seed, weather=Weather(price_moves_s=1200))
    pool, began = Pool(instance_type="g6.xlarge", zone="us-east-1a"), cloud.clock.now
    cloud.tick(5 * 3600)
    fleet: Any = Ec2Fleet({}, environment={}, aws=FakeAws(cloud), clock=cloud.clock)
    assert isinstance(fleet, TellsPrices)
    timeline = fleet.price_timeline(
        Instance(
            token="t", instance_id="i", state=InstanceState.TERMINATED, market=Market.SPOT,
            pool=pool, started_at=began + timedelta(hours=1), price_usd_h=Decimal(1),
            price_source="", on_demand_usd_h=Decimal(1), ended_at=began + timedelta(hours=4),
        )
    )  # fmt: skip
    market = cloud.pools["g6.xlarge", "us-east-1a"]
    assert timeline[0][0] == began + timedelta(hours=1)
    assert len(timeline) > 3
    for minute in range(60, 240, 7):
        at = began + timedelta(minutes=minute)
        truth = [price for since, price in market.prices if since <= at][-1]
        assert [price for since, price in timeline if since <= at][-1] == truth
