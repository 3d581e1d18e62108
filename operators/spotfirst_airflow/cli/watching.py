"""What is new about a run, read from its files alone: whoever looks after it, anyone may watch."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal

from spotfirst import events as e
from spotfirst.heartbeat import Heartbeat
from spotfirst.run import Run
from spotfirst.spec import RunSpec
from spotfirst.state import Attempt, RunState
from spotfirst.wire import Clock, Record, utc_now
from spotfirst_airflow.costs import bill
from spotfirst_airflow.logs import LogFollower
from spotfirst_airflow.news import describe

__all__ = ["Glance", "News", "Watcher"]


class News(Record):
    """One event as a line for people."""

    event: e.Event
    text: str


class Glance(Record):
    """One look at a run: where it stands, and what is new since the look before.

    ``beat`` is of the attempt that trains; ``coming`` is a replacement that starts up meanwhile.
    """

    state: RunState
    spec: RunSpec
    at: datetime
    cost_usd: Decimal
    is_simulated: bool = False
    news: tuple[News, ...] = ()
    lines: tuple[tuple[int, str], ...] = ()
    beat: Heartbeat | None = None
    coming: Heartbeat | None = None

    @property
    def is_over(self) -> bool:
        """Whether the run is final and every instance is gone."""
        return self.state.is_final and not self.state.open_attempts

    @property
    def current(self) -> Attempt | None:
        """The attempt that the beat is of, or else the newest."""
        if self.beat is not None:
            return self.state.attempt(self.beat.attempt)
        return self.state.attempts[-1] if self.state.attempts else None


class Watcher:
    """Reads one run's journal, heartbeats and output. Writes nothing. Not thread-safe.

    ``from_now`` leaves out the events and output that are there already.
    """

    def __init__(
        self, run: Run, *, output: bool = True, from_now: bool = False, clock: Clock = utc_now
    ) -> None:
        self.run = run
        self._clock = clock
        self._spec: RunSpec | None = None
        self._journal = run.journal()
        self._output = LogFollower(run) if output else None
        self._told = 0
        self._reopened = 0
        if from_now:
            state = self._journal.refresh()
            self._told = len(self._journal.events)
            if self._output is not None:
                self._output.skip_to_end(len(state.attempts))

    def look(self) -> Glance:
        """What is new. Raises what the storage raises: look again later, nothing is left out."""
        state = self._journal.refresh()
        beats = {a.number: b for a in state.open_attempts if (b := self.run.heartbeat(a.number))}
        # Before the output, so that a run that is over has shipped all there will be.
        is_over = state.is_final and not state.open_attempts
        lines: list[tuple[int, str]] = []
        if self._output is not None:
            lines = self._output.newest_lines(len(state.attempts), is_last=is_over)
        now = self._clock()
        account = bill(state, now=now)
        return Glance(
            state=state,
            spec=self._current_spec(state),
            at=now,
            cost_usd=account.total_usd,
            is_simulated=account.is_simulated,
            news=self._news(),
            lines=tuple(lines),
            beat=_trainer(beats),
            coming=_coming(beats),
        )

    def _current_spec(self, state: RunState) -> RunSpec:
        """Read again when the run was reopened: it may have other limits since."""
        amendment = state.reopened.amendment if state.reopened else 0
        if self._spec is None or amendment != self._reopened:
            self._spec = self.run.spec()
            self._reopened = amendment
        return self._spec

    def _news(self) -> tuple[News, ...]:
        fresh = self._journal.events[self._told :]
        self._told = len(self._journal.events)
        state = self._journal.state
        return tuple(News(event=ev, text=text) for ev in fresh if (text := describe(ev, state)))


def _trainer(beats: dict[int, Heartbeat]) -> Heartbeat | None:
    training = [beat for beat in beats.values() if beat.phase in {"training", "draining"}]
    return max(training or beats.values(), key=lambda beat: beat.attempt, default=None)


def _coming(beats: dict[int, Heartbeat]) -> Heartbeat | None:
    """The newest attempt's beat while an older one still trains."""
    trainer = _trainer(beats)
    newest = max(beats.values(), key=lambda beat: beat.attempt, default=None)
    return newest if newest and trainer and newest.attempt > trainer.attempt else None
