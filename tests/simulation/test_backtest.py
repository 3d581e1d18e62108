"""Many simulated runs: each policy and deadline from the same moments of a market on."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest

from spotfirst.errors import InvalidSpec
from spotfirst.market import Pool
from spotfirst_airflow.budget import Budget
from spotfirst_airflow.fleets.zones import region_of
from spotfirst_airflow.simulation import Task
from spotfirst_airflow.simulation.backtest import (
    Backtest,
    Outcome,
    PolicyChoice,
    backtest,
    quantile,
)
from spotfirst_airflow.simulation.setting import Setting, Terms

HOUR = 3600.0
POLICIES = [PolicyChoice(name=name) for name in ("spot_only", "greedy", "on_demand")]
TASK = Task(work_s=4 * HOUR, changeover_s=0.1 * HOUR)


def setting(names: str = "ab", **market: object) -> Setting:
    pools = [
        Terms(
            pool=Pool(instance_type="gpu", zone=zone),
            on_demand_usd_h=Decimal(3),
            spot_usd_h=Decimal(1),
        )
        for zone in names
    ]
    return Setting(market=market or {"kind": "synthetic"}, pools=tuple(pools))


def recorded(folder: Path, hours: str) -> Setting:
    """One zone with capacity in the hours that are 1."""
    path = folder / "a.json"
    path.write_text(f'{{"metadata": {{"gap_seconds": 3600}}, "data": [{",".join(hours)}]}}')
    return setting("a", kind="recorded", zones={"a": str(path)})


def outcome(policy: str, usd: float, *, finished_s: float | None = HOUR) -> Outcome:
    return Outcome(
        policy=policy, deadline_s=2 * HOUR, start_s=0.0, cost_usd=Decimal(str(usd)),
        finished_s=finished_s, is_late=finished_s is None, interruptions=0, launches=1,
        stopped="",
    )  # fmt: skip


def test_every_policy_and_deadline_starts_at_the_same_moments() -> None:
    found = backtest(setting(), TASK, POLICIES, deadlines_s=[6 * HOUR, 8 * HOUR], starts=5)
    assert len(found.outcomes) == 3 * 2 * 5
    starts = {
        tuple(o.start_s for o in found.of(choice.name, deadline_s))
        for choice in POLICIES
        for deadline_s in (6 * HOUR, 8 * HOUR)
    }
    assert len(starts) == 1


def test_the_starts_use_all_of_a_recording_and_no_run_goes_beyond_its_end(tmp_path: Path) -> None:
    starts_s = recorded(tmp_path, "1" * 48).starts_s(5, lasts_s=8 * HOUR)
    assert starts_s == tuple(HOUR * hour for hour in (0, 10, 20, 30, 40))


def test_a_recording_shorter_than_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match=r"has 4\.0 h, but a run may take 6\.0 h"):
        backtest(recorded(tmp_path, "1111"), TASK, POLICIES, deadlines_s=[6 * HOUR])


def test_the_work_on_demand_is_what_costs_are_compared_with() -> None:
    found = backtest(setting(), TASK, POLICIES, deadlines_s=[6 * HOUR], starts=3)
    assert found.on_demand_usd == Decimal("12.3")
    [row] = [row for row in found.rows() if row.policy == "on_demand"]
    assert row.share_of_on_demand == 1
    assert row.p10_usd == row.mean_usd == row.p90_usd == Decimal("12.3")


def test_best_is_the_cheapest_that_was_always_in_time() -> None:
    outcomes = [
        outcome("spot_only", 1, finished_s=None), outcome("spot_only", 1),
        outcome("greedy", 2), outcome("greedy", 4), outcome("on_demand", 5), outcome("on_demand", 5),
    ]  # fmt: skip
    rows = Backtest(
        task=TASK, setting=setting(), policies=tuple(POLICIES), on_demand_usd=Decimal(6),
        outcomes=tuple(outcomes),
    ).rows()  # fmt: skip
    assert [(row.policy, row.in_time, row.is_best) for row in rows] == [
        ("spot_only", 1, False),
        ("greedy", 2, True),
        ("on_demand", 2, False),
    ]
    assert rows[1].mean_usd == 3
    assert rows[1].share_of_on_demand == 0.5


def test_quantiles_are_values_that_occurred() -> None:
    costs = [Decimal(n) for n in range(1, 11)]
    assert [quantile(costs, share) for share in (0.0, 0.1, 0.5, 0.9, 1.0)] == [1, 1, 5, 9, 10]


@pytest.mark.slow
def test_other_processes_find_the_same() -> None:
    alone, many = (
        backtest(setting(), TASK, POLICIES, deadlines_s=[6 * HOUR], starts=20, processes=processes)
        for processes in (1, 2)
    )
    assert many == alone


def test_a_run_can_be_played_again_with_all_that_happened() -> None:
    found = backtest(setting(), TASK, POLICIES, deadlines_s=[6 * HOUR], starts=3)
    for each in found.outcomes:
        played = found.replay(each)
        assert (played.cost_usd, played.finished_s) == (each.cost_usd, each.finished_s)


def test_it_is_told_how_many_runs_are_done() -> None:
    told: list[int] = []
    backtest(setting(), TASK, POLICIES, deadlines_s=[6 * HOUR], starts=9, told=told.append)
    assert told == [8, 9, 17, 18, 26, 27]


def test_a_run_that_its_budget_stopped_was_not_in_time() -> None:
    task = Task(work_s=4 * HOUR, budget=Budget(usd=Decimal(6)))
    found = backtest(setting(), task, POLICIES[2:], deadlines_s=[6 * HOUR], starts=1)
    assert "budget" in found.outcomes[0].stopped
    [row] = found.rows()
    assert (row.in_time, row.is_best) == (0, False)
    assert row.mean_usd <= 6


@pytest.mark.parametrize(
    ("zone", "region"),
    [
        ("us-east-1a", "us-east-1"),
        ("us-central1-a", "us-central1"),
        ("local-a", "local-a"),
        ("europe-west3-c", "europe-west3"),
    ],
)
def test_zones_of_aws_and_google_name_their_region(zone: str, region: str) -> None:
    assert region_of(zone) == region
