"""The page: what was assumed, the three pictures, and the table of all figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape

from spotfirst_airflow.htmlpages import card, document, table
from spotfirst_airflow.simulation.backtest import Backtest, Outcome, Row
from spotfirst_airflow.simulation.pictures.front import draw_front
from spotfirst_airflow.simulation.pictures.spread import draw_spread
from spotfirst_airflow.simulation.pictures.timeline import draw_timeline

__all__ = ["render_page"]

_COLOURS = ("#1a7f4b", "#3b7dd8", "#b26a00", "#8a56c2", "#c4314b", "#2a8f9c", "#7a7a7a", "#a8528f")
_WIDE, _NARROW = 1100.0, 380.0

_STYLE = """
svg { display: block; height: auto; width: 100%; }
.narrow { display: none; }
@media (max-width: 640px) { .wide { display: none; } .narrow { display: block; } }
svg text { fill: currentColor; font: 13px system-ui, sans-serif; }
svg text.soft { opacity: .75; } svg .open { fill: none; }
.grid { stroke: var(--line); stroke-width: 1; } .lead { stroke: currentColor; opacity: .3; }
.front { stroke: currentColor; opacity: .25; stroke-width: 9; stroke-linejoin: round; }
.ring { fill: none; stroke: currentColor; stroke-width: 1.5; }
.there { fill: #8885; } .spot { fill: #3b7dd8; } .on-demand { fill: #b26a00; }
.lost { fill: #c4314b; } .progress { stroke: #1a7f4b; stroke-width: 2; }
.deadline { stroke: #c4314b; stroke-dasharray: 4 3; stroke-width: 1.5; }
.key span { border-radius: .2rem; display: inline-block; height: .8em; margin: 0 .35rem 0 1rem;
  width: 1.2em; }
""" + "".join(
    f".p{n}.open {{ stroke: {colour}; stroke-width: 2; }} circle.p{n}, rect.p{n} "
    f"{{ fill: {colour}; }} circle.p{n}.hollow {{ fill: none; stroke: {colour}; }} "
    f"svg text.p{n} {{ fill: {colour}; font-weight: 600; }}\n"
    for n, colour in enumerate(_COLOURS)
)


def render_page(found: Backtest, said: Mapping[str, str], *, policy: str = "") -> str:
    """One HTML file that needs nothing beside itself.

    The timelines are of ``policy``; without one, of ``spotfirst`` if it was played, else of the
    first.
    """
    rows = found.rows()
    names = [choice.name for choice in found.policies]
    kinds = {name: f"p{number % len(_COLOURS)}" for number, name in enumerate(names)}
    shown = policy or ("spotfirst" if "spotfirst" in names else names[0])
    highest = max(float(outcome.cost_usd) for outcome in found.outcomes)
    body = [
        "<h1>What it would have cost</h1>",
        *(f"<p class=soft>{escape(topic)}: {escape(text)}</p>" for topic, text in said.items()),
        f"<dl>{''.join(_cards(found, rows))}</dl>",
        "<h2>Cost against deadline</h2>",
        _FRONT_KEY,
        _both(lambda width: draw_front(rows, kinds, width=width)),
    ]
    for deadline_s in found.deadlines_s:
        outcomes = {name: found.of(name, deadline_s) for name in names}
        title = f"From start to start, {_deadline(deadline_s)}"
        body += [f"<h2>{title}</h2>", _both(_spread(outcomes, kinds, highest, title))]
    body += [f"<h2>Runs of {escape(shown)}</h2>", _KEY]
    for title, outcome in _chosen(found, shown):
        body += [f"<p>{escape(title)}</p>", _both(_timeline(found, outcome, title))]
    body += ["<h2>All figures</h2>", table(_HEAD, map(_cells, rows))]
    return document("What it would have cost", "".join(body), style=_STYLE)


_FRONT_KEY = (
    "<p class=soft>Rings and the band: the cheapest that was always in time, by deadline. "
    "Hollow: some runs missed it.</p>"
)
_KEY = (
    '<p class="key soft"><span style="background:#8885"></span>spot was there'
    '<span style="background:#3b7dd8"></span>an instance on spot'
    '<span style="background:#b26a00"></span>on demand'
    '<span style="background:#c4314b"></span>interrupted'
    '<span style="background:#1a7f4b"></span>work done</p>'
)
_HEAD = (
    "deadline",
    "policy",
    "mean",
    "p10",
    "p90",
    "of on demand",
    "in time",
    "lost",
    "done after",
)


def _both(draw: Callable[[float], str]) -> str:
    """A picture for wide screens and one for narrow ones."""
    return f"<div class=wide>{draw(_WIDE)}</div><div class=narrow>{draw(_NARROW)}</div>"


def _spread(
    outcomes: dict[str, list[Outcome]], kinds: dict[str, str], highest: float, title: str
) -> Callable[[float], str]:
    return lambda width: draw_spread(
        dict(outcomes), kinds, width=width, highest_usd=highest, title=title
    )


def _timeline(found: Backtest, outcome: Outcome, title: str) -> Callable[[float], str]:
    played, world = found.replay(outcome), found.setting.world()
    return lambda width: draw_timeline(
        played, world, found.task, start_s=outcome.start_s, deadline_s=outcome.deadline_s,
        width=width, title=title,
    )  # fmt: skip


def _chosen(found: Backtest, policy: str) -> list[tuple[str, Outcome]]:
    """The cheapest, the median and the dearest run with the middle one of the deadlines."""
    deadlines = found.deadlines_s
    runs = sorted(found.of(policy, deadlines[len(deadlines) // 2]), key=lambda o: o.cost_usd)
    picked = {"cheapest": runs[0], "median": runs[len(runs) // 2], "dearest": runs[-1]}
    return [(_run_said(name, run), run) for name, run in picked.items()]


def _run_said(name: str, run: Outcome) -> str:
    return (
        f"The {name}: ${run.cost_usd:.2f}, {_deadline(run.deadline_s)}, from hour "
        f"{run.start_s / 3600:.1f} of the market"
    )


def _cards(found: Backtest, rows: list[Row]) -> list[str]:
    best = [row for row in rows if row.is_best]
    cards = [card("On demand", f"${found.on_demand_usd:.2f}", "the same work, uninterrupted")]
    for row in best[:4]:
        note = f"{row.policy}, {row.share_of_on_demand:.0%} of on demand"
        cards.append(card(f"Best, {_deadline(row.deadline_s)}", f"${row.mean_usd:.2f}", note))
    return cards


def _cells(row: Row) -> tuple[str, ...]:
    done = "-" if row.finished_s is None else f"{row.finished_s / 3600:.1f} h"
    return (
        _deadline(row.deadline_s), row.policy, f"${row.mean_usd:.2f}", f"${row.p10_usd:.2f}",
        f"${row.p90_usd:.2f}", f"{row.share_of_on_demand:.0%}", f"{row.in_time} of {row.runs}",
        f"{row.interruptions:.1f}", done,
    )  # fmt: skip


def _deadline(deadline_s: float | None) -> str:
    return "no deadline" if deadline_s is None else f"deadline {deadline_s / 3600:g} h"
