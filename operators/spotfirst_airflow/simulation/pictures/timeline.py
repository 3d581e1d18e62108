"""One run from its beginning to its end: where it was, what there was, how far it came."""

from __future__ import annotations

from spotfirst.market import Market
from spotfirst_airflow.simulation.pictures.svg import Canvas, Scale, text_width
from spotfirst_airflow.simulation.task import Played, Task
from spotfirst_airflow.simulation.world import World

__all__ = ["draw_timeline"]

_ROW_PX = 34.0
_PROGRESS_PX = 90.0


def draw_timeline(
    played: Played,
    world: World,
    task: Task,
    *,
    start_s: float,
    deadline_s: float | None,
    width: float,
    title: str,
) -> str:
    """A row for each pool, grey where it had spot; bars are instances; below, the work done."""
    names = [str(place.pool) for place in world.places]
    is_narrow = width < 600
    left = 14.0 if is_narrow else max(map(text_width, names)) + 18
    row_px = _ROW_PX + (14 if is_narrow else 0)
    ends_s = [played.finished_s or 0.0, deadline_s or 0.0, _last_s(played)]
    x = Scale(0.0, max(ends_s) / 3600, left, width - 14)
    rows_end = len(names) * row_px + 6
    bottom = rows_end + _PROGRESS_PX + 14
    canvas = Canvas(width, bottom + 40, title=title, description=_description(played))
    x.axis_below(canvas, bottom, top=4, write=lambda hour: f"{hour:g} h")
    for number, place in enumerate(world.places):
        base = number * row_px + (18 if is_narrow else 4)
        if is_narrow:
            canvas.text(left, base - 8, names[number], "soft")
        else:
            canvas.text(left - 10, base + 12, names[number], "soft", anchor="end")
        time_s, end_s = 0.0, max(ends_s)
        while time_s < end_s:
            there, price = place.at(start_s + time_s)
            until_s = place.next_change(
                start_s + time_s, until_s=start_s + end_s, price_only=False
            ) - start_s  # fmt: skip
            if there:
                hint = f"spot in {names[number]} at ${price}/h"
                canvas.box(
                    x(time_s / 3600),
                    base,
                    x(until_s / 3600) - x(time_s / 3600),
                    24,
                    "there",
                    hint=hint,
                )
            time_s = max(until_s, time_s + 1.0)
        for attempt in played.state.attempts:
            if attempt.pool != place.pool or not attempt.launched or not attempt.ended:
                continue
            begin = (attempt.launched.started_at - played.started_at).total_seconds() / 3600
            end = (attempt.ended.ended_at - played.started_at).total_seconds() / 3600
            kind = "spot" if attempt.market is Market.SPOT else "on-demand"
            cause = attempt.ended.cause.replace("_", " ")
            hint = (
                f"attempt {attempt.number}, {attempt.market}, {begin:.1f} to {end:.1f} h at "
                f"${attempt.launched.price_usd_h}/h, {cause}: {attempt.reason}"
            )
            canvas.box(x(begin), base + 4, max(2.0, x(end) - x(begin)), 16, kind, hint=hint)
            if attempt.ended.cause == "interrupted":
                canvas.box(x(end) - 1.5, base, 3, 24, "lost", hint=f"interrupted at {end:.1f} h")
    _draw_progress(canvas, played, task, x, top=rows_end + 10, bottom=bottom)
    if deadline_s is not None:
        canvas.line([(x(deadline_s / 3600), 0), (x(deadline_s / 3600), bottom)], "deadline")
    return canvas.svg()


def _draw_progress(
    canvas: Canvas, played: Played, task: Task, x: Scale, *, top: float, bottom: float
) -> None:
    """Work done against time, and the straight way to the deadline's corner."""
    y = Scale(0.0, task.work_s, bottom, top)
    points = [(x(0.0), y(0.0))]
    for attempt in played.state.attempts:
        ended = attempt.ended
        if not attempt.launched or ended is None or ended.start_step is None or ended.step is None:
            continue
        end_s = (ended.ended_at - played.started_at).total_seconds()
        begin_s = end_s - ended.training_s
        points += [(x(begin_s / 3600), y(ended.start_step)), (x(end_s / 3600), y(ended.step))]
    if played.finished_s is not None:
        points.append((x(played.finished_s / 3600), y(task.work_s)))
    canvas.line(points, "progress")
    canvas.text(x(0.0) + 4, top + 4, "work done", "soft")


def _last_s(played: Played) -> float:
    ends = [a.ended.ended_at for a in played.state.attempts if a.ended]
    return max(((end - played.started_at).total_seconds() for end in ends), default=3600.0)


def _description(played: Played) -> str:
    parts = []
    for attempt in played.state.attempts:
        if attempt.launched and attempt.ended:
            begin = (attempt.launched.started_at - played.started_at).total_seconds() / 3600
            end = (attempt.ended.ended_at - played.started_at).total_seconds() / 3600
            parts.append(f"{begin:.1f} to {end:.1f} h {attempt.market} in {attempt.pool}")
    return "; ".join(parts) or "nothing was launched"
