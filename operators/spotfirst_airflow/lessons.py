"""What earlier runs in the same storage teach a new one, before its first step."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import takewhile
from statistics import median

from spotfirst.lessons import Lessons, PoolHistory
from spotfirst.market import Pool
from spotfirst.run import list_runs
from spotfirst.state import RunState
from spotfirst.steptimes import StepTimes
from spotfirst.storage import Storage
from spotfirst_airflow.policies.experience import HOUR_S, look_back
from spotfirst_airflow.reading import read_runs

__all__ = ["learn"]

_log = logging.getLogger(__name__)

RUNS = 20
"""How many runs are read."""


def learn(storage: Storage, run_id: str, model_id: str) -> Lessons:
    """What :data:`RUNS` earlier runs tell the run of this id; of the training, those of its model.

    Nobody knows which runs are the newest without reading all. Those are read whose ids have most
    in common with this one, and of these the last by name: as ids begin with DAG and date, the
    newest of the same task. A run that cannot be read teaches nothing, and stops nobody.
    """
    names = sorted(list_runs(storage), key=lambda name: (_in_common(name, run_id), name))
    nearest = [name for name in reversed(names) if name != run_id][:RUNS]
    told, broken = read_runs(storage, nearest, lambda run: (run.spec(), run.journal().refresh()))
    for each in broken:
        _log.warning("%s; it teaches nothing", each)
    newest = sorted(told, key=lambda each: each[0].created_at, reverse=True)
    same = [
        (spec, state)
        for spec, state in newest
        if model_id and spec.tags.get("model_id") == model_id
    ]
    startups = [
        a.ended.startup_s
        for _, state in same or newest
        for a in state.attempts
        if a.ended and a.ended.startup_s > 0
    ]
    return Lessons(
        runs=tuple(spec.run_id for spec, _ in newest),
        step_times=_step_times(state for _, state in reversed(same)),
        total_steps=_total_steps(state for _, state in same),
        startup_s=median(startups) if startups else None,
        pools=_pools(state for _, state in reversed(newest)),
    )


def _in_common(name: str, run_id: str) -> int:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(name, run_id, strict=False))
    return sum(1 for _ in same)


def _step_times(oldest_first: Iterable[RunState]) -> dict[str, StepTimes]:
    """By instance type, as the last attempt on it measured them."""
    return {
        attempt.pool.instance_type: attempt.ended.step_times
        for state in oldest_first
        for attempt in state.attempts
        if attempt.ended and attempt.ended.step_times
    }


def _total_steps(newest_first: Iterable[RunState]) -> int | None:
    totals = (a.ended.total_steps for state in newest_first for a in state.attempts if a.ended)
    return next((steps for steps in totals if steps), None)


def _pools(oldest_first: Iterable[RunState]) -> tuple[PoolHistory, ...]:
    """What all of them saw, each run by itself: nobody looked between them."""
    sums: dict[Pool, PoolHistory] = {}
    for state in oldest_first:
        rate = next((a.launched.clock_rate for a in state.attempts if a.launched), 1.0)
        for pool, seen in look_back(state.attempts, (), clock_rate=rate).items():
            before = sums.get(pool, PoolHistory(pool=pool))
            sums[pool] = PoolHistory(
                pool=pool,
                up_s=before.up_s + seen.up_h * HOUR_S,
                losses=before.losses + round(seen.losses),
                down_s=before.down_s + seen.down_h * HOUR_S,
                returns=before.returns + seen.returns,
            )
    return tuple(sums[pool] for pool in sorted(sums, key=str))
