"""From what was played to the figures that are promised, and those that were published."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev

from benchmarks._figures import Figure
from benchmarks.policies.playing import OMNISCIENT, Result

__all__ = ["PUBLISHED", "figures", "late", "means", "worst_vs_on_demand"]

_OURS = "spotfirst"
_UP, _GREEDY, _ON_DEMAND = "uniform_progress", "greedy", "on_demand"
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "v100": {
        OMNISCIENT: {"1": 37.74, "2": 37.54, "3": 37.00, "4": 37.19, "5": 37.39},
        "SkyNomad": {"1": 42.99, "2": 45.19, "3": 37.05, "4": 40.49, "5": 42.93},
        _UP: {"1": 44.53, "2": 58.11, "3": 38.00, "4": 49.62, "5": 44.84},
    },
    "h100": {
        OMNISCIENT: {"1.05": 840, "1.1": 793, "1.2": 721, "1.5": 571, "2": 426},
        "SkyNomad": {"1.05": 882, "1.1": 837, "1.2": 766, "1.5": 606, "2": 444},
        _UP: {"1.05": 1188, "1.1": 1129, "1.2": 1024, "1.5": 795, "2": 569},
    },
}
"""Dollars by table, policy and row: SkyNomad (arXiv 2601.06520) and its data."""
_V100_USD = 38.5
_PANEL_WINDOWS = 5
_H100_USD = {"1.1": 825.0, "1.2": 740.0, "1.5": 580.0, "2": 433.0}
_SAME = 0.02
_ON_DEMAND_AT_MOST = 1.01
_MS = 50.0
_GARBAGE_BYTES = 256 * 1024
"""What may wait to be collected. One byte for each of a million ticks would be four times that."""


def means(results: Iterable[Result]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean dollars by table, row and policy."""
    found: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(dict)
    for result in results:
        row = found[result.case.table].setdefault(result.case.row, {})
        for policy, usd in result.usd.items():
            row.setdefault(policy, []).append(usd)
    return {
        table: {
            row: {policy: mean(usd) for policy, usd in policies.items()}
            for row, policies in sorted(rows.items(), key=lambda item: _order(item[0]))
        }
        for table, rows in found.items()
    }


def late(results: Iterable[Result], policies: Sequence[str]) -> dict[str, int]:
    """Missed deadlines by policy."""
    results = list(results)
    return {name: sum(name in result.late for result in results) for name in policies}


def worst_vs_on_demand(results: Iterable[Result], policy: str) -> dict[str, float]:
    """By zone: mean dollars under the policy per mean dollars on demand, at its worst deadline."""
    usd: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for result in results:
        if {policy, _ON_DEMAND} <= result.usd.keys():
            key = (result.case.zones[0], result.case.row)
            usd[key].append((result.usd[policy], result.usd[_ON_DEMAND]))
    worst: dict[str, float] = defaultdict(float)
    for (zone, _), pairs in sorted(usd.items()):
        ratio = mean(ours for ours, _ in pairs) / mean(theirs for _, theirs in pairs)
        worst[zone] = max(worst[zone], ratio)
    return dict(worst)


def figures(
    results: Sequence[Result], policies: Sequence[str], ms: Mapping[int, float], growth: int | None
) -> list[Figure]:
    """Those that can be told from what was played."""
    tables = means(results)
    found = [*_reproduced(tables), *_panels(tables), *_chance(results), *_one_zone(tables, results)]
    if ms:
        found.append(Figure("ms_per_run", max(ms.values()), _MS, True, f"milliseconds of the processor for 60 h at 195 s ticks, at most ({max(ms, key=ms.__getitem__)} zones)"))  # fmt: skip
    if growth is not None:
        found.append(Figure("growth_bytes", growth, _GARBAGE_BYTES, True, "more memory at the peak over many ticks than over a thousand"))  # fmt: skip
    if results:
        missed = {name: number for name, number in late(results, policies).items() if number}
        by = "".join(f"; {name} {number}" for name, number in missed.items())
        found.append(Figure("missed_deadlines", sum(missed.values()), 0, True, f"of {len(results) * len(policies)} runs{by}"))  # fmt: skip
    return found


def _reproduced(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterable[Figure]:
    """How far our figures for what was published are from it, at the row where it is farthest."""
    for table, policies in PUBLISHED.items():
        for policy in (OMNISCIENT, _UP):
            off = [
                abs(tables[table][row][policy] / usd - 1)
                for row, usd in policies[policy].items()
                if policy in tables.get(table, {}).get(row, {})
            ]
            if off:
                what = f"{policy} on the {table} panel: farthest from what was published"
                yield Figure(f"{table}_{policy}_off", max(off), _SAME, True, what)


def _panels(tables: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterable[Figure]:
    v100 = [row[_OURS] for row in tables.get("v100", {}).values() if _OURS in row]
    if v100:
        yield Figure("v100_mean_usd", mean(v100), _V100_USD, True, "the V100 panel (SkyNomad 41.73, omniscient 37.37)")  # fmt: skip
    for ratio, row in tables.get("h100", {}).items():
        if _OURS in row:
            rest = f"(SkyNomad {PUBLISHED['h100']['SkyNomad'][ratio]:g}, omniscient {PUBLISHED['h100'][OMNISCIENT][ratio]:g})"  # fmt: skip
            yield Figure(f"h100_usd_{ratio}", row[_OURS], _H100_USD.get(ratio), True, f"the H100 panel, deadline / work {ratio} {rest}")  # fmt: skip


def _chance(results: Iterable[Result]) -> Iterable[Figure]:
    """How far the mean of as many windows as the V100 panel has lies from that of all, by chance."""
    others = [
        result.usd[_OURS]
        for result in results
        if result.case.table == "v100_windows" and _OURS in result.usd
    ]
    if len(others) > 1:
        usd = stdev(others) / math.sqrt(_PANEL_WINDOWS)
        yield Figure("v100_standard_error_usd", usd, None, True, "of a mean of five windows, by the 13 other windows of these zones")  # fmt: skip


def _one_zone(
    tables: Mapping[str, Mapping[str, Mapping[str, float]]], results: Sequence[Result]
) -> Iterable[Figure]:
    for deadline, row in tables.get("one_zone", {}).items():
        if {_OURS, _UP, _GREEDY} <= row.keys():
            ratio = row[_OURS] / min(row[_UP], row[_GREEDY])
            yield Figure(f"one_zone_vs_better_{deadline}h", ratio, 1.0, True, "one zone: mean / the better of uniform progress and greedy")  # fmt: skip
    worst = worst_vs_on_demand((r for r in results if r.case.table == "one_zone"), _OURS)
    if worst:
        zone = max(worst, key=worst.__getitem__)
        yield Figure("one_zone_vs_on_demand", worst[zone], _ON_DEMAND_AT_MOST, True, f"one zone: mean / on demand, at the worst zone ({zone}) and deadline")  # fmt: skip


def _order(row: str) -> tuple[int, float, str]:
    try:
        return 0, float(row), ""
    except ValueError:
        return 1, 0.0, row
