"""Recordings of an account: appended to, never torn, played as a market."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst.errors import InvalidSpec, NewerFormat
from spotfirst_airflow.markets import Market, market_options
from spotfirst_airflow.markets.history import Line, Price, Score, Seen, append, read, zones

T0 = datetime(2026, 1, 1, tzinfo=timezone.utc)


def at(hours: float) -> datetime:
    return T0 + timedelta(hours=hours)


LINES: list[Line] = [
    Price(at=at(0), zone="a", usd_h=Decimal("0.30")),
    Price(at=at(0), usd_h=Decimal("1.00")),
    Price(at=at(5), zone="a", usd_h=Decimal("0.40")),
    Price(at=at(1), zone="b", usd_h=Decimal("0.20")),
    Seen(at=at(2), zone="a", there=False),
    Seen(at=at(3), zone="a", there=True),
    Score(at=at(5), place="use1-az1", score=7),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "market" / "g6.xlarge.jsonl"


def record(path: Path, lines: list[Line]) -> int:
    return append(path, lines, instance_type="g6.xlarge", now=T0)


def test_recording_again_adds_only_what_is_new(path: Path) -> None:
    assert record(path, LINES[:4]) == 4
    assert record(path, LINES) == 3
    assert record(path, LINES) == 0
    assert sorted(read(path)[1:], key=str) == sorted(LINES, key=str)
    assert zones(read(path)) == ("a", "b")


@given(cut=st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_a_line_that_was_torn_is_written_again(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "x.jsonl"
    record(path, LINES)
    path.write_bytes(path.read_bytes()[:-cut])
    lost = len(LINES) + 1 - len(read(path))
    assert lost >= 1
    assert record(path, LINES) == lost
    assert set(read(path)[1:]) == set(LINES)


def test_it_plays_as_a_recorded_market(path: Path) -> None:
    record(path, LINES)
    options = market_options({"kind": "recorded", "zones": {"a": str(path), "b": str(path)}})
    market = Market(options)
    told = [market.at("a", hour * 3600.0) for hour in (0, 2, 3, 5)]
    assert [state.capacity for state in told] == [1, 0, 1, 1]
    assert [state.price_usd_h for state in told] == [0.3, 0.3, 0.3, 0.4]
    assert market.at("b", 3600.0).price_usd_h == 0.2


def test_files_of_another_type_kind_or_format_are_refused(path: Path) -> None:
    record(path, LINES)
    with pytest.raises(InvalidSpec, match=r"not of p5\.xlarge"):
        append(path, LINES, instance_type="p5.xlarge", now=T0)
    with pytest.raises(InvalidSpec, match="no price of zone 'z'"):
        market_options({"kind": "recorded", "zones": {"z": str(path)}}).course("z")
    path.write_text('{"kind":"price","at":"2026-01-01T00:00:00Z","usd_h":"1"}\n')
    with pytest.raises(InvalidSpec, match="header"):
        read(path)
    path.write_text('{"kind":"header","at":"2026-01-01T00:00:00Z","instance_type":"g","v":9}\n')
    with pytest.raises(NewerFormat):
        read(path)


def test_a_csv_may_have_prices(tmp_path: Path) -> None:
    csv = tmp_path / "z.csv"
    csv.write_text(
        "date,availability,price_usd_h\n2026-01-01 00:00:00,1,0.5\n2026-01-01 01:00:00,0,0.6\n"
    )
    course = market_options({"kind": "recorded", "zones": {"z": str(csv)}}).course("z")
    assert [(course.at(t).capacity, course.at(t).price_usd_h) for t in (0.0, 3600.0)] == [
        (1, 0.5), (0, 0.6),
    ]  # fmt: skip
    csv.write_text("date,availability,price_usd_h\n2026-01-01 00:00:00,1\n")
    with pytest.raises(InvalidSpec, match="and a price"):
        market_options({"kind": "recorded", "zones": {"z": str(csv)}}).course("z")
