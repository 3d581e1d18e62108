"""A run in the terminal: what happens as lines, and below them one line of progress.

On something that is no terminal, the progress becomes a plain line now and then.
"""

from __future__ import annotations

from datetime import datetime
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from spotfirst import events as e
from spotfirst.heartbeat import Heartbeat
from spotfirst.market import Market
from spotfirst_airflow.cli._common import duration
from spotfirst_airflow.cli.terminal import indented
from spotfirst_airflow.cli.watching import Glance
from spotfirst_airflow.costs import usd

__all__ = ["Display"]

_PLAIN_EVERY_S = 10.0
_STYLES: tuple[tuple[type[e.Event], str], ...] = (
    (e.Noticed, "bold yellow"),
    (e.Waiting, "yellow"),
    (e.Warned, "yellow"),
    (e.HandoverRequested, "yellow"),
    (e.StopRequested, "yellow"),
    (e.NotLaunched, "red"),
    (e.Failed, "bold red"),
    (e.Succeeded, "bold green"),
    (e.Launched, "green"),
    (e.Launching, "cyan"),
)
_BAD_ENDS = {"script_failed", "killed", "lost", "unfit"}


class Display:
    """Shows one glance after another. A context manager: it takes the line back at its end."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = console
        self._quiet = quiet
        self._live: Live | None = None
        self._spinner = Spinner("dots", style="cyan")
        self._seen: _Seen = _Seen()
        self._plain_at: datetime | None = None
        self._plain_text = ""

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(Text(""), console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str, style: str = "") -> None:
        """One line above the progress line."""
        # As Text: what comes from a script or a message may look like markup.
        self._console.print(Text(indented(text), style=style), soft_wrap=True)

    def stage(self, text: str) -> None:
        """What is going on while there is no run to look at yet."""
        if self._live is not None:
            self._spinner.update(text=Text(f" {text}"))
            self._live.update(self._spinner)
        elif text != self._plain_text:
            self._plain_text = text
            self.say(text)

    def show(self, glance: Glance) -> None:
        """What is new, and where the run stands."""
        if not self._quiet:
            for attempt, line in glance.lines:
                self._console.print(
                    Text.assemble((f"[{attempt}] ", "dim"), (line, "dim")), soft_wrap=True
                )
        for news in glance.news:
            self.say(f"{news.event.at:%H:%M:%S}  {news.text}", _style(news.event))
        self._seen.take(glance)
        if self._live is not None:
            self._live.update(self._progress(glance))
        elif not glance.is_over and self._is_plain_due(glance):
            self.say(f"{glance.at:%H:%M:%S}  {self._words(glance)}")

    # -- the progress line ------------------------------------------------------------------

    def _progress(self, glance: Glance) -> Table:
        grid = Table.grid(padding=(0, 1))
        self._spinner.update(text="")
        bar = ProgressBar(total=self._seen.total or 1, completed=self._seen.step or 0, width=24)
        words = Text(self._words(glance), no_wrap=True, overflow="ellipsis")
        if self._seen.total:
            grid.add_row(self._spinner, bar, words)
        else:
            grid.add_row(self._spinner, words)
        return grid

    def _words(self, glance: Glance) -> str:
        return " · ".join(word for word in self._word_list(glance) if word)

    def _word_list(self, glance: Glance) -> list[str]:
        seen, beat = self._seen, glance.beat
        # The agent cannot know the steps of a script that only writes files.
        noun = "checkpoint" if glance.spec.checkpoint_mode == "files" else "step"
        step = "" if seen.step is None else f"{noun} {seen.step}"
        if step and seen.total:
            step += f"/{seen.total}"
        loss = f"loss {seen.loss:.4f}" if seen.loss is not None else ""
        words = [step, loss, *_where(glance)]
        # Before what a narrow terminal cuts off: this is what is going on just now.
        if beat is not None and beat.notice is not None and beat.notice.time is not None:
            gone_s = (beat.notice.time - glance.at).total_seconds()
            words.append(f"instance goes in {duration(max(0.0, gone_s))}")
        if glance.coming is not None:
            words.append(f"attempt {glance.coming.attempt} {_doing(glance.coming)}")
        words.append(usd(glance.cost_usd, simulated=glance.is_simulated))
        if glance.spec.deadline is not None and not glance.state.is_final:
            left_s = (glance.spec.deadline - glance.at).total_seconds()
            words.append(f"{duration(left_s)} to the deadline")
        return words

    def _is_plain_due(self, glance: Glance) -> bool:
        words = self._words(glance)
        waited_s = (glance.at - self._plain_at).total_seconds() if self._plain_at else 1e9
        if words == self._plain_text or waited_s < _PLAIN_EVERY_S or self._seen.step is None:
            return False
        self._plain_at, self._plain_text = glance.at, words
        return True


class _Seen:
    """The newest progress: kept while no attempt trains."""

    def __init__(self) -> None:
        self.step: int | None = None
        self.total: int | None = None
        self.loss: float | None = None

    def take(self, glance: Glance) -> None:
        if glance.beat is None or glance.beat.progress.step is None:
            return
        progress = glance.beat.progress
        self.step = progress.step
        self.total = progress.total_steps or self.total
        self.loss = progress.metrics.get("loss", self.loss)


def _where(glance: Glance) -> list[str]:
    """Which attempt, on what, doing what."""
    attempt = glance.current
    if glance.state.is_final:
        return [str(glance.state.phase)]
    if attempt is None:
        return ["waiting for an instance"]
    if not attempt.is_open:
        reason = glance.state.waiting.reason if glance.state.waiting else "next instance"
        return [f"waiting: {reason}"]
    market = "spot" if attempt.market is Market.SPOT else "on demand"
    doing = _doing(glance.beat) if glance.beat else "launching"
    pool = f"{attempt.pool.instance_type} {attempt.pool.zone}"
    return [f"attempt {attempt.number} {market} {pool}", "" if doing == "training" else doing]


def _doing(beat: Heartbeat) -> str:
    return {"starting": "starting up", "standby": "standing by"}.get(beat.phase, beat.phase)


def _style(event: e.Event) -> str:
    if isinstance(event, e.Ended):
        if event.cause == "completed":
            return "green"
        return "red" if event.cause in _BAD_ENDS else "magenta"
    return next((style for kind, style in _STYLES if isinstance(event, kind)), "")
