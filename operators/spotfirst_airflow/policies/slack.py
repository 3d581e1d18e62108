"""What an hour of slack is worth, and an hour of work: the prices by which options are compared.

Every way to go on (stay in one pool and wait whenever it is down, be on demand meanwhile, roam
over several pools, on demand alone) costs so many dollars, and uses so much slack, for each hour
of work. The rest of the work can be done by mixing ways, as a linear programme: those that use
less slack take over what the cheap ones leave no time for. Its solution lies on the lower convex
hull of the ways; the slope there is the price of slack, and where the tangent meets the axis, the
price of work.

How long pools will be down, nobody knows, least of all for the one outage that little slack has
to be enough for. So the prices are those of several scenarios, averaged: as the cost of a run bends
ever more upwards the less slack there is, that is not the price of the average scenario, but higher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

__all__ = ["PoolRates", "Prices", "shadow_prices", "spread_of"]

_SPREAD = 1.4
"""Of one outage."""
_EVENING_OUT = 0.25
"""By which power of their number outages even out: independent ones would by 0.5, but they come in
rows."""
_MIDDLES = tuple(NormalDist().inv_cdf((2 * part + 1) / 30) for part in range(15))
"""The middles of equally likely parts of a normal distribution."""
_LEAST_WORK_H = 0.05


class PoolRates(NamedTuple):
    """A spot pool on average: dollars and hours, and what it costs to bring the checkpoint."""

    usd_h: float
    up_h: float
    down_h: float
    carry_usd: float


class Prices(NamedTuple):
    """Dollars that one more hour is worth: of ``slack``, and of ``work`` that is left."""

    slack: float
    work: float


class _Way(NamedTuple):
    """``slack`` hours used, and ``usd`` paid, for each hour of work."""

    slack: float
    usd: float


class _Edge(NamedTuple):
    """A part of a hull, up to so much slack for an hour of work, and the prices on it."""

    until: float
    prices: Prices


def shadow_prices(
    pools: tuple[PoolRates, ...],
    *,
    on_demand_usd_h: float,
    changeover_h: float,
    slack_per_work: float,
    spread: float,
) -> Prices:
    """The prices at which the best mix of ways uses the slack that there is, and no more.

    ``spread`` says how uncertain it is how long pools will be down: see :func:`spread_of`.
    """
    slack = work = 0.0
    for edges in _hulls(pools, on_demand_usd_h, changeover_h, spread):
        edge = next(edge for edge in edges if slack_per_work <= edge.until)
        slack += edge.prices.slack
        work += edge.prices.work
    return Prices(slack / len(_MIDDLES), work / len(_MIDDLES))


def spread_of(pools: Sequence[PoolRates], slack_h: float) -> float:
    """The standard deviation of the logarithm of how much longer pools are down than it seems.

    The more outages the slack is enough for, the more they even out. In steps of a hundredth.
    """
    if not pools:
        return 0.0
    outages = max(0.0, slack_h) * len(pools) / sum(pool.down_h for pool in pools)
    return round(_SPREAD / math.pow(1 + min(outages, 1e6), _EVENING_OUT), 2)


# Between two events of a run little here changes but the slack: so the hulls are kept.
@lru_cache(maxsize=64)
def _hulls(
    pools: tuple[PoolRates, ...], on_demand_usd_h: float, changeover_h: float, spread: float
) -> tuple[tuple[_Edge, ...], ...]:
    cheap_first = sorted(pools)
    return tuple(
        _hull(_ways(cheap_first, math.exp(spread * middle), on_demand_usd_h, changeover_h))
        for middle in _MIDDLES
    )


def _hull(ways: Sequence[_Way]) -> tuple[_Edge, ...]:
    """The lower convex hull, from the way that uses least slack to the cheapest one.

    By A. M. Andrew's monotone chain ("Another efficient algorithm for convex hulls in two dimensions",
    Information Processing Letters 9, 1979).
    """
    corners: list[_Way] = []
    for way in sorted(ways):
        if corners and way.usd >= corners[-1].usd:
            continue  # an earlier one is cheaper, and uses less slack
        while len(corners) > 1 and _slope(corners[-2], way) >= _slope(*corners[-2:]):
            corners.pop()
        corners.append(way)
    edges = []
    for corner, following in pairwise(corners):
        slope = _slope(corner, following)
        edges.append(_Edge(following.slack, Prices(slope, corner.usd + slope * corner.slack)))
    return (*edges, _Edge(math.inf, Prices(0.0, corners[-1].usd)))


def _slope(one: _Way, other: _Way) -> float:
    """Dollars that an hour of slack saves between two ways, of which the second uses more."""
    return (one.usd - other.usd) / (other.slack - one.slack)


def _ways(
    cheap_first: Sequence[PoolRates], longer: float, on_demand_usd_h: float, changeover_h: float
) -> list[_Way]:
    """On demand; each pool, alone or with on demand while it is down; the cheapest two, three…."""
    ways = [_Way(0.0, on_demand_usd_h)]
    none_up, returns = 1.0, 0.0
    share = usd = up = 0.0
    for number, pool in enumerate(cheap_first):
        down_h = pool.down_h * longer
        work_h = max(pool.up_h - changeover_h, _LEAST_WORK_H)
        spot_usd = pool.usd_h * pool.up_h
        ways.append(_Way((down_h + changeover_h) / work_h, spot_usd / work_h))
        if down_h > 2 * changeover_h:
            all_h = work_h + down_h - changeover_h
            bridged = (spot_usd + on_demand_usd_h * down_h) / all_h
            ways.append(_Way(2 * changeover_h / all_h, bridged))
        # As if pools were up or down independently, and the cheapest that is up were taken.
        taken = none_up * pool.up_h / (pool.up_h + down_h)
        share, up = share + taken, up + taken * pool.up_h
        usd += taken * (spot_usd + pool.carry_usd)
        none_up *= down_h / (pool.up_h + down_h)
        returns += 1 / down_h
        if number > 0:
            work_h = max(up / share - changeover_h, _LEAST_WORK_H)
            slack_h = changeover_h + none_up / returns
            ways.append(_Way(slack_h / work_h, usd / share / work_h))
    return ways
