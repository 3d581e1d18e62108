"""A market drawn by chance that resembles real ones, for those who have recorded none yet."""

from __future__ import annotations

from typing import ClassVar, Literal

from spotfirst_airflow.fleets.options import require
from spotfirst_airflow.markets.base import MANY, Course, MarketOptions
from spotfirst_airflow.markets.synthetic import Chance, ChanceCourse, Spells

__all__ = ["CalibratedMarket"]

_HOUR_S = 3600.0
_Scarcity = Literal["plenty", "usual", "scarce"]


class CalibratedMarket(MarketOptions):
    """Every zone alternates between having spot instances and having none, as real zones do.

    Times with and without capacity have heavy tails: most are short, a few last for a day or days.
    Each is a mixture of two exponential distributions, fitted (by expectation maximisation) to 45
    days of p3.2xlarge in nine zones of AWS, February to April 2023, one row every 195 s, as
    published with SkyNomad (arXiv 2601.06520). ``scarcity`` names three zones at a time:

    | scarcity | zones | share of time | up, mean / median | down, mean / median |
    |---|---|---|---|---|
    | plenty | us-west-2a, 2b, 2c | 0.89 | 7.4 h / 1.0 h | 0.9 h / 0.4 h |
    | usual | us-east-2a, 2b, us-east-1f | 0.68 | 3.7 h / 0.7 h | 1.7 h / 0.5 h |
    | scarce | us-east-1a, 1c, 1d | 0.36 | 1.3 h / 0.5 h | 2.4 h / 0.5 h |

    Prices change three times a day by half a percent or so, and stay within about 5 % of the usual
    one, as there. Zones are independent of each other here, as real ones are not quite: that
    flatters who uses many.
    """

    kind: ClassVar[str] = "calibrated"
    seed: int = 0
    scarcity: _Scarcity = "usual"
    silent_share: float = 0.0
    capacity: int = MANY

    def check(self) -> None:
        """Raise :class:`InvalidSpec` for shares that are none."""
        require(0 <= self.silent_share <= 1, "market.silent_share", self.silent_share, "0 to 1")
        require(self.capacity > 0, "market.capacity", self.capacity, "above 0")

    def course(self, zone: str) -> Course:
        """A course of the zone's own, independent of other zones'."""
        up, down = _SPELLS[self.scarcity]
        chance = Chance(
            up=up, down=down, capacity=self.capacity, silent_share=self.silent_share,
            begins_down=down.mean_s / (up.mean_s + down.mean_s), price_step_s=8 * _HOUR_S,
            price_return=0.995, price_spread=0.005,
        )  # fmt: skip
        return ChanceCourse(chance, f"spotfirst/calibrated/{self.seed}/{zone}")

    def interruption_mean_s(self, zone: str) -> float | None:  # noqa: ARG002 - the same everywhere
        """How long a time with capacity lasts on average."""
        return _SPELLS[self.scarcity][0].mean_s


def _hours(short_h: float, long_h: float, *, long: float) -> Spells:
    return Spells(short_h * _HOUR_S, long_h * _HOUR_S, long)


_SPELLS: dict[_Scarcity, tuple[Spells, Spells]] = {
    "plenty": (_hours(1.07, 23.0, long=0.288), _hours(0.50, 2.29, long=0.22)),
    "usual": (_hours(0.63, 9.40, long=0.345), _hours(0.43, 3.85, long=0.384)),
    "scarce": (_hours(0.54, 4.78, long=0.186), _hours(0.66, 6.66, long=0.282)),
}
"""With and without capacity."""
