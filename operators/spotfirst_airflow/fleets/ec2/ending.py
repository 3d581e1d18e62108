"""Terminating by token, also what EC2 does not list yet.

EC2 knows no "never launch this token". What holds instead, when a token is ended that nobody has
seen an instance of:

- this process remembers it: a launch of it is refused here, and an instance that turns up with it
  is terminated as soon as it is listed;
- elsewhere, a launch that is under way may still make one. Its agent reads the run's journal when
  it boots, finds its attempt given up, and powers off; if it cannot, the reaper ends it, and in the
  end its own timer.

Not covered: the minutes until then are paid, unless AWS itself interrupts it.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Hashable, Sequence
from datetime import datetime, timedelta
from typing import ClassVar

from spotfirst.errors import FleetError, FleetUnavailable, LaunchRejected
from spotfirst.wire import Clock, utc_now
from spotfirst_airflow.fleets.ec2.aws import Aws, call, code_of
from spotfirst_airflow.fleets.ec2.instances import is_over
from spotfirst_airflow.fleets.ec2.launching import look_up
from spotfirst_airflow.fleets.ec2.watching import Watcher

__all__ = ["Endings"]

_log = logging.getLogger(__name__)

REMEMBERED_S = 3600.0
"""For how long a token that had no instance is looked out for."""
ASK_AGAIN_S = 5.0
"""A controller repeats itself twice a second until an instance is gone: EC2 is asked this often."""
_AT_ONCE = 500


class Endings:
    """What this process wants to be gone. Thread-safe."""

    _shared: ClassVar[dict[Hashable, Endings]] = {}
    _sharing = threading.Lock()

    def __init__(self, aws: Aws) -> None:
        self._aws = aws
        self._lock = threading.Lock()
        self._withdrawn: dict[str, datetime] = {}
        """Tokens that were ended and had no instance, and when."""
        self._looked: dict[str, datetime] = {}
        """Tokens that EC2 was asked for in vain, and when it was last."""
        self._asked: dict[str, datetime] = {}
        """Instances that EC2 was asked to terminate, and when it last answered."""

    @classmethod
    def of(cls, aws: Aws) -> Endings:
        """The one of this process that all with the same identity share."""
        with cls._sharing:
            return cls._shared.setdefault(aws.identity.key, cls(aws))

    @classmethod
    def forget_all(cls) -> None:
        """Know nothing any more: for tests, and for a forked child."""
        cls._sharing = threading.Lock()
        cls._shared = {}

    def is_withdrawn(self, token: str) -> bool:
        """Whether this process has ended the token before it had an instance."""
        with self._lock:
            return token in self._withdrawn

    def end(self, tokens: Collection[str], watcher: Watcher, *, clock: Clock = utc_now) -> None:
        """Terminate the instances of these tokens, now or as soon as they are seen.

        Raises :class:`FleetUnavailable`: call again.
        """
        known = watcher.find_all(tokens)
        unknown = [token for token in dict.fromkeys(tokens) if token not in known]
        now = clock()
        ids = [
            seen.instance_id
            for each in known.values()
            for seen in each
            if not is_over(seen.described)
        ]
        ids += self._look_again(unknown, watcher, now)
        self._terminate(ids, watcher, now)

    def pursue(self, watcher: Watcher, *, clock: Clock = utc_now) -> None:
        """Terminate what has turned up of the tokens that had no instance when they were ended.

        Never raises. It is done by the way, in calls for other runs: what cannot be ended now is
        tried again at the next one, and must not hide their instances from them.
        """
        now = clock()
        with self._lock:
            for remembered in (self._withdrawn, self._looked, self._asked):
                for key, at in list(remembered.items()):
                    if now - at > timedelta(seconds=REMEMBERED_S):
                        del remembered[key]
            wanted = list(self._withdrawn)
        if not wanted:
            return
        try:
            found = watcher.find_all(wanted)
            ids = [
                s.instance_id for each in found.values() for s in each if not is_over(s.described)
            ]
            self._terminate(ids, watcher, now)
        except FleetError as error:
            _log.warning("What was ended before it was launched may still run: %s", error)

    def _look_again(self, unknown: Sequence[str], watcher: Watcher, now: datetime) -> list[str]:
        """Ids of instances that the watcher has not seen: they are younger than its last look."""
        with self._lock:
            due = [token for token in unknown if self._is_due(self._looked.get(token), now)]
            for token in unknown:
                # Before the look: a launch in this process that comes after it is refused.
                self._withdrawn.setdefault(token, now)
        if not due:
            return []
        found = look_up(self._aws, due)
        with self._lock:
            self._looked.update(dict.fromkeys(due, now))
            for token in found:
                self._withdrawn.pop(token, None)
        for each in found.values():
            for described in each:
                watcher.saw(described)
        return [i["InstanceId"] for each in found.values() for i in each if not is_over(i)]

    def _terminate(self, ids: Sequence[str], watcher: Watcher, now: datetime) -> None:
        with self._lock:
            due = [i for i in dict.fromkeys(ids) if self._is_due(self._asked.get(i), now)]
        if not due:
            return
        for start in range(0, len(due), _AT_ONCE):
            self._terminate_some(due[start : start + _AT_ONCE], now)
        watcher.expire()

    def _terminate_some(self, ids: list[str], now: datetime) -> None:
        """One id that EC2 does not know fails the whole call, and then none is terminated."""
        try:
            call(self._aws.client("ec2").terminate_instances, InstanceIds=ids)
        except LaunchRejected as error:
            if len(ids) > 1:
                self._one_by_one(ids, now)
                return
            if code_of(error) != "InvalidInstanceID.NotFound":  # else it is gone, or too new
                # Not for ever, as a launch: what runs and costs is worth each try.
                msg = f"{ids[0]} cannot be terminated: {error}"
                raise FleetUnavailable(msg) from error
        with self._lock:
            self._asked.update(dict.fromkeys(ids, now))

    def _one_by_one(self, ids: list[str], now: datetime) -> None:
        failed: FleetUnavailable | None = None
        for instance_id in ids:
            try:
                self._terminate_some([instance_id], now)
            except FleetUnavailable as error:
                failed = error
        if failed is not None:
            raise failed

    @staticmethod
    def _is_due(at: datetime | None, now: datetime) -> bool:
        return at is None or not timedelta(0) <= now - at < timedelta(seconds=ASK_AGAIN_S)


os.register_at_fork(after_in_child=Endings.forget_all)
