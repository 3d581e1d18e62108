from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from spotfirst.channel import Channel
from spotfirst.reporting import ProgressReporter


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def _reporter(folder: Path) -> tuple[ProgressReporter, Channel, Clock]:
    channel, clock = Channel(folder), Clock()
    return ProgressReporter(channel, monotonic=clock), channel, clock


def _step(channel: Channel) -> int | None:
    progress = channel.progress()
    assert progress is not None
    return progress.step


def test_steps_are_told_at_most_ten_times_a_second(tmp_path: Path) -> None:
    reporter, channel, clock = _reporter(tmp_path)
    told = set()
    for step in range(1000):
        clock.now_s = step / 1000
        reporter.tell(now=False, step=step)
        told.add(_step(channel))
    assert 9 <= len(told) <= 11


def test_what_matters_is_told_at_once_with_all_that_was_held_back(tmp_path: Path) -> None:
    reporter, channel, _ = _reporter(tmp_path)
    reporter.tell(now=False, step=1)
    reporter.tell(now=False, step=2)
    assert _step(channel) == 1
    reporter.stamp("drained", phase="draining")
    progress = channel.progress()
    assert progress is not None
    assert (progress.step, progress.phase) == (2, "draining")
    assert progress.timings.drained is not None


EXITS = """
import sys
from pathlib import Path
from spotfirst.channel import Channel
from spotfirst.reporting import ProgressReporter

reporter = ProgressReporter(Channel(Path(sys.argv[1])), monotonic=lambda: 0.0)
reporter.tell(step=1)
reporter.step_done = 7
"""


def test_the_last_step_is_told_when_the_script_exits(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", EXITS, str(tmp_path)], check=True)
    assert _step(Channel(tmp_path)) == 7


def test_a_warning_is_given_once(tmp_path: Path) -> None:
    reporter, channel, _ = _reporter(tmp_path)
    for step in range(3):
        reporter.warn(f"metric loss is bad at {step}", key="metric loss is")
    progress = channel.progress()
    assert progress is not None
    assert progress.warnings == ("metric loss is bad at 0",)


def test_a_metric_is_read_when_it_is_told_and_keeps_no_graph(tmp_path: Path) -> None:
    reporter, _, _ = _reporter(tmp_path)
    loss = torch.ones(1, requires_grad=True) * 2
    reporter.measure({"loss": loss, "steps": 3})
    assert reporter._metrics["loss"].grad_fn is None
    assert reporter.metrics() == {"loss": 2.0, "steps": 3.0}
