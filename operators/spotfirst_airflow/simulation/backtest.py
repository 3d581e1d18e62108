"""Many simulated runs: policies and deadlines, each from many moments of a market on.

Every policy and deadline starts at the same moments, so that their figures may be compared.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from decimal import Decimal
from statistics import fmean
from typing import Any

import msgspec

from spotfirst.wire import Record
from spotfirst_airflow.policies import OnDemand, load_policy
from spotfirst_airflow.simulation.engine import simulate
from spotfirst_airflow.simulation.setting import Setting
from spotfirst_airflow.simulation.task import Played, Task
from spotfirst_airflow.simulation.world import World

__all__ = ["Backtest", "Outcome", "PolicyChoice", "Row", "backtest", "quantile"]

_FEW_RUNS = 48
"""So few are done before other processes have started."""
_RUNS_AT_ONCE = 8


class PolicyChoice(Record):
    """A policy by name, with its options."""

    name: str
    options: dict[str, Any] = {}


class Outcome(Record):
    """What became of one run. Times count from its beginning, ``start_s`` from the market's.

    ``stopped`` says why its budget or its policy ended it; it is empty otherwise.
    """

    policy: str
    deadline_s: float | None
    start_s: float
    cost_usd: Decimal
    finished_s: float | None
    is_late: bool
    interruptions: int
    launches: int
    stopped: str


class Row(Record):
    """All runs of one policy with one deadline.

    ``in_time`` of ``runs`` were finished by the deadline; ``finished_s`` is their mean, and
    ``None`` when there is none. ``share_of_on_demand`` is the mean cost in parts of what the same
    work costs on demand. ``is_best``: the cheapest of those that were always in time.
    """

    policy: str
    deadline_s: float | None
    runs: int
    in_time: int
    mean_usd: Decimal
    p10_usd: Decimal
    p90_usd: Decimal
    share_of_on_demand: float
    interruptions: float
    launches: float
    finished_s: float | None
    is_best: bool


class Backtest(Record):
    """The outcome of all runs, and what the same work costs on demand without interruption."""

    task: Task
    setting: Setting
    policies: tuple[PolicyChoice, ...]
    on_demand_usd: Decimal
    outcomes: tuple[Outcome, ...]

    @property
    def deadlines_s(self) -> list[float | None]:
        """Each once, the nearest first."""
        found = {outcome.deadline_s for outcome in self.outcomes}
        return sorted(found, key=lambda each: math.inf if each is None else each)

    def of(self, policy: str, deadline_s: float | None) -> list[Outcome]:
        """The outcomes of this policy and deadline, by their starts."""
        return [o for o in self.outcomes if (o.policy, o.deadline_s) == (policy, deadline_s)]

    def rows(self) -> list[Row]:
        """One per deadline and policy, the cheapest first."""
        found = []
        for deadline_s in self.deadlines_s:
            rows = [self._row(policy.name, deadline_s) for policy in self.policies]
            rows.sort(key=lambda row: (row.mean_usd, row.policy))
            best = next((row for row in rows if row.in_time == row.runs), None)
            found += [msgspec.structs.replace(row, is_best=row is best) for row in rows]
        return found

    def replay(self, outcome: Outcome) -> Played:
        """One of the runs again, with all that happened in it."""
        [choice] = [policy for policy in self.policies if policy.name == outcome.policy]
        moments = [outcome.start_s]
        [(_, played)] = _play(self.setting.world(), self.task, choice, outcome.deadline_s, moments)
        return played

    def _row(self, policy: str, deadline_s: float | None) -> Row:
        outcomes = self.of(policy, deadline_s)
        costs = sorted(outcome.cost_usd for outcome in outcomes)
        mean = sum(costs, Decimal(0)) / len(costs)
        finished = [o.finished_s for o in outcomes if o.finished_s is not None]
        return Row(
            policy=policy,
            deadline_s=deadline_s,
            runs=len(outcomes),
            in_time=sum(o.finished_s is not None and not o.is_late for o in outcomes),
            mean_usd=round(mean, 4),
            p10_usd=quantile(costs, 0.1),
            p90_usd=quantile(costs, 0.9),
            share_of_on_demand=float(mean / self.on_demand_usd),
            interruptions=fmean(o.interruptions for o in outcomes),
            launches=fmean(o.launches for o in outcomes),
            finished_s=fmean(finished) if finished else None,
            is_best=False,
        )


def backtest(
    setting: Setting,
    task: Task,
    policies: Sequence[PolicyChoice],
    *,
    deadlines_s: Sequence[float | None],
    starts: int = 40,
    processes: int | None = None,
    told: Callable[[int], None] = lambda _done: None,
) -> Backtest:
    """Simulate ``task`` with every policy and deadline from ``starts`` moments on.

    ``told`` hears how many runs are done. Raises :class:`InvalidSpec` for a policy or a recording
    that is not as it must be.
    """
    world = setting.world()
    for choice in policies:
        load_policy(choice.name, choice.options)
    unhurried = msgspec.structs.replace(task, deadline_s=None, budget=None)
    on_demand = simulate(unhurried, world, OnDemand())
    longest_s = max((d for d in deadlines_s if d is not None), default=2 * task.work_s)
    moments = setting.starts_s(starts, lasts_s=longest_s + task.notice_s)
    jobs = [
        (choice, deadline_s, moments[first : first + _RUNS_AT_ONCE])
        for choice in policies
        for deadline_s in deadlines_s
        for first in range(0, len(moments), _RUNS_AT_ONCE)
    ]
    outcomes: list[Outcome] = []
    for found in _do(setting, world, task, jobs, processes or os.cpu_count() or 1):
        outcomes += found
        told(len(outcomes))
    order = {choice.name: number for number, choice in enumerate(policies)}
    outcomes.sort(key=lambda o: (order[o.policy], o.deadline_s or math.inf, o.start_s))
    return Backtest(
        task=task,
        setting=setting,
        policies=tuple(policies),
        on_demand_usd=on_demand.cost_usd,
        outcomes=tuple(outcomes),
    )


def quantile(ordered: Sequence[Decimal], share: float) -> Decimal:
    """The smallest value that at least ``share`` of them do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


_Job = tuple[PolicyChoice, "float | None", Sequence[float]]


def _do(
    setting: Setting, world: World, task: Task, jobs: Sequence[_Job], processes: int
) -> Iterator[list[Outcome]]:
    if processes == 1 or sum(len(moments) for _, _, moments in jobs) <= _FEW_RUNS:
        for job in jobs:
            yield _run(world, task, job)
        return
    # Forked, a process would hold the locks that other threads had at that moment.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        processes, mp_context=context, initializer=_enter, initargs=(setting, task)
    ) as pool:
        try:
            for done in as_completed([pool.submit(_run_here, job) for job in jobs]):
                yield done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_here: tuple[World, Task] | None = None


def _enter(setting: Setting, task: Task) -> None:
    global _here  # noqa: PLW0603  # what an initializer can leave for the calls after it
    _here = setting.world(), task


def _run_here(job: _Job) -> list[Outcome]:
    assert _here is not None
    return _run(*_here, job)


def _run(world: World, task: Task, job: _Job) -> list[Outcome]:
    choice, deadline_s, moments = job
    return [
        _outcome(played, choice.name, deadline_s, start_s)
        for start_s, played in _play(world, task, choice, deadline_s, moments)
    ]


def _play(
    world: World,
    task: Task,
    choice: PolicyChoice,
    deadline_s: float | None,
    moments: Sequence[float],
) -> Iterator[tuple[float, Played]]:
    policy = load_policy(choice.name, choice.options)
    task = msgspec.structs.replace(task, deadline_s=deadline_s)
    for start_s in moments:
        yield start_s, simulate(task, world, policy, start_s=start_s)


def _outcome(played: Played, policy: str, deadline_s: float | None, start_s: float) -> Outcome:
    launched = [attempt for attempt in played.state.attempts if attempt.launched]
    stop = played.state.stop
    return Outcome(
        policy=policy,
        deadline_s=deadline_s,
        start_s=start_s,
        cost_usd=played.cost_usd,
        finished_s=played.finished_s,
        is_late=played.is_late,
        interruptions=sum(a.ended is not None and a.ended.cause == "interrupted" for a in launched),
        launches=len(launched),
        stopped=stop.reason if stop is not None else "",
    )
