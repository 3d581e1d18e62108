"""The page of a backtest: whole in one file, with its pictures, and nothing that overlaps."""

from __future__ import annotations

import re
from decimal import Decimal
from itertools import pairwise
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.market import Pool
from spotfirst_airflow.simulation.backtest import Backtest, PolicyChoice, backtest
from spotfirst_airflow.simulation.pictures import render_page
from spotfirst_airflow.simulation.pictures.front import front
from spotfirst_airflow.simulation.pictures.svg import apart, nice_ticks
from spotfirst_airflow.simulation.setting import Setting, Terms
from spotfirst_airflow.simulation.task import Task

HOUR = 3600.0


@pytest.fixture(scope="module")
def found() -> Backtest:
    pools = tuple(
        Terms(
            pool=Pool(instance_type="g6.xlarge", zone=f"us-east-1{letter}"),
            on_demand_usd_h=Decimal("0.8"), spot_usd_h=Decimal("0.3"),
        )
        for letter in "ab"
    )  # fmt: skip
    return backtest(
        Setting(market={"kind": "calibrated", "seed": 1}, pools=pools),
        Task(work_s=4 * HOUR, changeover_s=95.0, notice_s=120.0),
        [PolicyChoice(name=name) for name in ("on_demand", "spotfirst", "spot_only")],
        deadlines_s=[5 * HOUR, 8 * HOUR], starts=4, processes=1,
    )  # fmt: skip


def test_the_page_is_whole_and_asks_nobody(found: Backtest) -> None:
    page = render_page(found, {"market": "a <market> & more"})
    assert "a &lt;market&gt; &amp; more" in page
    assert not re.search(r"(src|href)=|url\(|<script", page)
    assert page.count("<svg") == 2 * (1 + 2 + 3)  # wide and narrow: front, spreads, timelines
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ET.fromstring(drawing)
        assert root.attrib["aria-label"]
    for row in found.rows():
        assert f"${row.mean_usd:.2f}" in page


def test_the_front_holds_only_what_is_always_in_time_and_cheaper_than_any_nearer(
    found: Backtest,
) -> None:
    best = front(found.rows())
    assert best
    assert all(row.in_time == row.runs for row in best)
    assert all(a.mean_usd > b.mean_usd for a, b in pairwise(best))


@given(st.lists(st.floats(0, 300), min_size=1, max_size=10))
def test_labels_stay_apart_in_order_and_within_the_picture(wanted: list[float]) -> None:
    places = apart(wanted, by=18.0, low=0.0, high=300.0)
    assert all(-1e-6 <= place <= 300 + 1e-6 for place in places)
    ordered = sorted(places)
    assert all(b - a >= 18.0 - 1e-6 for a, b in pairwise(ordered))
    by_wish = [place for _, place in sorted(zip(wanted, places, strict=True))]
    assert by_wish == pytest.approx(ordered)


@given(st.floats(-1e3, 1e3), st.floats(0.01, 1e4), st.integers(2, 12))
def test_ticks_are_few_and_within(low: float, span: float, at_most: int) -> None:
    ticks = nice_ticks(low, low + span, at_most)
    assert 1 <= len(ticks) <= at_most
    assert all(low - 1e-6 <= tick <= low + span + 1e-6 for tick in ticks if len(ticks) > 1)
