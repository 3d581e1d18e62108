"""Events as sentences, for task logs and terminals."""

from __future__ import annotations

from spotfirst import events as e
from spotfirst.state import RunState

__all__ = ["NOT_NEEDED", "describe"]

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
_EXPLAINED = {"handed_over", "interrupted", "lost", "unfit"}
"""Ends whose message says more than the cause does."""


def describe(event: e.Event, state: RunState) -> str:
    """One line for people, or nothing for events that only machines care about."""
    if isinstance(event, e.Waiting):
        return f"waiting: {event.reason}"
    if isinstance(event, e.Launching):
        return f"attempt {event.attempt}: launching {event.market}, {event.pool} ({event.reason})"
    if isinstance(event, e.Launched):
        return f"attempt {event.attempt}: running as {event.instance_id} at ${event.price_usd_h}/h"
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
        if event.cause in _EXPLAINED and event.message:
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
        return f"succeeded with attempt {event.attempt} at step {event.step}"
    if isinstance(event, e.Failed):
        return f"failed: {event.message}"
    if isinstance(event, e.Reopened):
        resumed = state.checkpoint_step
        return f"goes on from its newest checkpoint (step {resumed or 0})"
    return ""
