"""Plays cases: one task from one moment of a recorded market on, under every policy."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial

from benchmarks.policies import traces
from benchmarks.policies.omniscient import least_usd
from spotfirst_airflow.policies import Policy, load_policy
from spotfirst_airflow.simulation import Task, World, simulate

__all__ = ["OMNISCIENT", "SEE_THE_MARKET", "Case", "Result", "play", "play_all", "policy"]

OMNISCIENT = "omniscient"
SEE_THE_MARKET = frozenset({"greedy", "uniform_progress"})
"""Policies that are shown for free where there is spot, as in their papers."""
SEEING = "_seeing"
"""After the name of another policy: it is shown that as well."""


@dataclass(frozen=True)
class Case:
    """A task in some zones of a recording, from ``tick`` on; a cell of ``table``, in ``row``."""

    table: str
    row: str
    recording: str
    zones: tuple[str, ...]
    tick: int
    task: Task

    @property
    def start_s(self) -> float:
        """Seconds from the recording's beginning."""
        return self.tick * traces.recording(self.recording).tick_s


@dataclass(frozen=True)
class Result:
    """What the case cost under each policy, and which of them missed its deadline."""

    case: Case
    usd: dict[str, float]
    late: tuple[str, ...] = ()


def play(case: Case, policies: Sequence[str]) -> Result:
    """This case under each of the policies."""
    usd: dict[str, float] = {}
    late = []
    for name in policies:
        shows = name in SEE_THE_MARKET or name.endswith(SEEING)
        world = _world(case.recording, case.zones, shows=shows)
        played = simulate(case.task, world, policy(name), start_s=case.start_s)
        usd[name] = float(played.cost_usd)
        if played.is_late or played.finished_s is None:
            late.append(name)
    tick_s = traces.recording(case.recording).tick_s
    world = _world(case.recording, case.zones, shows=True)
    usd[OMNISCIENT] = least_usd(case.task, world, start_s=case.start_s, tick_s=tick_s)
    return Result(case=case, usd=usd, late=tuple(late))


def play_all(cases: Sequence[Case], policies: Sequence[str]) -> list[Result]:
    """Every case, on all cores; progress goes to stderr."""
    results = []
    step = max(1, len(cases) // 20)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        # Cases that lie beside each other share their market: a few at a time.
        for result in pool.imap_unordered(
            partial(play, policies=tuple(policies)), cases, chunksize=4
        ):
            results.append(result)
            if len(results) % step == 0:
                print(f"{len(results)} of {len(cases)} cases", file=sys.stderr, flush=True)
    return results


@cache
def policy(name: str) -> Policy:
    """The policy of this name, as it is without options: all of them are pure."""
    return load_policy(name.removesuffix(SEEING), {})


@lru_cache(maxsize=64)
def _world(recording: str, zones: tuple[str, ...], *, shows: bool) -> World:
    return traces.world(recording, zones, shows=shows)
