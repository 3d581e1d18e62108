"""Markets answer the same to everyone, whenever and in whatever order they are asked."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst.errors import InvalidSpec
from spotfirst_airflow.markets import Market, market_options

TIMES = st.floats(min_value=0, max_value=1e6, allow_nan=False)


def market(**options: Any) -> Market:
    return Market(market_options(options))


def synthetic(seed: int = 7, **options: Any) -> Market:
    return market(kind="synthetic", seed=seed, **options)


@given(seed=st.integers(), times=st.lists(TIMES, min_size=2, max_size=12), order=st.randoms())
@settings(max_examples=40, deadline=None)
def test_a_synthetic_market_does_not_depend_on_what_was_asked_before(
    seed: int, times: list[float], order: Any
) -> None:
    asked = [(zone, time_s) for zone in ("a", "b") for time_s in times]
    first = synthetic(seed)
    answers = {key: (first.at(*key), first.next_change(*key)) for key in asked}
    order.shuffle(asked)
    second = synthetic(seed)
    for key in asked:
        assert (second.at(*key), second.next_change(*key)) == answers[key]


@given(seed=st.integers(0, 1000), time_s=TIMES)
@settings(max_examples=40, deadline=None)
def test_capacity_holds_until_the_next_change_and_then_differs(seed: int, time_s: float) -> None:
    course = synthetic(seed)
    change_s = course.next_change("a", time_s)
    assert change_s > time_s
    before = course.at("a", math.nextafter(change_s, 0)).capacity
    assert before == course.at("a", time_s).capacity
    assert course.at("a", change_s).capacity != before


def test_zones_and_seeds_have_courses_of_their_own() -> None:
    changes = {synthetic(seed).next_change(zone, 0) for seed in (1, 2) for zone in ("a", "b")}
    assert len(changes) == 4


def test_synthetic_times_up_and_down_have_the_means_asked_for() -> None:
    course = synthetic(mean_up_s=300, mean_down_s=100, silent_share=0.25)
    time_s, up_s, silent, falls = 0.0, 0.0, 0, 0
    while time_s < 1e6:
        until_s = course.next_change("a", time_s)
        state = course.at("a", time_s)
        up_s += (until_s - time_s) if state.capacity else 0
        falls += not state.capacity
        silent += not state.notice
        time_s = until_s
    assert up_s / time_s == pytest.approx(0.75, abs=0.03)
    assert falls == pytest.approx(1e6 / 400, rel=0.1)
    assert silent / falls == pytest.approx(0.25, abs=0.05)


def test_no_dip_is_missed_however_seldom_one_looks() -> None:
    dips = market(
        kind="scripted",
        zones={
            "a": [
                {"from_s": 0, "capacity": 2},
                {"from_s": 10, "capacity": 1, "notice": False},
                {"from_s": 10.5, "capacity": 2},
            ]
        },
    )
    seen = dips.first_shortage("a", since_s=0, until_s=1000, older=1)
    assert seen is not None
    assert not seen.notice
    assert dips.first_shortage("a", since_s=0, until_s=1000, older=0) is None
    assert dips.first_shortage("a", since_s=11, until_s=1000, older=1) is None


def test_a_calm_market_never_changes() -> None:
    calm = market(kind="calm", capacity=3)
    assert calm.at("anywhere", 1e9).capacity == 3
    assert calm.next_change("anywhere", 0) == math.inf


def test_only_some_markets_say_how_often_they_interrupt() -> None:
    assert market(kind="calm").interruption_mean_s("a") is None
    assert synthetic(mean_up_s=300).interruption_mean_s("a") == 300
    ups_and_downs = [(0, 1), (10, 0), (15, 2), (45, 0), (50, 1)]  # up for 10 s, 30 s, ever since
    segments = [{"from_s": time_s, "capacity": count} for time_s, count in ups_and_downs]
    script = market(kind="scripted", zones={"a": segments, "b": segments[:1]})
    assert script.interruption_mean_s("a") == 20
    assert script.interruption_mean_s("b") is None


# -- recordings -----------------------------------------------------------------------------------


CSV = "date,availability\n2023-02-15 22:08:16,0\n2023-02-15 22:11:31,1\n2023-02-15 22:14:46,0\n"


def recorded(path: Path, **options: Any) -> Market:
    return market(kind="recorded", zones={"a": str(path)}, **options)


def written(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_in_a_csv_1_is_available_at_the_time_of_its_row(tmp_path: Path) -> None:
    zone = recorded(written(tmp_path / "zone.csv", CSV))
    assert [zone.at("a", t).capacity for t in (0, 194, 195, 389, 390)] == [0, 0, 1, 1, 0]
    assert zone.next_change("a", 0) == 195


def test_a_recording_begins_again_after_its_last_row(tmp_path: Path) -> None:
    zone = recorded(written(tmp_path / "zone.csv", CSV))
    assert zone.at("a", 3 * 195 + 195).capacity == 1
    assert zone.next_change("a", 390) == pytest.approx(3 * 195)


@pytest.mark.parametrize(
    ("rows", "mean_s"), [([0, 1, 1, 0, 1], 15.0), ([1, 1, 0, 1], 30.0), ([1, 1], None), ([0], None)]
)
def test_a_recording_tells_how_long_capacity_lasts_in_it(
    tmp_path: Path, rows: list[int], mean_s: float | None
) -> None:
    trace = {"metadata": {"gap_seconds": 10}, "data": rows}
    told = recorded(written(tmp_path / "zone.json", trace)).interruption_mean_s("a")
    assert told == mean_s  # it is played again and again: its end and its beginning are neighbours


def test_a_recording_can_be_entered_later(tmp_path: Path) -> None:
    zone = recorded(written(tmp_path / "zone.csv", CSV), start_s=200)
    assert zone.at("a", 0).capacity == 1
    assert zone.next_change("a", 0) == pytest.approx(190)


def test_in_a_json_trace_n_nodes_are_available_at_the_price_of_the_tick(tmp_path: Path) -> None:
    trace = {"metadata": {"gap_seconds": 300, "x": 1}, "data": [4, 0, 2], "prices": [1.5, 2, 2.5]}
    zone = recorded(written(tmp_path / "zone.json", trace), nodes=2)
    states = [zone.at("a", t) for t in (0, 300, 600)]
    assert [state.capacity for state in states] == [8, 0, 4]
    assert [state.price_usd_h for state in states] == [1.5, 2, 2.5]


def test_inverted_turns_a_series_in_which_1_is_unavailable(tmp_path: Path) -> None:
    trace = {"metadata": {"gap_seconds": 600}, "data": [0, 1]}
    zone = recorded(written(tmp_path / "zone.json", trace), inverted=True)
    assert [zone.at("a", t).capacity for t in (0, 600)] == [1, 0]


def test_prices_may_lie_in_a_file_beside_under_the_recordings_name(tmp_path: Path) -> None:
    prices = written(tmp_path / "prices.json", {"zone": [1.0, 1.25, 1.5], "other": []})
    zone = recorded(written(tmp_path / "zone.csv", CSV), prices=str(prices))
    assert zone.at("a", 200).price_usd_h == 1.25


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("z.csv", "time,up\n", {}, "does not begin with"),
        ("z.csv", CSV + "2023-02-15 22:14:46,1\n", {}, "line 5.*not later"),
        ("z.csv", CSV + "yesterday,1\n", {}, "line 5.*not a date"),
        ("z.csv", CSV + "2023-02-15 22:20:00,-1\n", {}, "line 5"),
        ("z.csv", CSV + "2023-02-15 22:20:00,nan\n", {}, "line 5"),
        ("z.csv", "date,availability\n", {}, "at least two"),
        ("z.json", "{}", {}, "not a spot trace"),
        ("z.json", {"metadata": {"gap_seconds": 0}, "data": [1]}, {}, "above 0"),
        ("z.json", {"metadata": {"gap_seconds": 9}, "data": [0.5]}, {}, "not a number of nodes"),
        ("z.json", {"metadata": {"gap_seconds": 9}, "data": [1], "prices": []}, {}, "0 prices"),
        ("z.json", {"metadata": {"gap_seconds": 9}, "data": [4]}, {"inverted": True}, "inverted"),
        ("z.json", None, {}, "cannot be read"),
    ],
)
def test_a_file_that_is_no_recording_is_refused_by_name(
    tmp_path: Path, name: str, content: object, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        written(path, content)
    with pytest.raises(InvalidSpec, match=message) as caught:
        recorded(path, **options).at("a", 0)
    assert str(path) in str(caught.value)


def _traces() -> Path | None:
    beside = Path(__file__).parents[3] / "shared" / "traces"
    given = os.environ.get("SPOTFIRST_TRACES")
    return next((p for p in (Path(given) if given else None, beside) if p and p.is_dir()), None)


@pytest.mark.skipif(_traces() is None, reason="no recorded traces; set SPOTFIRST_TRACES")
def test_real_traces_of_every_format_can_be_played() -> None:
    traces = _traces()
    assert traces is not None
    v100 = traces / "v100-9-zones"
    csv = recorded(v100 / "us-east-1a_v100_1.csv", prices=str(v100 / "v100_spot_prices.json"))
    assert {csv.at("a", hour * 3600).capacity for hour in range(24 * 45)} == {0, 1}
    assert csv.at("a", 0).price_usd_h == 1.6703
    nodes = recorded(traces / "v100-multinode" / "16-nodes" / "us-east-2b_v100_1.json")
    assert nodes.at("a", 17 * 300).capacity == 16
    h100 = recorded(traces / "h100-13-zones" / "us-west1-b_h100_16.json", inverted=True)
    assert h100.at("a", 0).price_usd_h == 18.979008


@pytest.mark.parametrize(
    ("scarcity", "share", "up_h", "down_h"),
    [("plenty", 0.89, 7.4, 0.89), ("usual", 0.68, 3.66, 1.74), ("scarce", 0.36, 1.33, 2.35)],
)
def test_a_calibrated_market_is_up_and_down_as_the_recorded_one_was(
    scarcity: str, share: float, up_h: float, down_h: float
) -> None:
    up: list[float] = []
    down: list[float] = []
    for seed in range(40):
        course = market(kind="calibrated", seed=seed, scarcity=scarcity)
        since_s, time_s, is_up = 0.0, 0.0, course.at("a", 0.0).capacity > 0
        while time_s < 45 * 24 * 3600:
            time_s = course.next_change("a", time_s)
            if (course.at("a", time_s).capacity > 0) is not is_up:
                (up if is_up else down).append((time_s - since_s) / 3600)
                since_s, is_up = time_s, not is_up
    assert sum(up) / (sum(up) + sum(down)) == pytest.approx(share, abs=0.05)
    assert sum(up) / len(up) == pytest.approx(up_h, rel=0.12)
    assert sum(down) / len(down) == pytest.approx(down_h, rel=0.12)


def test_prices_of_a_calibrated_market_change_seldom_and_little() -> None:
    course = market(kind="calibrated", seed=3)
    factors = [course.at("a", hour * 3600.0).price_factor for hour in range(45 * 24)]
    changes = sum(a != b for a, b in itertools.pairwise(factors))
    assert 2.5 <= changes / 45 <= 3.5
    assert all(0.8 < factor < 1.25 for factor in factors)


@given(seed=st.integers(0, 100), times=st.lists(TIMES, min_size=2, max_size=12), order=st.randoms())
@settings(max_examples=20, deadline=None)
def test_a_calibrated_market_does_not_depend_on_what_was_asked_before(
    seed: int, times: list[float], order: Any
) -> None:
    first = market(kind="calibrated", seed=seed)
    answers = {time_s: (first.at("a", time_s), first.next_change("a", time_s)) for time_s in times}
    order.shuffle(times)
    second = market(kind="calibrated", seed=seed)
    for time_s in times:
        assert (second.at("a", time_s), second.next_change("a", time_s)) == answers[time_s]
