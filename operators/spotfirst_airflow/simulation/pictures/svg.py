"""Drawings as SVG: a canvas, axes with round numbers, and labels that do not overlap.

Lengths are pixels. Colours and fonts are the page's, by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

__all__ = ["Canvas", "Scale", "apart", "nice_ticks", "text_width"]

_EM_OF_A_LETTER = 0.62
FONT_PX = 13.0


class Canvas:
    """A drawing of ``width`` x ``height`` with a title and a description for those who listen."""

    def __init__(self, width: float, height: float, *, title: str, description: str) -> None:
        self.width, self.height = width, height
        box = f"0 0 {_number(width)} {_number(height)}"
        said = {"viewBox": box, "role": "img", "aria-label": f"{title}. {description}"}
        self._root = ET.Element("svg", said)
        self._into = self._root

    def line(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        """Through all points."""
        text = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        self._add("polyline", {"class": f"{kind} open", "points": text})

    def box(
        self, x: float, y: float, width: float, height: float, kind: str, *, hint: str = ""
    ) -> None:
        """A rectangle; the hint is shown to those who point at it."""
        where = {"x": x, "y": y, "width": max(0.0, width), "height": max(0.0, height)}
        self._add("rect", {"class": kind, **_numbers(where)}, hint=hint)

    def dot(self, x: float, y: float, radius: float, kind: str, hint: str = "") -> None:
        """A filled circle."""
        self._add("circle", {"class": kind, **_numbers({"cx": x, "cy": y, "r": radius})}, hint=hint)

    def path(self, data: str, kind: str, hint: str = "") -> None:
        """Whatever SVG can draw."""
        self._add("path", {"class": kind, "d": data}, hint=hint)

    def text(self, x: float, y: float, text: str, kind: str = "", *, anchor: str = "start") -> None:
        """One line, its middle at ``y``."""
        attributes = {"class": kind, "text-anchor": anchor, "dy": ".35em"}
        found = self._add("text", {**attributes, **_numbers({"x": x, "y": y})})
        found.text = text

    def svg(self) -> str:
        """The drawing as an element for an HTML page."""
        return ET.tostring(self._root, encoding="unicode")

    def _add(self, name: str, attributes: dict[str, str], *, hint: str = "") -> ET.Element:
        found = ET.SubElement(
            self._into, name, {key: value for key, value in attributes.items() if value}
        )
        if hint:
            ET.SubElement(found, "title").text = hint
        return found


@dataclass(frozen=True)
class Scale:
    """From values to pixels, ``low`` at ``start`` and ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where the value is."""
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return self.start + share * (self.end - self.start)

    def axis_below(
        self, canvas: Canvas, y: float, *, top: float, write: Callable[[float], str]
    ) -> None:
        """Numbers below ``y``, and a thin line up to ``top`` at each."""
        at_most = max(2, int(abs(self.end - self.start) / 70))
        for tick in nice_ticks(self.low, self.high, at_most):
            x = self(tick)
            canvas.line([(x, top), (x, y)], "grid")
            half = text_width(write(tick)) / 2
            canvas.text(min(x, canvas.width - half), y + 14, write(tick), "soft", anchor="middle")

    def axis_left(
        self, canvas: Canvas, x: float, *, right: float, write: Callable[[float], str]
    ) -> None:
        """Numbers left of ``x``, and a thin line to ``right`` at each."""
        at_most = max(2, int(abs(self.end - self.start) / 50))
        for tick in nice_ticks(self.low, self.high, at_most):
            canvas.line([(x, self(tick)), (right, self(tick))], "grid")
            canvas.text(x - 8, self(tick), write(tick), "soft", anchor="end")


def nice_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Round numbers from ``low`` to ``high``, ``at_most`` of them."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / at_most))
    steps = (power * times for times in (1, 2, 5, 10, 20, 50, 100))
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < at_most:
            return [round(number * step, 10) for number in range(first, last + 1)]
    return [low]


def apart(wanted: Sequence[float], *, by: float, low: float, high: float) -> list[float]:
    """Places near those ``wanted``, in the same order, at least ``by`` apart where there is room.

    They stay between ``low`` and ``high``; where all of them do not fit, they come closer together.
    """
    if not wanted:
        return []
    by = min(by, (high - low) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    places: list[float] = []
    for index in order:
        place = max(low, wanted[index])
        places.append(max(place, places[-1] + by) if places else place)
    limit = high
    for number in reversed(range(len(places))):
        places[number] = min(places[number], limit)
        limit = places[number] - by
    found = [0.0] * len(wanted)
    for index, place in zip(order, places, strict=True):
        found[index] = place
    return found


def text_width(text: str) -> float:
    """About how wide a text is, rather more than less."""
    return len(text) * FONT_PX * _EM_OF_A_LETTER


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _numbers(values: dict[str, float]) -> dict[str, str]:
    return {name: _number(value) for name, value in values.items()}
