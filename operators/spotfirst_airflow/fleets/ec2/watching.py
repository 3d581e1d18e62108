"""What this process knows of its instances: one answer of EC2's for all its runs.

However many runs ask, a poll is ⌈instances / 500⌉ calls of DescribeInstances (and one more, every
half minute, while an instance that was there is missing), and there is one poll in :data:`TTL_S`
at most, but for those after something has changed: one at a time, for all who wait. A failed call says nothing at all: :class:`~spotfirst.errors.FleetUnavailable`, and what
was known stays as it was. ``memory`` says when an instance is gone.

Where there is a queue, its events come in between. Each process that looks at instances again and
again listens to it, see ``listening`` and ``notices``.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from functools import partial
from typing import Any, ClassVar

from spotfirst.errors import FleetError, FleetUnavailable
from spotfirst.market import Notice
from spotfirst.run import Run
from spotfirst.wire import Clock, utc_now
from spotfirst_airflow.fleets.ec2.aws import Aws
from spotfirst_airflow.fleets.ec2.describing import describe, describe_ids
from spotfirst_airflow.fleets.ec2.instances import TOKEN_TAG, tags_of
from spotfirst_airflow.fleets.ec2.listening import Listener
from spotfirst_airflow.fleets.ec2.memory import Memory, Seen
from spotfirst_airflow.fleets.ec2.notices import NoticeQueue, Notices, OpenStorage, open_with

__all__ = ["Seen", "Watcher"]

_log = logging.getLogger(__name__)

TTL_S = 5.0
"""How old an answer may be. A controller asks as often while nothing happens."""
ERROR_TTL_S = 1.0
"""How long an error stands for all who ask, so that an outage is not met by a storm of calls."""
_ENVIRONMENTS = 8


class Watcher:
    """All instances of Spotfirst's that one identity sees in one region. Thread-safe.

    ``monotonic`` counts seconds for everything here but the time of a notice, which is told by
    ``clock``. With ``background`` a thread listens to each queue, and looks after runs that are in
    a hurry and that nobody in this process waits for; without, each poll empties the queues.
    """

    _shared: ClassVar[dict[Hashable, Watcher]] = {}
    _sharing = threading.Lock()

    def __init__(
        self,
        aws: Aws,
        *,
        ttl_s: float = TTL_S,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        background: bool = True,
        open_storage: OpenStorage = open_with,
        by: str = "",
    ) -> None:
        self._aws = aws
        self._ttl_s = ttl_s
        self._clock = clock
        self._monotonic = monotonic
        self._background = background
        self._open_storage = open_storage
        self._by = by or f"{socket.gethostname()}:{os.getpid()}"
        self._lock = threading.Lock()  # what follows; held for moments
        self._memory = Memory()
        self._answered: tuple[float, int] | None = None
        """When, and what ``_expired`` was then."""
        self._expired = 0
        self._polls = 0
        self._failed: tuple[float, FleetError] | None = None
        self._environments: list[Mapping[str, str]] = []
        self._queues: dict[str, tuple[Notices, Listener]] = {}
        self._polling = threading.Lock()  # one poll at a time; held while EC2 answers

    @classmethod
    def of(
        cls,
        aws: Aws,
        queue_url: str = "",
        *,
        environment: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> Watcher:
        """The one of this process that all with the same identity share.

        ``queue_url`` is a queue to receive from, ``environment`` how its runs reach their storage.
        ``settings`` are those of the constructor, for whoever comes first.
        """
        with cls._sharing:
            watcher = cls._shared.get(aws.identity.key)
            if watcher is None:
                watcher = cls._shared[aws.identity.key] = cls(aws, **settings)
        watcher.join(aws, queue_url, environment or {})
        return watcher

    @classmethod
    def forget_all(cls) -> None:
        """Begin anew, as in a new process."""
        for watcher in list(cls._shared.values()):
            watcher.stop()
        cls._leave_to_parent()

    @classmethod
    def _leave_to_parent(cls) -> None:
        """A forked child has its parent's locks, perhaps held for ever, and none of its threads."""
        cls._sharing = threading.Lock()
        cls._shared = {}

    def stop(self) -> None:
        """Listen to no queue any more."""
        for _, listener in list(self._queues.values()):
            listener.stop()

    def join(self, aws: Aws, queue_url: str, environment: Mapping[str, str]) -> None:
        """One more fleet uses this watcher."""
        with self._lock:
            if self._failed is not None:
                self._aws = aws  # its keys may be newer
            others = [known for known in self._environments if known != environment]
            self._environments = [environment, *others][:_ENVIRONMENTS]
            if queue_url and queue_url not in self._queues:
                self._queues[queue_url] = self._listen_to(queue_url)

    def _listen_to(self, queue_url: str) -> tuple[Notices, Listener]:
        listener = Listener(
            lambda wait_s: notices.poll(wait_s=wait_s, run_all=listener.map), name=queue_url
        )
        notices = Notices(
            NoticeQueue(lambda: self._aws.client("sqs"), queue_url),
            self,
            environments=lambda: self._environments,
            open_storage=self._open_storage,
            by=self._by,
            clock=self._clock,
            attend=partial(listener.submit, _attend) if self._background else None,
        )
        return notices, listener

    # -- questions --------------------------------------------------------------------------

    def find(self, tokens: Collection[str]) -> dict[str, Seen]:
        """The instances with these tokens; one that was never seen is left out.

        Where a token has several, which should not be, it is one that lives, or else the oldest:
        :meth:`find_all` has them all. Raises :class:`FleetUnavailable`: nothing is known then.
        """
        return {token: seen[0] for token, seen in self.find_all(tokens).items()}

    def find_all(self, tokens: Collection[str]) -> dict[str, list[Seen]]:
        """The same with every instance of each token."""
        self._look()
        with self._lock:
            return self._memory.of(frozenset(tokens), now=self._monotonic())

    def owned(self) -> list[Seen]:
        """Every instance with a token of Spotfirst's that is not terminated."""
        self._look()
        with self._lock:
            return [seen for seen in self._memory if not seen.is_terminated]

    def refresh(self) -> None:
        """Ask EC2 now, whatever is known. Raises :class:`FleetUnavailable`."""
        self.expire()
        self._look()

    # -- news -------------------------------------------------------------------------------

    def saw(self, described: Mapping[str, Any], *, token: str = "") -> None:
        """Remember an instance that another call told of: a launch, before EC2 lists it.

        ``described`` may lack what DescribeInstances would say. What is known already stands.
        """
        with self._lock:
            self._memory.add(described, token=token, now=self._monotonic())

    def expire(self) -> None:
        """Make the next question ask EC2: something has changed, by us or by an event."""
        with self._lock:
            self._expired += 1

    def noticed(self, instance_id: str, notice: Notice) -> None:
        """Remember what was announced, for an instance that is known or will be."""
        with self._lock:
            self._memory.notice(instance_id, notice)

    def known_tags(self, instance_id: str) -> dict[str, str] | None:
        """The tags of an instance of ours, without asking EC2."""
        with self._lock:
            tags = self._memory[instance_id].tags if instance_id in self._memory else {}
        return tags if TOKEN_TAG in tags else None  # one that was only launched may not have any

    def ask_tags(self, instance_ids: Collection[str]) -> dict[str, dict[str, str]]:
        """The tags of these instances, ours or not. At most one call per 200 unknown ones."""
        found = {i: tags for i in instance_ids if (tags := self.known_tags(i)) is not None}
        unknown = sorted(set(instance_ids) - set(found))
        for start in range(0, len(unknown), 200):  # as many as a filter takes
            # Of ids that it does not know, a filter leaves out, and a list of ids is refused.
            ids = {"Name": "instance-id", "Values": unknown[start : start + 200]}
            for described in describe(self._ec2, Filters=[ids]):
                found[described["InstanceId"]] = tags_of(described)
        return found

    # -- the poll ---------------------------------------------------------------------------

    def warnings(self) -> list[str]:
        """What people should know of the queues."""
        with self._lock:
            queues = list(self._queues.values())
        return [notices.warning for notices, _ in queues if notices.warning]

    def _look(self) -> None:
        """See to it that what is known is no older than the time to live."""
        has_polled = False
        try:
            if not self._is_fresh():
                with self._polling:
                    if not self._is_fresh():  # nobody else has asked while we waited
                        has_polled = True
                        self._poll()
        except FleetUnavailable:
            self._hear(has_polled=has_polled)  # the queue may answer all the same
            raise
        self._hear(has_polled=has_polled)

    def _is_fresh(self) -> bool:
        """Raises :class:`FleetUnavailable` shortly after a failure."""
        now = self._monotonic()
        with self._lock:
            if self._failed is not None and now - self._failed[0] < ERROR_TTL_S:
                raise FleetUnavailable(str(self._failed[1])) from self._failed[1]
            if self._answered is None:
                return False
            answered_at, expired = self._answered
            return expired == self._expired and now - answered_at <= self._ttl_s

    def _poll(self) -> None:
        now = self._monotonic()  # what is known is as old as the question
        with self._lock:
            expired = self._expired  # what expires from here on is not in the answer
            self._polls += 1
        try:
            # Of all states: who comes anew learns here how an instance ended in the meantime.
            tokens = {"Name": "tag-key", "Values": [TOKEN_TAG]}
            answer = {i["InstanceId"]: i for i in describe(self._ec2, Filters=[tokens])}
            with self._lock:
                missing = self._memory.missing(answer, now=now)
            described, not_found = describe_ids(self._ec2, missing)
        except FleetError as error:
            # Also what AWS calls a refusal: a role that is being changed says nothing either.
            with self._lock:
                self._failed = (self._monotonic(), error)
            raise FleetUnavailable(str(error)) from error
        with self._lock:
            self._failed = None
            self._answered = (now, expired)
            self._memory.take(answer, now=now)
            self._memory.take_missing(missing, described, not_found, now=now)

    def _hear(self, *, has_polled: bool) -> None:
        """Keep listening to the queues, or empty them here."""
        with self._lock:
            queues = list(self._queues.values())
            comes_back = self._polls > 1
        for notices, listener in queues:
            if self._background and comes_back:
                listener.heed()
            elif has_polled and not self._background:
                try:
                    notices.poll()
                except FleetError as error:
                    _log.warning("Cannot receive notices: %s", error)

    def _ec2(self) -> Any:
        return self._aws.client("ec2")


os.register_at_fork(after_in_child=Watcher._leave_to_parent)  # noqa: SLF001 - nobody else may


def _attend(run: Run, environment: Mapping[str, str]) -> None:
    """One step for a run that another process looks after: it may look only seconds later."""
    from spotfirst_airflow.submission import open_controller

    try:
        open_controller(run, environment=environment).step()
    except Exception as error:  # noqa: BLE001 - someone else does look after it
        _log.info("Run %s waits for whoever looks after it: %r", run.run_id, error)
