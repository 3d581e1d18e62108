"""How an attempt ended, from what the agent saw and did. Pure, and never from a code alone.

A script may exit with any code for its own reasons, and torch, shells and ``torchrun`` turn
signals into codes. So an end counts as ours only when the agent had asked for it *and* there is
proof that the request is what ended the script; whatever else is not 0 is the script's own.
"""

from __future__ import annotations

import signal
from typing import Literal

from spotfirst.events import EndCause
from spotfirst.heartbeat import Progress
from spotfirst.wire import Record

__all__ = ["Ending", "StopReason", "classify"]

StopReason = Literal["interruption", "handover", "max_life"]


class Ending(Record):
    """``code`` follows :class:`subprocess.Popen` (-N is signal N); ``None``: never started.

    ``terminated`` and ``killed`` say that *we* sent SIGTERM or SIGKILL before it was gone;
    ``shutdown`` that the agent itself was told to end, which the operating system says to all;
    ``superseded`` that a newer attempt took the checkpoint chain from this one.
    """

    code: int | None
    progress: Progress = Progress()
    asked: StopReason | None = None
    interruption: bool = False
    shutdown: bool = False
    terminated: bool = False
    killed: bool = False
    superseded: bool = False


def classify(ending: Ending) -> tuple[EndCause, str]:
    """The cause, and a sentence for people (empty when the cause says it all)."""
    stopped = _stop_cause(ending)
    progress, code = ending.progress, ending.code
    if code == 0 and _is_finished(progress):
        return "completed", ""
    if ending.superseded:
        return stopped, "a newer attempt has taken over the checkpoints"
    if code is None:
        return stopped, "it stopped before the command was started"
    if ending.asked is not None:
        if progress.released or ending.terminated:
            return stopped, ""
        if code == -signal.SIGKILL and ending.killed:
            return stopped, "the command did not stop in time and was killed"
        if code == 0 and progress.phase == "draining":
            return stopped, "it stopped as asked, but did not release its checkpoints"
    if code == 0:
        return "completed", ""
    if code == -signal.SIGKILL:
        return "killed", (
            "the command was killed (SIGKILL), not by Spotfirst: most often the system ran out "
            "of memory. Look at its memory use, or choose a larger instance type"
        )
    if code == -signal.SIGTERM and ending.shutdown:
        return "interrupted", "the instance was shut down"
    return "script_failed", _describe(code)


def _stop_cause(ending: Ending) -> EndCause:
    if ending.asked == "max_life":
        return "max_life"
    # Whoever asked first: the fleet takes this instance back.
    return "interrupted" if ending.interruption or ending.shutdown else "handed_over"


def _is_finished(progress: Progress) -> bool:
    """Whether all steps are done and their checkpoint is complete.

    Without numbers it is not known, and another attempt is harmless: it finds nothing to do. A
    loop that was left for a drain did not get to what follows it in the script.
    """
    total, saved = progress.total_steps, progress.checkpoint_step
    return (
        total is not None and saved is not None and saved >= total and progress.phase != "draining"
    )


def _describe(code: int) -> str:
    number = -code if code < 0 else code - 128 if code > 128 else 0
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = ""
    if code < 0:
        return f"the command was ended by {name or f'signal {number}'}, not sent by Spotfirst"
    hint = f" (what a shell says when a program ended by {name})" if name else ""
    return f"the command exited with code {code}{hint}; its last lines are in the log tail"
