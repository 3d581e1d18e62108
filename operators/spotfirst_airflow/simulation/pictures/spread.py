"""How the cost differs from start to start: each run a dot, by policy."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from spotfirst_airflow.simulation.backtest import Outcome, quantile
from spotfirst_airflow.simulation.pictures.svg import Canvas, Scale, text_width

__all__ = ["draw_spread"]

_ROW_PX = 46.0
_DOT_PX = 3.0


def draw_spread(
    outcomes: dict[str, Sequence[Outcome]],
    kinds: dict[str, str],
    *,
    width: float,
    highest_usd: float,
    title: str,
) -> str:
    """A row for each policy: its runs, a bar from the tenth to the ninetieth, a tick at the median.

    Runs of about the same cost are on top of each other. Hollow ones were not finished in time.
    """
    is_narrow = width < 600
    row_px = _ROW_PX + (16 if is_narrow else 0)
    left = 16.0 if is_narrow else max(map(text_width, outcomes)) + 24
    top, height = 6.0, len(outcomes) * row_px + 46
    bottom = height - 40
    x = Scale(0.0, highest_usd * 1.02 or 1.0, left, width - 16)
    canvas = Canvas(width, height, title=title, description=_description(outcomes))
    x.axis_below(canvas, bottom, top=top, write=lambda usd: f"${usd:g}")
    canvas.text((left + width) / 2, height - 8, "cost of a run", "soft", anchor="middle")
    for number, (policy, runs) in enumerate(outcomes.items()):
        kind, base = kinds[policy], top + (number + 1) * row_px - 8
        if is_narrow:
            canvas.text(left, base - row_px + 16, policy, f"{kind} label")
        else:
            canvas.text(left - 12, base - 14, policy, f"{kind} label", anchor="end")
        costs = sorted(run.cost_usd for run in runs)
        low, middle, high = (x(float(quantile(costs, share))) for share in (0.1, 0.5, 0.9))
        canvas.box(low, base - 1, max(high - low, 1), 3, f"{kind} fill")
        canvas.box(
            middle - 1.5,
            base - 5,
            3,
            11,
            f"{kind} fill",
            hint=f"median ${quantile(costs, 0.5):.2f}",
        )
        _pile(canvas, x, base - 9, sorted(runs, key=lambda run: run.cost_usd), kind)
    return canvas.svg()


def _pile(canvas: Canvas, x: Scale, base: float, runs: Sequence[Outcome], kind: str) -> None:
    """Dots from the left to the right, each on those that it would cover."""
    columns: dict[int, int] = {}
    for run in runs:
        column = round(x(float(run.cost_usd)) / (2 * _DOT_PX))
        columns[column] = columns.get(column, 0) + 1
    step = min(2 * _DOT_PX, (_ROW_PX - 22) / max(1, *columns.values()) if columns else 1.0)
    height: dict[int, int] = {}
    for run in runs:
        column = round(x(float(run.cost_usd)) / (2 * _DOT_PX))
        above = height.get(column, 0)
        height[column] = above + 1
        is_done = run.finished_s is not None and not run.is_late
        end = "in time" if is_done else run.stopped or "not finished in time"
        hint = f"start at {run.start_s / 3600:.1f} h of the market: ${run.cost_usd:.2f}, {end}"
        place = (column * 2 * _DOT_PX, base - above * step)
        canvas.dot(*place, _DOT_PX - 0.4, f"{kind} run" if is_done else f"{kind} run hollow", hint)


def _description(outcomes: dict[str, Sequence[Outcome]]) -> str:
    parts = []
    for policy, runs in outcomes.items():
        costs: list[Decimal] = sorted(run.cost_usd for run in runs)
        low, middle, high = (quantile(costs, share) for share in (0.1, 0.5, 0.9))
        parts.append(f"{policy}: median ${middle:.2f}, most from ${low:.2f} to ${high:.2f}")
    return "; ".join(parts)
