"""The benchmark of policies: its optimum is one, and its figures say what they must."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.policies import traces
from benchmarks.policies.figures import PUBLISHED, figures, late, means
from benchmarks.policies.omniscient import Option, least_usd, least_usd_of
from benchmarks.policies.playing import OMNISCIENT, Case, Result, play
from benchmarks.policies.tables import TABLES, cases
from spotfirst_airflow.policies import Greedy, OnDemand, UniformProgress
from spotfirst_airflow.simulation import Task, simulate

TICK_S = 60.0
with_traces = pytest.mark.skipif(not traces.is_there(), reason="the traces are not here")


def brute_force(
    options: Sequence[Option], egress_usd: Sequence[Sequence[float]], *, work: int, ticks: int, start: int
) -> float:  # fmt: skip
    """The least cost, by trying everything: all times in ticks, of a minute."""

    @cache
    def least(tick: int, left: int, option: int | None, starts: int, region: int | None) -> float:
        """``option`` runs, ``starts`` ticks before it trains; the checkpoint is in ``region``."""
        if left == 0:
            return 0.0
        if tick == ticks:
            return math.inf
        found = least(tick + 1, left, None, 0, region)
        if option is not None and options[option].there[tick]:
            found = min(found, runs(tick, left, option, starts, region))
        for number, each in enumerate(options):
            if each.there[tick]:
                way_usd = 0.0 if region is None else egress_usd[region][each.region]
                found = min(found, way_usd + runs(tick, left, number, start, each.region))
        return found

    def runs(tick: int, left: int, option: int, starts: int, region: int | None) -> float:
        usd = options[option].usd_h[tick] / 60
        if starts:
            return usd + least(tick + 1, left, option, starts - 1, region)
        return usd + least(tick + 1, left - 1, option, 0, region)

    return least(0, work, None, 0, None)


@st.composite
def markets(draw: st.DrawFn) -> tuple[list[Option], list[list[float]], int]:
    ticks = draw(st.integers(2, 7))
    usd = st.integers(1, 6).map(float)
    regions = draw(st.integers(1, 2))
    spots = [
        Option(
            region=region,
            there=draw(st.lists(st.booleans(), min_size=ticks, max_size=ticks)),
            usd_h=draw(st.lists(usd, min_size=ticks, max_size=ticks)),
        )
        for region in range(regions)
    ]
    on_demand = Option(region=0, there=[True] * ticks, usd_h=[draw(usd) + 5] * ticks)
    way_usd = draw(st.integers(0, 3)) / 60
    egress = [[0.0 if a == b else way_usd for b in range(regions)] for a in range(regions)]
    return [*spots, on_demand], egress, ticks


@given(market=markets(), work=st.integers(1, 6), start=st.integers(0, 2))
@settings(max_examples=300)
def test_the_optimum_is_that_of_trying_everything(
    market: tuple[list[Option], list[list[float]], int], work: int, start: int
) -> None:
    options, egress, ticks = market
    found = least_usd_of(
        options, egress_usd=egress, work_s=work * TICK_S, deadline_s=ticks * TICK_S,
        changeover_s=start * TICK_S, tick_s=TICK_S,
    )  # fmt: skip
    least = brute_force(options, egress, work=work, ticks=ticks, start=start)
    assert found == pytest.approx(least)


def test_a_part_of_a_tick_costs_a_part_of_its_price() -> None:
    steady = [Option(region=0, there=[True] * 4, usd_h=[60.0] * 4)]
    found = least_usd_of(
        steady, egress_usd=[[0.0]], work_s=210.0, deadline_s=390.0, changeover_s=75.0, tick_s=195.0
    )
    assert found == pytest.approx((210 + 75) / 60)


def result(table: str, row: str, late: tuple[str, ...] = (), **usd: float) -> Result:
    task = Task(work_s=3600.0, deadline_s=7200.0)
    case = Case(table=table, row=row, recording="v100", zones=("us-east-1a",), tick=0, task=task)
    return Result(case=case, usd=usd, late=late)


def test_figures_are_means_beside_their_targets() -> None:
    played = [
        result("one_zone", "60", spotfirst=9.0, uniform_progress=10.0, greedy=12.0, on_demand=20.0),
        result("one_zone", "60", spotfirst=11.0, uniform_progress=12.0, greedy=9.0, on_demand=20.0),
    ]
    found = {figure.name: figure for figure in figures(played, ["spotfirst"], {3: 20.0}, None)}
    assert means(played)["one_zone"]["60"]["spotfirst"] == 10
    assert found["one_zone_vs_better_60h"].value == pytest.approx(10 / 10.5)
    assert found["one_zone_vs_on_demand"].value == pytest.approx(0.5)
    assert found["one_zone_vs_better_60h"].met
    assert found["ms_per_run"].met


def test_what_chance_does_to_five_windows_is_told_by_the_others() -> None:
    played = [result("v100_windows", "all", spotfirst=usd) for usd in (38.0, 40.0, 42.0)]
    played.append(result("v100", "1", spotfirst=100.0))
    found = {figure.name: figure for figure in figures(played, ["spotfirst"], {}, None)}
    assert found["v100_standard_error_usd"].value == pytest.approx(2 / math.sqrt(5))


def test_missed_deadlines_are_counted_by_policy() -> None:
    played = [result("v100", "1", late=("a",)), result("v100", "2", late=("a", "b"))]
    assert late(played, ["a", "b", "c"]) == {"a": 2, "b": 1, "c": 0}
    missed = next(f for f in figures(played, ["a", "b"], {}, None) if f.name == "missed_deadlines")
    assert (missed.value, missed.met) == (3, False)


def test_every_window_lies_within_its_recording() -> None:
    for case in cases(list(TABLES), windows=5):
        recording = traces.recording(case.recording)
        assert case.task.deadline_s is not None
        assert set(case.zones) <= set(recording.zones)
        assert case.start_s + case.task.deadline_s <= recording.hours * 3600


def test_no_other_table_plays_what_a_panel_does() -> None:
    for name in ("v100", "h100"):
        panel = {(case.zones, case.tick) for case in cases([name], windows=5)}
        for other in (f"{name}_windows", f"{name}_zones"):
            assert not panel & {(case.zones, case.tick) for case in cases([other], windows=5)}


@with_traces
def test_uniform_progress_and_the_optimum_are_as_published() -> None:
    case = cases(["v100"], windows=1)[0]
    usd = play(case, ["uniform_progress"]).usd
    for policy in ("uniform_progress", OMNISCIENT):
        assert usd[policy] == pytest.approx(PUBLISHED["v100"][policy][case.row], rel=0.02)


@with_traces
def test_a_policy_can_be_shown_the_market_that_it_otherwise_learns_by_trying() -> None:
    case = cases(["v100"], windows=1)[3]
    usd = play(case, ["spotfirst", "spotfirst_seeing"]).usd
    assert usd["spotfirst"] != usd["spotfirst_seeing"]


@with_traces
@pytest.mark.parametrize("policy", [Greedy(), UniformProgress(), OnDemand()])
def test_no_policy_beats_the_optimum(policy: Greedy | UniformProgress | OnDemand) -> None:
    for case in cases(["gang"], windows=2):
        world = traces.world(case.recording, case.zones, shows=True)
        tick_s = traces.recording(case.recording).tick_s
        least = least_usd(case.task, world, start_s=case.start_s, tick_s=tick_s)
        played = simulate(case.task, world, policy, start_s=case.start_s)
        assert float(played.cost_usd) >= least * 0.999
        assert not played.is_late


def test_without_the_traces_it_says_so_and_is_no_failure(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks.policies", "--quick"]
    done = subprocess.run(
        words, env={"SPOTFIRST_TRACES": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=False,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in json.loads(done.stdout.splitlines()[-1])["skipped"]
