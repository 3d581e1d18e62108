"""What an attempt hears: notices, the request to hand over, and the instance's shutdown."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from spotfirst.agent.notices import NoticeSource
from spotfirst.agent.periodic import Periodic
from spotfirst.agent.settings import Settings
from spotfirst.agent.stopping import Watch
from spotfirst.heartbeat import Handover
from spotfirst.market import Notice
from spotfirst.run import Run
from spotfirst.wire import Clock

__all__ = ["Listener"]

_log = logging.getLogger(__name__)

_HANDOVER_POLL_S = 0.25
_SLOW_HANDOVER_POLL_S = 5.0
_LAST_LOOK_S = 5.0
_SHUTDOWN_S = 1.0
_FAILED_LOOKS = 5
_STUCK_S = 60.0


class Listener:
    """Looks in threads of its own; each field has one writer, and is replaced as a whole."""

    def __init__(
        self,
        run: Run,
        settings: Settings,
        *,
        clock: Clock,
        on_notice: Callable[[], None],
        warn: Callable[[str], object] = _log.warning,
    ) -> None:
        self._run = run
        self._settings = settings
        self._clock = clock
        self._on_notice = on_notice
        self._warn = warn
        self._failed_looks = 0
        self._looking_since: float | None = None
        self.booted = clock()
        self._source = NoticeSource(settings.metadata_url, clock=clock)
        self._notices = Periodic("look for notices", self._look_for_notice)
        self._handovers = Periodic("look for a handover", self._look_for_handover)
        self._notice_poll_s = self._handover_poll_s = 1.0
        self.life_s = settings.max_life_s
        self.deadline: datetime | None = None
        self.budget_ends: Callable[[], datetime | None] = lambda: None
        self.checkpoint_s: Callable[[], float | None] = lambda: None
        self.notice: Notice | None = None
        self.handover: Handover | None = None
        self._handover_at: datetime | None = None
        self.terminated_at: datetime | None = None

    def start(self, *, notice_poll_s: float, handover_poll_s: float) -> None:
        """Begin to look: this often, and for a handover much more often once there is a notice."""
        self._notice_poll_s = notice_poll_s
        self._handover_poll_s = min(handover_poll_s, _SLOW_HANDOVER_POLL_S)
        self._notices.start()
        self._handovers.start()

    def stop(self) -> None:
        """Look no more; a look that is under way may still end."""
        self._notices.stop(0)
        self._handovers.stop(0)

    def terminate(self) -> None:
        """The instance is being shut down. Safe in a signal handler."""
        self.terminated_at = self.terminated_at or self._clock()

    def look_again(self) -> None:
        """After the command has left unasked: had anyone else asked it to?

        A script may look for notices itself, and sooner than we do; and of a shutdown, which the
        system says to all processes, our own signal may come a moment later. Blocks for seconds.
        """
        self._notices.stop(_LAST_LOOK_S)
        self._look_for_notice()
        until = time.monotonic() + _SHUTDOWN_S
        while self.interruption is None and self.terminated_at is None:
            if time.monotonic() > until:
                return
            time.sleep(0.05)

    def put_off_handover(self) -> None:
        """The time for a handover begins now: until now, what is worth waiting for was waited for."""
        self._handover_at = self._clock()

    @property
    def interruption(self) -> Notice | None:
        """The notice, when it is one of an interruption."""
        notice = self.notice
        return notice if notice is not None and notice.kind == "interruption" else None

    def watch(self) -> Watch:
        """All of it, as what decides when to stop."""
        interruption = self.interruption
        return Watch(
            booted=self.booted,
            life_ends=self.booted + timedelta(seconds=self.life_s),
            deadline=self.deadline,
            budget_ends=self.budget_ends(),
            checkpoint_s=self.checkpoint_s(),
            interruption_at=interruption.time if interruption else None,
            interruption_seen=interruption.seen_at if interruption else None,
            terminated_at=self.terminated_at,
            handover_at=self._handover_at,
            patience_s=self._settings.drain_patience_s,
            shutdown_window_s=self._settings.shutdown_window_s,
        )

    def _look_for_notice(self) -> float:
        self._looking_since = time.monotonic()
        found, known = self._source.poll(), self.notice
        self._looking_since = None
        self._judge(self._source.trouble)
        if found is not None and (known is None or _is_news(found, known)):
            when = f" at {found.time:%H:%M:%S}" if found.time else ""
            _log.info("notice: %s%s", found.kind, when)
            self.notice = found
            self._on_notice()
            self._handovers.wake()
        return self._notice_poll_s

    def _judge(self, trouble: str) -> None:
        """Warn, once, when the service has not told for some looks in a row."""
        if not trouble:
            if self._failed_looks >= _FAILED_LOOKS:
                _log.info("the instance's metadata service answers again")
            self._failed_looks = 0
            return
        self._failed_looks += 1
        if self._failed_looks == _FAILED_LOOKS:
            self._warn(
                f"interruption notices cannot be heard: the metadata service at "
                f"{self._settings.metadata_url} did not tell {_FAILED_LOOKS} times in a row; "
                f"{trouble}. An interruption may come unannounced. Enable IMDSv2 on the instance, "
                "with a hop limit of 2 or more where it is asked from a container"
            )

    def _look_for_handover(self) -> float:
        since = self._looking_since
        if since is not None and time.monotonic() - since > _STUCK_S:
            self._failed_looks = _FAILED_LOOKS - 1
            self._judge(f"it has not finished one answer within {_STUCK_S:.0f} s")
            self._looking_since = None
        handover = self._run.handover(self._settings.attempt)
        if handover is not None:
            _log.info("handover to attempt %s: %s", handover.to, handover.reason)
            self.handover, self._handover_at = handover, self._clock()
            return float("inf")
        return self._handover_poll_s if self.notice is None else _HANDOVER_POLL_S


def _is_news(found: Notice, known: Notice) -> bool:
    """An interruption outranks a recommendation, and may move; nothing takes it back."""
    if found.kind == known.kind:
        return found.time != known.time
    return found.kind == "interruption"
