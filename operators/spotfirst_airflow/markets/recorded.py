"""Markets that were recorded, in the public formats of spot traces.

- CSV with the header ``date,availability``, one row per probe; with a third column
  ``price_usd_h`` if prices are known.
- JSON Lines that ``spotfirst market record`` wrote: prices, and what runs of this account saw.
- JSON ``{"metadata": {"gap_seconds": …}, "data": […], "prices": […]}``, the format of
  skypilot-org/spot-traces; ``prices`` (dollars per hour) may be missing.

Both count nodes that could be had: 1, or N for a probe of N nodes, is *available*. Some JSON
series say 1 for *unavailable*: set ``inverted`` for those. Nothing in a file tells them apart.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import ClassVar

import msgspec

from spotfirst.errors import InvalidSpec
from spotfirst.wire import Record, prepared
from spotfirst_airflow.fleets.options import require
from spotfirst_airflow.markets import history
from spotfirst_airflow.markets.base import MarketOptions, Steps, ZoneState

__all__ = ["RecordedMarket"]

_HEADER = "date,availability"
_PRICED_HEADER = "date,availability,price_usd_h"
_LAST_ROW_S = 3600.0
"""How long the last line of an own recording holds."""


class RecordedMarket(MarketOptions):
    """Plays recordings, each zone its own file, from ``start_s`` on and again from the beginning.

    ``prices`` names a JSON file that maps zones, or the names of their files without the suffix,
    to dollars per hour at each row of the recording. ``nodes`` multiplies the recorded capacity.
    """

    kind: ClassVar[str] = "recorded"
    paths: dict[str, str] = msgspec.field(name="zones")
    prices: str = ""
    inverted: bool = False
    start_s: float = 0.0
    nodes: int = 1
    notice: bool = True

    def check(self) -> None:
        """Raise :class:`InvalidSpec` for options that no file can mend."""
        require(bool(self.paths), "market.zones", self.paths, "a mapping from zones to files")
        require(self.start_s >= 0, "market.start_s", self.start_s, "0 or more")
        require(self.nodes > 0, "market.nodes", self.nodes, "above 0")

    def zones(self) -> tuple[str, ...]:
        """Those with a recording."""
        return tuple(self.paths)

    def course(self, zone: str) -> Steps:
        """The zone's recording. Raises :class:`InvalidSpec` for a file that is not as it must be."""
        path = Path(self.paths[zone])
        if path.suffix == ".jsonl":
            return self._own_course(path, zone)
        series = _read_csv(path) if path.suffix == ".csv" else _read_json(path)
        prices = _read_prices(Path(self.prices), zone, path) if self.prices else series.prices
        if prices is not None and len(prices) != len(series.nodes):
            msg = (
                f"recording {path} has {len(series.nodes)} rows but {len(prices)} prices; "
                "they must be of the same ticks"
            )
            raise InvalidSpec(msg)
        if self.inverted and not set(series.nodes) <= {0, 1}:
            msg = (
                f"recording {path} counts nodes, so 'inverted' has no meaning for it; leave it out"
            )
            raise InvalidSpec(msg)
        states = [
            ZoneState(
                capacity=self.nodes * (1 - count if self.inverted else count),
                notice=self.notice,
                price_usd_h=prices[row] if prices is not None else None,
            )
            for row, count in enumerate(series.nodes)
        ]
        rows = zip(series.times_s, states, strict=True)
        return Steps(rows, start_s=self.start_s, repeat_s=series.end_s)

    def _own_course(self, path: Path, zone: str) -> Steps:
        """What an account recorded of itself (see ``markets.history``)."""
        rows = history.steps(history.read(path), zone)
        if not rows:
            msg = f"recording {path} has no price of zone {zone!r}; check market.zones"
            raise InvalidSpec(msg)
        states = [
            (at, ZoneState(capacity=self.nodes * there, notice=self.notice, price_usd_h=usd_h))
            for at, there, usd_h in rows
        ]
        return Steps(states, start_s=self.start_s, repeat_s=rows[-1][0] + _LAST_ROW_S)

    def lasts_s(self) -> float:
        """As long as the shortest of its recordings."""
        return min(self.course(zone).repeat_s for zone in self.paths)

    def interruption_mean_s(self, zone: str) -> float | None:
        """The mean time with capacity in the recording."""
        return self.course(zone).mean_up_s()


class _Series(Record):
    times_s: list[float]
    nodes: list[int]
    end_s: float
    prices: list[float] | None = None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        msg = f"recording {path} cannot be read: {error.strerror}; check market.zones"
        raise InvalidSpec(msg) from error


def _read_csv(path: Path) -> _Series:
    lines = _read(path).decode("utf-8-sig", "replace").splitlines()
    if not lines or lines[0].strip() not in {_HEADER, _PRICED_HEADER}:
        msg = (
            f"recording {path} does not begin with {_HEADER!r} or {_PRICED_HEADER!r}; is it "
            "a CSV of this format?"
        )
        raise InvalidSpec(msg)
    times_s: list[float] = []
    nodes: list[int] = []
    prices: list[float] = []
    is_priced = lines[0].strip() == _PRICED_HEADER
    first: datetime | None = None
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        date, *numbers = line.split(",")
        try:
            count, *price = numbers
            if is_priced:
                prices.append(float(*price or [""]))
            moment = datetime.fromisoformat(date.strip())
            first = first or moment
            time_s = (moment - first).total_seconds()
            nodes.append(_count(float(count)))
        except (ValueError, TypeError) as error:
            what = "a date and a number of nodes" + (", and a price" if is_priced else "")
            msg = f"recording {path}, line {number}: {line!r} is not {what}"
            raise InvalidSpec(msg) from error
        if times_s and time_s <= times_s[-1]:
            msg = f"recording {path}, line {number}: {date} is not later than the line before"
            raise InvalidSpec(msg)
        times_s.append(time_s)
    if len(times_s) < 2:
        msg = f"recording {path} has {len(times_s)} rows; at least two are needed"
        raise InvalidSpec(msg)
    # The last row holds for as long as the one before it.
    return _Series(
        times_s=times_s, nodes=nodes, end_s=2 * times_s[-1] - times_s[-2], prices=prices or None
    )


class _Metadata(msgspec.Struct):
    gap_seconds: float


class _Trace(msgspec.Struct):
    metadata: _Metadata
    data: list[float]
    prices: list[float] | None = None


def _read_json(path: Path) -> _Series:
    try:
        trace = msgspec.json.decode(_read(path), type=prepared(_Trace))
        nodes = [_count(count) for count in trace.data]
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        msg = f"recording {path} is not a spot trace: {error}"
        raise InvalidSpec(msg) from error
    gap_s = trace.metadata.gap_seconds
    if gap_s <= 0 or not nodes:
        msg = f"recording {path} has {len(nodes)} rows every {gap_s:g} s; both must be above 0"
        raise InvalidSpec(msg)
    return _Series(
        times_s=[row * gap_s for row in range(len(nodes))],
        nodes=nodes,
        end_s=len(nodes) * gap_s,
        prices=trace.prices,
    )


def _read_prices(path: Path, zone: str, recording: Path) -> list[float]:
    try:
        series = msgspec.json.decode(_read(path), type=dict[str, list[float]])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        msg = f"prices {path} are not a mapping from names to lists of prices: {error}"
        raise InvalidSpec(msg) from error
    for name in (zone, recording.stem):
        if name in series:
            return series[name]
    msg = f"prices {path} have neither {zone!r} nor {recording.stem!r}; they have {sorted(series)}"
    raise InvalidSpec(msg)


def _count(value: float) -> int:
    if value < 0 or value != int(value):
        msg = f"{value} is not a number of nodes"
        raise ValueError(msg)
    return int(value)
