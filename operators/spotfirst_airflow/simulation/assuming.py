"""From what a person says about a market to one that can be played, and what had to be assumed."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from spotfirst.errors import InvalidSpec
from spotfirst.market import Pool
from spotfirst_airflow.fleets.local.catalogue import CATALOGUE
from spotfirst_airflow.fleets.zones import region_of
from spotfirst_airflow.markets import (
    CalibratedMarket,
    RecordedMarket,
    SyntheticMarket,
    history,
    market_options,
)
from spotfirst_airflow.simulation.setting import Terms

__all__ = ["ANY_TYPE", "DRAWN", "find_market", "find_terms"]

ANY_TYPE = "instance"
"""What a pool is called whose type nobody has named."""
DRAWN = (CalibratedMarket.kind, SyntheticMarket.kind)
"""The markets that need no recording, the one that resembles real ones first."""
_SPOT_SHARE = Decimal("0.4")
_RECORDINGS = ("*.csv", "*.jsonl", "*.json")
_ZONE_IN_NAME = re.compile(r"[a-z]+(?:-[a-z]+)+-?\d-?[a-z](?![a-z0-9])")


def find_market(
    names: Sequence[str],
    *,
    zones: Sequence[str],
    seed: int = 0,
    scarcity: str = "usual",
    prices: str = "",
    inverted: bool = False,
) -> tuple[dict[str, Any], tuple[str, ...], str]:
    """The options of a market, its zones, and a sentence about it.

    ``names`` is the name of one of :data:`DRAWN`, or recordings: files, folders and patterns,
    each file a zone, which ``ZONE=FILE`` names. Raises :class:`InvalidSpec`.
    """
    if len(names) == 1 and names[0] in DRAWN:
        options: dict[str, Any] = {"kind": names[0], "seed": seed}
        said = f"a {names[0]} market (seed {seed}) with {_count(zones, 'zone')}"
        if names[0] == CalibratedMarket.kind:
            options["scarcity"] = scarcity
            said += f" and {scarcity} spot capacity"
        market_options(options)
        return options, tuple(zones), said
    mixed = sorted(set(names) & set(DRAWN))
    if mixed:
        msg = f"--market {mixed[0]} is a market of its own; name either that, or recordings"
        raise InvalidSpec(msg)
    paths: dict[str, str] = {}
    for name in names:
        for zone, path in _recordings(name, leave_out=prices):
            if zone in paths:
                msg = (
                    f"both {paths[zone]} and {path} are recordings of zone {zone!r}; "
                    "name the zones: --market ZONE=FILE"
                )
                raise InvalidSpec(msg)
            paths[zone] = path
    options = {
        "kind": RecordedMarket.kind, "zones": paths, "prices": prices, "inverted": inverted,
    }  # fmt: skip
    lasts_s = market_options(options).lasts_s()
    assert lasts_s is not None
    said = f"recordings of {_count(list(paths), 'zone')}, {lasts_s / 86400:.1f} days"
    return options, tuple(paths), said


def find_terms(
    zones: Sequence[str],
    types: Sequence[str],
    *,
    on_demand_usd_h: Decimal | None = None,
    spot_usd_h: Decimal | None = None,
) -> tuple[tuple[Terms, ...], list[str]]:
    """A pool for each zone and type with its prices, and where they are from.

    What is not given is that of the local fleet's catalogue, or else EC2's in the price table.
    Raises :class:`InvalidSpec` for a type that neither knows.
    """
    if not types:
        types = [ANY_TYPE]
        if on_demand_usd_h is None:
            msg = (
                "no prices: say of what the recording is with --instance-type, or --on-demand-price"
            )
            raise InvalidSpec(msg)
    said: list[str] = []
    found: list[Terms] = []
    for name in types:
        on_demand, spot, source = on_demand_usd_h, spot_usd_h, "as given"
        if on_demand is None:
            on_demand, source = _list_price(name, zones)
        if spot is None:
            known = CATALOGUE.get(name)
            spot = (
                known.spot_usd_h if known else (on_demand * _SPOT_SHARE).quantize(Decimal("0.0001"))
            )
        said.append(f"{name}: ${on_demand:f}/h on demand ({source}), usually ${spot:f}/h on spot")
        found += [
            Terms(
                pool=Pool(instance_type=name, zone=zone), on_demand_usd_h=on_demand, spot_usd_h=spot
            )
            for zone in zones
        ]
    return tuple(found), said


def _list_price(name: str, zones: Sequence[str]) -> tuple[Decimal, str]:
    if name in CATALOGUE:
        return CATALOGUE[name].on_demand_usd_h, "AWS's list price in us-east-1"
    from spotfirst_airflow.fleets.ec2.pricetable import load_table

    table = load_table()
    for region in (*map(region_of, zones), *table.regions):
        if region in table.regions and name in table.regions[region].usd_h:
            return table.regions[region].usd_h[name], f"AWS's list price in {region}"
    msg = (
        f"no price of {name!r} is known; give --on-demand-price, or get AWS's with "
        "`spotfirst prices refresh --region REGION`"
    )
    raise InvalidSpec(msg)


def _recordings(name: str, *, leave_out: str) -> list[tuple[str, str]]:
    """(zone, file) for what ``name`` means."""
    zone, equals, path = name.partition("=")
    if equals:
        return [(zone, path)]
    whole = Path(name).expanduser()
    if whole.is_dir():
        # The CSV files of a folder are its recordings; JSON beside them may be anything.
        kinds = (sorted(map(str, whole.glob(pattern))) for pattern in _RECORDINGS)
        found = next((files for files in kinds if files), [])
    else:
        # Path.glob wants to be told the folder apart.
        found = sorted(glob.glob(str(whole))) if glob.has_magic(name) else [str(whole)]  # noqa: PTH207
    found = [file for file in found if not leave_out or Path(file) != Path(leave_out)]
    if not found:
        msg = f"--market {name!r} has no recordings: {' or '.join(_RECORDINGS)}"
        raise InvalidSpec(msg)
    if not Path(found[0]).exists():
        msg = (
            f"--market {name!r} is no file, and no market of that name: there are "
            f"{', '.join(DRAWN)}"
        )
        raise InvalidSpec(msg)
    return [(zone, file) for file in found for zone in _zones_of(file)]


def _zones_of(file: str) -> tuple[str, ...]:
    """Those that an own recording has; of another one, the one that it is named for."""
    if Path(file).suffix == ".jsonl":
        return history.zones(history.read(Path(file)))
    return (_zone_of(file),)


def _zone_of(file: str) -> str:
    """The zone that a file is named for, such as ``us-east-1a_v100_1.csv``; else its whole name."""
    stem = Path(file).stem
    found = _ZONE_IN_NAME.match(stem)
    return found[0] if found else stem


def _count(things: Sequence[str], noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"
