"""The tables: which cases each consists of."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from benchmarks.policies.playing import Case
from benchmarks.policies.traces import GANG, H100, V100, Recording
from spotfirst_airflow.simulation import Task

__all__ = ["RATIOS", "TABLES", "cases"]

_H = 3600.0
_D_S = 0.2 * _H
_FAST_D_S = 0.655 + 90.0
"""The changeover that ``benchmarks.changeover`` measures, and a boot of 90 s."""
_CHECKPOINT_BYTES = 50 * 10**9

_V100_ZONES = ("us-east-1c", "us-east-2b", "us-west-2a")
_V100_DEADLINE_H = 59.9083
_V100_PANEL = (3, 5, 7, 8, 14)
"""Of the windows that lie one after the other, as long as a deadline each."""
_V100_WINDOWS = 18
_H100_ZONES = (
    "us-central1-a", "us-west1-a", "europe-west1-c", "europe-west3-c", "asia-southeast1-b",
    "asia-south2-b",
)  # fmt: skip
_H100_DEADLINE_H = 51.8333
_H100_WINDOWS = 6
RATIOS = (1.05, 1.1, 1.2, 1.5, 2.0)
"""Deadline to work, of the H100 panel."""
_DEADLINES_H = (52, 60, 72, 80)
_ONE_ZONE_WORK_H = 48.0


def cases(names: Sequence[str], *, windows: int) -> list[Case]:
    """Those of these tables; ``windows`` says how many starts each zone gets, where one may choose."""
    return [case for name in names for case in TABLES[name](name, windows)]


def _case(
    table: str, row: str, recording: Recording, zones: Sequence[str], *, start_h: float, task: Task
) -> Case:
    tick = round(start_h * _H / recording.tick_s)
    return Case(
        table=table, row=row, recording=recording.name, zones=tuple(zones), tick=tick, task=task
    )


def _task(work_h: float, deadline_h: float, *, d_s: float = _D_S) -> Task:
    return Task(
        work_s=work_h * _H, deadline_s=deadline_h * _H, changeover_s=d_s, overlaps=False,
        checkpoint_bytes=_CHECKPOINT_BYTES,
    )  # fmt: skip


_V100_TASK = _task(39.9389, _V100_DEADLINE_H)


def _v100(table: str, _windows: int) -> list[Case]:
    """SkyNomad's panel, to the letter."""
    return [
        _case(
            table,
            str(number + 1),
            V100,
            _V100_ZONES,
            start_h=window * _V100_DEADLINE_H,
            task=_V100_TASK,
        )
        for number, window in enumerate(_V100_PANEL)
    ]


def _v100_windows(table: str, _windows: int) -> list[Case]:
    """The same zones in all other windows."""
    others = [window for window in range(_V100_WINDOWS) if window not in _V100_PANEL]
    return [
        _case(table, "all", V100, _V100_ZONES, start_h=window * _V100_DEADLINE_H, task=_V100_TASK)
        for window in others
    ]


def _v100_zones(table: str, windows: int) -> list[Case]:
    """The panel's windows in every other choice of one zone in each of the three regions."""
    regions = (V100.zones[:4], V100.zones[4:6], V100.zones[6:])
    others = [zones for zones in itertools.product(*regions) if zones != _V100_ZONES]
    return [
        _case(table, "all", V100, zones, start_h=window * _V100_DEADLINE_H, task=_V100_TASK)
        for zones in others
        for window in _V100_PANEL[:windows]
    ]


def _h100_cases(table: str, zones: Sequence[str], first_h: float) -> list[Case]:
    return [
        _case(
            table,
            f"{ratio:g}",
            H100,
            zones,
            start_h=first_h + window * _H100_DEADLINE_H,
            task=_task(_H100_DEADLINE_H / ratio, _H100_DEADLINE_H),
        )
        for ratio in RATIOS
        for window in range(_H100_WINDOWS)
    ]  # fmt: skip


def _h100(table: str, _windows: int) -> list[Case]:
    """SkyNomad's panel, to the letter."""
    return _h100_cases(table, _H100_ZONES, 0.0)


def _h100_windows(table: str, _windows: int) -> list[Case]:
    """The same zones, half a window later."""
    return _h100_cases(table, _H100_ZONES, _H100_DEADLINE_H / 2)


def _h100_zones(table: str, _windows: int) -> list[Case]:
    """The panel's windows in the seven zones that it leaves out."""
    return _h100_cases(table, [zone for zone in H100.zones if zone not in _H100_ZONES], 0.0)


def _one_zone(table: str, windows: int) -> list[Case]:
    """Each V100 zone alone, at starts that are spread over the recording."""
    return _alone(table, windows, d_s=_D_S)


def _one_zone_fast(table: str, windows: int) -> list[Case]:
    """The same with the changeover that was measured."""
    return _alone(table, windows, d_s=_FAST_D_S)


def _alone(table: str, windows: int, *, d_s: float) -> list[Case]:
    return [
        case
        for zone in V100.zones
        for deadline_h in _DEADLINES_H
        for case in _spread(table, V100, [zone], windows=windows, deadline_h=deadline_h, d_s=d_s)
    ]


def _gang(table: str, windows: int) -> list[Case]:
    """Four nodes, all or none, in any of three zones."""
    return [
        case
        for deadline_h in _DEADLINES_H
        for case in _spread(
            table, GANG, GANG.zones, windows=windows, deadline_h=deadline_h, d_s=_D_S
        )
    ]


def _spread(
    table: str,
    recording: Recording,
    zones: Sequence[str],
    *,
    windows: int,
    deadline_h: float,
    d_s: float,
) -> list[Case]:
    """Starts that are spread evenly over the recording."""
    task = _task(_ONE_ZONE_WORK_H, deadline_h, d_s=d_s)
    last_h = recording.hours - deadline_h
    starts_h = [last_h * (number + 0.5) / windows for number in range(windows)]
    return [
        _case(table, f"{deadline_h:g}", recording, zones, start_h=start_h, task=task)
        for start_h in starts_h
    ]


TABLES: dict[str, Callable[[str, int], list[Case]]] = {
    "v100": _v100,
    "v100_windows": _v100_windows,
    "v100_zones": _v100_zones,
    "h100": _h100,
    "h100_windows": _h100_windows,
    "h100_zones": _h100_zones,
    "one_zone": _one_zone,
    "one_zone_fast": _one_zone_fast,
    "gang": _gang,
}
"""By name: the cases of a table, from its name and how many windows it may have."""
