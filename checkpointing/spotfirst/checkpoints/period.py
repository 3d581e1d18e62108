"""How often to checkpoint: often enough to lose little, seldom enough to cost little.

A checkpoint every T seconds that costs C seconds of training, in a pool that interrupts every M
seconds on average, takes the share C/T of the time, and half a period is lost at each interruption:
T/2M. The sum is smallest at T = sqrt(2 C M) (J. W. Young, "A first order approximation to the
optimum checkpoint interval", Communications of the ACM 17(9), 1974).
"""

from __future__ import annotations

import math

from spotfirst.wire import Record

__all__ = ["Period", "choose_period", "optimal_period_s", "overhead_share"]

_UNKNOWN_COST_S = 1.0
_SHORTEST_S = 1.0
_SHORTEST_SHARE = 1 / 500
"""Of the mean time between interruptions: a shorter period would save less than 0.1 % of it."""


class Period(Record):
    """The period in force, and what it follows from; ``None`` for what is not known.

    ``cost_s`` is training time that a checkpoint takes, ``durable_s`` the time until it is
    stored, ``interruption_mean_s`` the mean time between interruptions of the pool.
    """

    period_s: float
    reason: str
    cost_s: float | None = None
    durable_s: float | None = None
    interruption_mean_s: float | None = None

    def differs(self, told: Period | None) -> bool:
        """Whether people should hear of it who were told the other."""
        return told is None or abs(self.period_s - told.period_s) > 0.25 * told.period_s

    def __str__(self) -> str:
        known = [
            f"{name} {value:.3g} s"
            for name, value in (
                ("cost", self.cost_s),
                ("stored after", self.durable_s),
                ("mean time between interruptions", self.interruption_mean_s),
            )
            if value is not None
        ]
        numbers = f" ({', '.join(known)})" if known else ""
        return f"a checkpoint every {self.period_s:.3g} s: {self.reason}{numbers}"


def optimal_period_s(cost_s: float, interruption_mean_s: float) -> float:
    """From the beginning of one checkpoint to that of the next.

    The first two terms of J. T. Daly, "A higher order estimate of the optimum checkpoint interval
    for restart dumps", Future Generation Computer Systems 22(3), 2006. His interval ends when the
    checkpoint begins, so C is to be added: sqrt(2CM) (1 + sqrt(C/2M)/3 + …) - C + C =
    sqrt(2CM) + C/3 + …. His third term would add 1.4 % at C = M/4; the optimum is flatter than
    that, and without it the period grows with M always.
    """
    return math.sqrt(2 * cost_s * interruption_mean_s) + cost_s / 3


def overhead_share(period_s: float, cost_s: float, interruption_mean_s: float) -> float:
    """Training time spent on checkpoints and lost at interruptions: C/T + T/2M, to first order."""
    return cost_s / period_s + period_s / (2 * interruption_mean_s)


def choose_period(
    limit_s: float,
    *,
    cost_s: float | None = None,
    durable_s: float | None = None,
    interruption_mean_s: float | None = None,
) -> Period:
    """The period within its bounds.

    A kill loses at most ``limit_s`` of training: what one period and the way of the next checkpoint
    to the storage take together. A store so slow that no period can keep that gets one checkpoint
    after the other.

    Before a cost is known, 1 s is assumed. The first checkpoint then comes well before the limit,
    which shows early what one costs and whether it can be stored at all; and after enough steps to
    know how long one takes undisturbed. Where nobody knows how often the pool is interrupted, the
    limit decides alone.
    """
    way_s = durable_s or 0.0
    longest_s = limit_s - way_s
    mean_s = interruption_mean_s
    if mean_s is None:
        period_s = longest_s
        reason = f"a kill may lose {limit_s:g} s, and nobody knows how often the pool is taken"
    else:
        shortest_s = max(_SHORTEST_S, _SHORTEST_SHARE * mean_s)
        optimum_s = optimal_period_s(_UNKNOWN_COST_S if cost_s is None else cost_s, mean_s)
        period_s = max(shortest_s, optimum_s)
        reason = "Young/Daly"
        if cost_s is None:
            reason += ", for a cost of 1 s until it is measured"
        elif period_s > optimum_s:
            reason = f"Young/Daly's {optimum_s:.3g} s would save nothing more"
        if period_s > longest_s:
            reason = f"a kill may lose {limit_s:g} s; Young/Daly alone would be {period_s:.3g} s"
            period_s = longest_s
    if period_s < way_s:
        period_s = way_s
        reason = "one after the other: the storage takes no more"
        if way_s > longest_s:
            reason += (
                f", and a kill can lose {2 * way_s:.3g} s, more than the limit of {limit_s:g} s"
            )
    return Period(
        period_s=period_s,
        reason=reason,
        cost_s=cost_s,
        durable_s=durable_s,
        interruption_mean_s=mean_s,
    )
