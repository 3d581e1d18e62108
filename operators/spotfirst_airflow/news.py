"""Events as sentences, for task logs and terminals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from spotfirst import events as e
from spotfirst.heartbeat import Heartbeat
from spotfirst.spec import RunSpec
from spotfirst.state import RunState
from spotfirst_airflow.costs import is_simulated, usd

__all__ = ["NOT_NEEDED", "describe", "is_bad", "progress_line", "script_error"]

NOT_NEEDED = "no longer needed"
"""How the reason begins for which an attempt is ended without being asked for a checkpoint."""

_ENDINGS = {
    "completed": "completed",
    "script_failed": "failed: its command exited with {code}",
    "interrupted": "was interrupted",
    "handed_over": "handed over",
    "killed": "was killed by a signal, code {code} (out of memory?)",
    "lost": "was lost: its instance or agent is gone",
    "max_life": "ended itself at its maximum life",
    "unfit": "could not begin",
}
_BAD_ENDS = {"script_failed", "killed", "lost", "unfit"}
_EXPLAINED = {"handed_over", "interrupted", "lost", "unfit"}
"""Ends whose message says more than the cause does."""


_ERROR = re.compile(
    r"(?i)^\S*(error|exception|interrupt|exit)\b.*|.*\b(error|fatal|failed|cannot)\b.*"
)
_LONGEST_ERROR = 300


def script_error(log_tail: Sequence[str], state: RunState | None = None) -> str:
    """The script's own error among its last lines; empty when there is none.

    After a traceback that is its last line, which is not indented. Otherwise it is the last line
    that speaks of an error, or else the last line; a script that a signal ended says nothing in it.
    """
    lines = [line.rstrip() for line in log_tail if line.strip()]
    begins = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent")]
    after = lines[begins[-1] + 1 :] if begins else []
    found = next((line for line in after if not line.startswith((" ", "\t"))), "")
    if not found:
        found = next((line for line in reversed(lines) if _ERROR.match(line)), "")
    if not found and lines and not _ended_by_signal(state):
        found = lines[-1]
    text = found.strip()
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}…"


def _ended_by_signal(state: RunState | None) -> bool:
    ends = [a.ended for a in state.attempts if a.ended] if state is not None else []
    return bool(ends) and (ends[-1].exit_code or 0) < 0


def is_bad(event: e.Event) -> Literal["", "warning", "error"]:
    """How bad the news is, for the level of a log line."""
    if isinstance(event, e.Failed):
        return "error"
    if isinstance(event, e.Ended) and event.cause in _BAD_ENDS:
        return "warning"
    return "warning" if isinstance(event, (e.Warned, e.NotLaunched)) else ""


def progress_line(
    spec: RunSpec, state: RunState, beat: Heartbeat | None, *, cost: str, now: datetime
) -> str:
    """Where a run stands, in one line: step, loss, cost, and the time to the deadline."""
    progress = beat.progress if beat else None
    words = []
    if progress is not None and progress.step is not None:
        noun = "checkpoint" if spec.checkpoint_mode == "files" else "step"
        total = f"/{progress.total_steps}" if progress.total_steps else ""
        words.append(f"{noun} {progress.step}{total}")
    if progress is not None and "loss" in progress.metrics:
        words.append(f"loss {progress.metrics['loss']:.4g}")
    attempt = state.attempt(beat.attempt) if beat else None
    if attempt is not None:
        words.append(f"attempt {attempt.number} on {attempt.market}, {attempt.pool}")
    elif state.waiting is not None:
        words.append(f"waiting: {state.waiting.reason}")
    else:
        words.append("no instance trains now")
    of_budget = f" of {usd(spec.budget_usd)}" if spec.budget_usd is not None else ""
    words.append(f"cost {cost}{of_budget}")
    if spec.deadline is not None:
        minutes = int((spec.deadline - now).total_seconds() // 60)
        left = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
        words.append(f"{left} to the deadline" if minutes >= 0 else "past the deadline")
    return " · ".join(words)


def describe(event: e.Event, state: RunState) -> str:
    """One line for people, or nothing for events that only machines care about."""
    if isinstance(event, e.Waiting):
        return f"waiting: {event.reason}"
    if isinstance(event, e.Launching):
        return f"attempt {event.attempt}: launching {event.market}, {event.pool} ({event.reason})"
    if isinstance(event, e.Launched):
        price = f"${event.price_usd_h}/h{' simulated' if is_simulated(event.price_source) else ''}"
        return f"attempt {event.attempt}: running as {event.instance_id} at {price}"
    if isinstance(event, e.NotLaunched):
        return f"attempt {event.attempt}: not launched ({event.cause}): {event.message}"
    if isinstance(event, e.Noticed):
        when = f", instance goes at {event.notice.time:%H:%M:%S}" if event.notice.time else ""
        return f"attempt {event.attempt}: {event.notice.kind} notice{when}"
    if isinstance(event, e.HandoverRequested):
        if event.reason.startswith(NOT_NEEDED):
            return f"attempt {event.attempt}: {event.reason}"
        return f"attempt {event.attempt}: asked to checkpoint and stop ({event.reason})"
    if isinstance(event, e.Ended):
        ending = _ENDINGS.get(event.cause, event.cause).format(code=event.exit_code)
        if event.cause == "script_failed" and event.exit_code is None:
            ending = f"failed: {event.message or 'its command could not be started'}"
        if event.cause == "lost" and event.message:
            ending = f"was lost: {event.message}"
        elif event.cause in _EXPLAINED and event.message:
            ending += f" ({event.message})"
        steps = f", at step {event.step}" if event.step is not None else ""
        kept = (
            f", checkpoint at {event.checkpoint_step}" if event.checkpoint_step is not None else ""
        )
        return f"attempt {event.attempt}: {ending}{steps}{kept}"
    if isinstance(event, e.Warned):
        return f"WARNING: {event.message}"
    if isinstance(event, e.StopRequested):
        return f"stopping: {event.reason}"
    if isinstance(event, e.Stopped):
        return f"stopped: {event.reason}"
    if isinstance(event, e.Succeeded):
        steps = f" at step {event.step}" if event.step is not None else ""
        return f"succeeded with attempt {event.attempt}{steps}"
    if isinstance(event, e.Failed):
        own = script_error(event.log_tail, state)
        return f"failed: {own} ({event.message})" if own else f"failed: {event.message}"
    if isinstance(event, e.Reopened):
        resumed = state.checkpoint_step
        return f"goes on from its newest checkpoint (step {resumed or 0})"
    return ""
