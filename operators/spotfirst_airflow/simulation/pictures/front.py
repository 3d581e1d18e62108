"""What a later deadline saves: mean cost against deadline, with the cheapest that is in time."""

from __future__ import annotations

from collections.abc import Sequence

from spotfirst_airflow.simulation.backtest import Row
from spotfirst_airflow.simulation.pictures.svg import Canvas, Scale, apart, text_width

__all__ = ["draw_front", "front"]

_LABEL_PX = 18.0


def front(rows: Sequence[Row]) -> list[Row]:
    """The Pareto front: always in time, and none with as near a deadline is cheaper."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.deadline_s or 0.0, row.mean_usd)):
        if row.in_time == row.runs and (not found or row.mean_usd < found[-1].mean_usd):
            found.append(row)
    return found


def draw_front(rows: Sequence[Row], kinds: dict[str, str], *, width: float) -> str:
    """A line for each policy, its name at its end; ``kinds`` are the classes of policies.

    What missed a deadline is hollow; what is on the front has a ring.
    """
    best = front(rows)
    height = 380.0 if width > 600 else 340.0
    costs = [float(row.mean_usd) for row in rows]
    hours = sorted({(row.deadline_s or 0.0) / 3600 for row in rows})
    ends = {row.policy: row for row in rows if (row.deadline_s or 0.0) / 3600 == hours[-1]}
    labels = {policy: f"{policy} ${row.mean_usd:.2f}" for policy, row in ends.items()}
    left = 52.0
    right = width - max(map(text_width, labels.values())) - 26
    top, bottom = 14.0, height - 44
    span = max(costs) - min(costs) or max(costs) or 1.0
    y = Scale(max(0.0, min(costs) - 0.1 * span), max(costs) + 0.05 * span, bottom, top)
    around = (hours[-1] - hours[0]) * 0.04 or 1.0
    x = Scale(hours[0] - around, hours[-1] + around, left, right)
    canvas = Canvas(width, height, title="Cost against deadline", description=_description(best))
    y.axis_left(canvas, left, right=right, write=lambda usd: f"${usd:g}")
    x.axis_below(canvas, bottom, top=top, write=lambda hour: f"{hour:g} h")
    canvas.text((left + right) / 2, height - 10, "deadline", "soft", anchor="middle")
    if len(best) > 1:
        canvas.line(
            [(x((row.deadline_s or 0) / 3600), y(float(row.mean_usd))) for row in best], "front"
        )
    for policy, kind in kinds.items():
        own = sorted((r for r in rows if r.policy == policy), key=lambda r: r.deadline_s or 0.0)
        places = [(x((row.deadline_s or 0) / 3600), y(float(row.mean_usd))) for row in own]
        canvas.line(places, kind)
        for row, place in zip(own, places, strict=True):
            missed = row.runs - row.in_time
            hint = (
                f"{policy}, {(row.deadline_s or 0) / 3600:g} h: ${row.mean_usd:.2f}, "
                f"{row.share_of_on_demand:.0%} of on demand, "
                f"{f'{missed} of {row.runs} missed' if missed else 'always in time'}"
            )
            if row in best:
                canvas.dot(*place, 8, "ring")
            canvas.dot(*place, 4.5, f"{kind} hollow" if missed else kind, hint)
    wanted = [y(float(ends[policy].mean_usd)) for policy in labels]
    for (policy, label), own_y, label_y in zip(
        labels.items(), wanted, apart(wanted, by=_LABEL_PX, low=top, high=bottom), strict=True
    ):
        end_x = x(hours[-1])
        canvas.line([(end_x + 9, own_y), (right + 4, label_y), (right + 12, label_y)], "lead")
        canvas.text(right + 16, label_y, label, f"{kinds[policy]} label")
    return canvas.svg()


def _description(best: Sequence[Row]) -> str:
    parts = [
        f"{(row.deadline_s or 0) / 3600:g} h: {row.policy}, ${row.mean_usd:.2f}" for row in best
    ]
    return f"The cheapest that was always in time: {'; '.join(parts) or 'none'}"
