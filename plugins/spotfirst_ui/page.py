"""The page of a run as HTML. Everything that comes from a run is escaped, without exception."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from html import escape

from spotfirst.state import Attempt, Phase
from spotfirst_airflow.costs import Charge, usd
from spotfirst_airflow.htmlpages import card, document, table
from spotfirst_airflow.outlook import past_limits
from spotfirst_ui.view import RunView

__all__ = ["render_message", "render_run"]

_REFRESH_S = 4
_SIMULATED = "simulated"
_STYLE = """
.succeeded { color: var(--good); } .failed, .stopped { color: var(--bad); }
.active, .stopping { color: var(--busy); }
"""
_ENDS = {
    "completed": "completed",
    "script_failed": "failed",
    "interrupted": "interrupted",
    "handed_over": "handed over",
    "killed": "killed",
    "lost": "lost",
    "max_life": "end of life",
    "unfit": "could not begin",
}


def render_message(title: str, text: str, *, refresh_s: int | None = None) -> str:
    """A page that says one thing."""
    body = f"<h1>{escape(title)}</h1><p>{escape(text)}</p>"
    return document(title, body, style=_STYLE, refresh_s=refresh_s)


def render_run(title: str, view: RunView) -> str:
    """The whole page; it loads itself again while the run is not final."""
    state = view.state
    busy = not state.is_final or bool(state.open_attempts)
    body = "".join(
        (
            _heading(title, view),
            f"<p class=soft>{escape(view.spec.run_id)} · {escape(view.url)}</p>",
            _problem(view),
            _figures(view),
            "<h2>Attempts</h2>",
            _attempts(view),
            "<h2>Checkpoints</h2>",
            _checkpoints(view),
            _warnings(view),
            "<h2>Output</h2>",
            _output(view),
        )
    )
    return document(title, body, style=_STYLE, refresh_s=_REFRESH_S if busy else None)


def _heading(title: str, view: RunView) -> str:
    phase = f'<span class="{escape(view.state.phase.value)}">{escape(_phase(view))}</span>'
    return f"<h1>{escape(title)} · {phase}</h1>"


def _phase(view: RunView) -> str:
    if view.state.phase is Phase.ACTIVE:
        if not view.state.open_attempts:
            return "waiting"
        if view.heartbeat is not None:
            return view.heartbeat.phase
        return "launching"
    return str(view.state.phase)


def _problem(view: RunView) -> str:
    state, texts = view.state, []
    if state.failure is not None:
        texts.append(state.failure.message)
    elif state.stop is not None:
        texts.append(state.stop.reason)
    elif state.waiting is not None and not state.open_attempts:
        texts.append(f"waiting: {state.waiting.reason}")
    texts += past_limits(view.spec, state, now=view.now)
    return "".join(f"<p><strong>{escape(text)}</strong></p>" for text in texts)


def _figures(view: RunView) -> str:
    progress = view.heartbeat.progress if view.heartbeat else None
    step = view.state.result.step if view.state.result else progress.step if progress else None
    total = progress.total_steps if progress else None
    metrics = (
        view.state.result.metrics if view.state.result else progress.metrics if progress else {}
    )
    simulated = view.bill.is_simulated
    budget, egress_usd = view.spec.budget_usd, view.bill.egress_usd
    of_budget = f"of {usd(budget)}" if budget is not None else ""
    crossed = f"{usd(egress_usd)} between regions" if egress_usd else ""
    lost = "" if view.bill.lost_steps is None else f"{view.bill.lost_steps} steps lost"
    cards = [
        ("Step", f"{step if step is not None else '-'}", f"of {total}" if total else ""),
        (
            "Cost",
            usd(view.bill.total_usd if view.bill.charges else None),
            ", ".join(filter(None, (_SIMULATED if simulated else "", of_budget, crossed))),
        ),
        (
            "On demand",
            usd(view.bill.known_on_demand_usd),
            view.bill.saving_in_words,
        ),
        ("Attempts", str(len(view.bill.charges)), lost),
    ]
    if view.spec.deadline is not None:
        left = view.spec.deadline - view.now
        note = f"in {_duration(left)}" if left > timedelta(0) and not view.state.is_final else ""
        cards.append(("Deadline", _time(view.spec.deadline), note))
    cards += [(name, f"{value:.4g}", "") for name, value in sorted(metrics.items())[:6]]
    return "<dl>" + "".join(card(*each) for each in cards) + "</dl>"


def _attempts(view: RunView) -> str:
    charges = {charge.attempt: charge for charge in view.bill.charges}
    cost = "Simulated cost" if view.bill.is_simulated else "Cost"
    head = ("#", "Market", "Pool", "Started", "Ran", "Steps", cost, "Notice", "End", "Why")
    rows = [_attempt(a, charges.get(a.number), view.now) for a in view.state.attempts]
    return table(head, rows) if rows else "<p class=soft>None yet.</p>"


def _attempt(attempt: Attempt, charge: Charge | None, now: datetime) -> Sequence[str]:
    ended, launched = attempt.ended, attempt.launched
    ran = "-"
    if launched is not None:
        ran = _duration((ended.ended_at if ended else now) - launched.started_at)
    if attempt.not_launched is not None and launched is None:
        end = f"not launched: {attempt.not_launched.message}"
    else:
        end = _ENDS.get(ended.cause, ended.cause) if ended else "-"
        if attempt.not_launched is not None:
            end += " (launched after it was given up)"
    steps = f"{ended.start_step or 0} → {ended.step}" if ended and ended.step is not None else "-"
    cost = "-"
    if charge is not None:
        cost = f"{usd(charge.cost_usd + charge.egress_usd)}{' …' if charge.is_estimate else ''}"
    notice = attempt.notice
    return (
        str(attempt.number),
        str(attempt.market),
        str(attempt.pool),
        _time(launched.started_at) if launched else "-",
        ran,
        steps,
        cost,
        f"{notice.kind} {_time(notice.seen_at)}" if notice else "-",
        end,
        attempt.reason,
    )


def _checkpoints(view: RunView) -> str:
    head = ("Step", "Attempt", "Time", "Size", "New bytes", "Metrics")
    rows = [
        (
            str(commit.step),
            str(commit.attempt),
            _time(commit.at),
            _size(commit.size_bytes),
            _size(commit.new_bytes),
            ", ".join(f"{name} {value:.4g}" for name, value in sorted(commit.metrics.items())),
        )
        for _, commit in reversed(view.commits)
    ]
    return table(head, rows) if rows else "<p class=soft>None yet.</p>"


def _warnings(view: RunView) -> str:
    texts = [*view.state.warnings[-10:], *view.problems]
    if not texts:
        return ""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f"<h2>Warnings</h2><ul>{items}</ul>"


def _output(view: RunView) -> str:
    if not view.output:
        return "<p class=soft>None yet.</p>"
    return f"<pre>{escape(chr(10).join(view.output))}</pre>"


def _time(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S}"


def _duration(span: timedelta) -> str:
    seconds = max(0, int(span.total_seconds()))
    hours, rest = divmod(seconds, 3600)
    if hours:
        return f"{hours} h {rest // 60} min"
    return f"{rest // 60} min {rest % 60} s" if rest >= 60 else f"{rest} s"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
