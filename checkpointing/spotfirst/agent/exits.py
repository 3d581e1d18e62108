"""How an attempt ended, from what the agent saw and did. Pure, and never from a code alone.

*Completed* means that the work is done. A script that was asked to stop while steps remain was
interrupted, whatever code it leaves with: scripts, torch, shells and ``torchrun`` turn the same
request into 0, 1, 143 or a signal. A mistake in this direction costs a start on another instance,
where a script with a fault of its own fails again, unasked. A mistake in the other direction ends
a run half trained.

A script that nobody asked, and that leaves its loop early with 0, has stopped by its own decision
(early stopping). That is a success if the last step it told is in a checkpoint.
"""

from __future__ import annotations

import signal
from typing import Literal

from spotfirst.events import EndCause
from spotfirst.heartbeat import Progress
from spotfirst.wire import Record

__all__ = ["Ending", "StopReason", "classify", "is_finished"]

StopReason = Literal["interruption", "handover", "max_life", "deadline", "budget"]

_SENT = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT}
"""What people, service managers and memory watchers send to a process that should be gone."""


class Ending(Record):
    """``code`` follows :class:`subprocess.Popen` (-N is signal N); ``None``: never started.

    ``asked`` is what *we* asked a stop for, through the channel. ``terminated`` and ``killed`` say
    that *we* sent SIGTERM or SIGKILL before it was gone; ``interruption`` that the instance has a
    notice; ``shutdown`` that the agent itself was told to end, which the operating system says to
    all; ``superseded`` that a newer attempt took the checkpoint chain from this one.
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
    if code == 0 and is_finished(progress):
        return "completed", ""
    if ending.superseded:
        return stopped, "a newer attempt has taken over the checkpoints"
    if code is None:
        return stopped, _why(ending) or "it stopped before the command was started"
    if _may_be_of_a_request(ending):
        return stopped, "; ".join(text for text in (_why(ending), _how_it_left(ending)) if text)
    if code == 0:
        return ("completed", "") if _is_saved(progress) else ("script_failed", _unsaved(progress))
    return ("killed" if _signal(code) in _SENT else "script_failed"), _describe(code)


def is_finished(progress: Progress) -> bool:
    """Whether all steps are done and their checkpoint is complete.

    Without numbers it is not known. A loop that was left for a drain did not get to what follows
    it in the script.
    """
    total, saved = progress.total_steps, progress.checkpoint_step
    return (
        total is not None and saved is not None and saved >= total and progress.phase != "draining"
    )


def _stop_cause(ending: Ending) -> EndCause:
    if ending.asked == "max_life":
        return "max_life"
    # Whoever asked first: the fleet takes this instance back.
    return "interrupted" if ending.interruption or ending.shutdown else "handed_over"


def _may_be_of_a_request(ending: Ending) -> bool:
    """Whether the script may have left because it was asked to, by anyone."""
    if ending.interruption or ending.shutdown or ending.terminated or ending.killed:
        return True
    if ending.asked is None:
        return False
    if ending.code != 0:
        return True
    # Through the channel, which only a Checkpointer hears. It says that it is draining, and a
    # script without one can have ended for no reason but its own.
    progress = ending.progress
    if progress.phase == "draining" or progress.released:
        return True
    return progress.total_steps is not None or not _is_saved(progress)


def _is_saved(progress: Progress) -> bool:
    """Whether the last step that was told is in a checkpoint; true where no steps are told."""
    step, saved = progress.step, progress.checkpoint_step
    if step is None or (saved is not None and saved >= step):
        return True
    return progress.total_steps is None and step <= (progress.start_step or 0)


def _why(ending: Ending) -> str:
    """Which limit ended it, where no one has to look for another reason."""
    if ending.asked == "deadline":
        return "it stopped by itself: the run's deadline has passed"
    if ending.asked == "budget":
        return "it stopped by itself: the run's budget is used up"
    return ""


def _how_it_left(ending: Ending) -> str:
    """What people should know of a stop that was not an orderly one."""
    progress, code = ending.progress, ending.code
    assert code is not None
    if progress.released or (ending.terminated and not ending.killed):
        return ""
    if ending.killed and code == -signal.SIGKILL:
        return "the command did not stop in time and was killed"
    if code == 0:
        return "it stopped as asked, but did not release its checkpoints"
    return f"it was asked to stop, and before its last checkpoint {_describe(code)}"


def _unsaved(progress: Progress) -> str:
    of = f" of {progress.total_steps}" if progress.total_steps is not None else ""
    kept = (
        "there is no checkpoint"
        if progress.checkpoint_step is None
        else f"the newest checkpoint is of step {progress.checkpoint_step}"
    )
    return (
        f"the command exited with 0 after step {progress.step}{of}, and {kept}: call "
        "checkpointer.close() when a script leaves its loop early on purpose"
    )


def _signal(code: int) -> signal.Signals | None:
    """The signal behind a code, also in the form that shells give it; ``None`` for other codes."""
    try:
        return signal.Signals(-code if code < 0 else code - 128)
    except ValueError:
        return None


def _describe(code: int) -> str:
    sent = _signal(code)
    memory = (
        ": most often the system ran out of memory. Look at its memory use, or choose a larger "
        "instance type"
        if sent == signal.SIGKILL
        else ""
    )
    if code < 0:
        name = sent.name if sent else f"signal {-code}"
        return f"the command was ended by {name}, not sent by Spotfirst{memory}"
    hint = f" (what a shell says when a program ended by {sent.name}{memory})" if sent else ""
    return f"the command exited with code {code}{hint}; its last lines are in the log tail"
