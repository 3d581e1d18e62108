"""How much training a checkpoint costs: windows of steps with one, beside windows without.

Steps are counted in windows: one without a checkpoint, one with, one without, and so on. A window
with a checkpoint begins with it and ends when it is durable, and at least as many steps later as
``least``. What it lost is its time less that of as many median steps of its two neighbours.
"""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import psutil

from benchmarks.checkpointing.training import Training
from benchmarks.checkpointing.writers import Writer

__all__ = ["Losses", "Window", "lose", "session_s"]

_LIMIT_STEPS = 200
_SESSION = 10


@dataclass
class Window:
    """Steps, and the checkpoint among them. ``stall_s`` is what blocked the loop."""

    steps: list[float]
    began_s: float = 0.0
    stall_s: float = 0.0
    durable_s: float = 0.0
    lost_s: float = 0.0
    threads_s: float = 0.0
    """Processor time of this process's other threads than torch's and the main one."""

    @property
    def total_s(self) -> float:
        """How long it was."""
        return self.began_s + sum(self.steps)


@dataclass
class Losses:
    """One window per checkpoint. ``noise_s``: what windows without one seem to lose."""

    with_: list[Window]
    without: list[Window]
    noise_s: float = 0.0
    others: float = 0.0
    """Cores that other processes used meanwhile."""

    def summary(self) -> dict[str, float]:
        """Medians over the checkpoints after the first, and the first."""
        first, later = self.with_[0], self.with_[1:] or self.with_
        return {
            "lost_s": round(session_s([w.lost_s for w in self.with_]), 4),
            "first_lost_s": round(first.lost_s, 4),
            "later_lost_s": round(median(w.lost_s for w in later), 4),
            "first_stall_s": round(first.stall_s, 4),
            "stall_s": round(median(w.stall_s for w in later), 4),
            "began_s": round(median(w.began_s for w in later), 4),
            "durable_s": round(median(w.durable_s for w in later), 4),
            "first_durable_s": round(first.durable_s, 4),
            "step_s": round(median(s for w in self.without for s in w.steps), 4),
            "noise_s": round(self.noise_s, 4),
            "threads_s": round(median(w.threads_s for w in later), 4),
            "others": round(self.others, 2),
        }


def session_s(lost_s: Sequence[float]) -> float:
    """Per checkpoint of a session of ten, the first included: (first + 9 x median of the others) / 10.

    A plain mean, but that one disturbed window does not decide.
    """
    first, later = lost_s[0], lost_s[1:] or lost_s
    return (first + (_SESSION - 1) * median(later)) / _SESSION


def lose(training: Training, writer: Writer, *, saves: int, least: int, warm_up: int = 3) -> Losses:
    """Train, and save so many times."""
    for _ in range(warm_up):
        training.step()
    busy, own, start = _busy_s(), _own_s(), time.perf_counter()
    without = [_without(training, writer, least)]
    with_: list[Window] = []
    for _ in range(saves):
        with_.append(_with(training, writer, least))
        without.append(_without(training, writer, max(least, min(len(with_[-1].steps), 2 * least))))
        writer.tidy()
    elapsed = time.perf_counter() - start
    for number, window in enumerate(with_):
        beside = without[number].steps + without[number + 1].steps
        window.lost_s = window.total_s - len(window.steps) * median(beside)
    # What is made ready beside the first steps is part of the first checkpoint's price.
    with_[0].lost_s += max(0.0, without[0].total_s - least * median(without[0].steps))
    nothing = [
        abs(sum(window.steps) - len(window.steps) * median(before.steps + after.steps))
        for before, window, after in zip(without, without[1:], without[2:], strict=False)
    ]
    others = (_busy_s() - busy - (_own_s() - own)) / elapsed
    return Losses(with_, without, median(nothing) if nothing else 0.0, max(0.0, others))


def _without(training: Training, writer: Writer, steps: int) -> Window:
    return Window([_step(training, writer) for _ in range(steps)])


def _step(training: Training, writer: Writer) -> float:
    start = time.perf_counter()
    training.step()
    writer.stepped()
    return time.perf_counter() - start


def _with(training: Training, writer: Writer, least: int) -> Window:
    threads = _Threads()
    start = time.perf_counter()
    writer.begin()
    window = Window([], began_s=time.perf_counter() - start)
    after = 0
    # One step more than it takes: what is cleaned up after the commit counts too.
    while len(window.steps) < least or after < 2:
        window.steps.append(_step(training, writer))
        after += writer.took_s() is not None
        if len(window.steps) > _LIMIT_STEPS:
            msg = f"the checkpoint was not durable after {_LIMIT_STEPS} steps; see the log above"
            raise TimeoutError(msg)
    window.stall_s = window.began_s + writer.waited_s()
    window.durable_s = writer.took_s() or 0.0
    window.threads_s = threads.used_s()
    return window


class _Threads:
    """Processor time of threads that Python started, also of those that end meanwhile.

    That of the process, less that of its main thread and torch's own threads.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        beside = {thread.native_id for thread in threading.enumerate()}
        beside.discard(threading.main_thread().native_id)
        self._training = {t.id for t in self._process.threads()} - beside
        self._start_s = self._now_s()

    def used_s(self) -> float:
        return max(0.0, self._now_s() - self._start_s)

    def _now_s(self) -> float:
        training = [t for t in self._process.threads() if t.id in self._training]
        return _own_s() - sum(t.user_time + t.system_time for t in training)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


def _own_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
