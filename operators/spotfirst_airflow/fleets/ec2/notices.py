"""What EventBridge says of instances, from one SQS queue into the runs' journals.

One queue serves an account and region, and every process that looks after runs receives from it.
It does not matter which one gets a message: the instance's tags name its run, and whoever has the
message writes :class:`~spotfirst.events.Noticed` into that run's journal. Only then is the message
deleted. What could not be handled comes back after :data:`VISIBILITY_S`.

============================ =========================================================
message                      what becomes of it
============================ =========================================================
warning, recommendation      journalled, then deleted
state change                 towards an end: the next look asks EC2 anew, and comes at
                             once; deleted
another kind of event        deleted
no event at all (poison)     a warning in the log and in the runs, with a sample; deleted
about an instance of others  deleted: AWS's events carry no tags, so no rule can keep them
                             out, and the queue is Spotfirst's own
failed                       left, to come back; deleted once it is :data:`STALE`
============================ =========================================================
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple, Protocol

from spotfirst import events as e
from spotfirst.errors import FleetError, SpotfirstError, StorageDenied
from spotfirst.market import Notice
from spotfirst.run import Run
from spotfirst.spec import is_run_id
from spotfirst.state import RunState
from spotfirst.storage import Storage, is_s3, open_storage
from spotfirst.wire import Clock, utc_now
from spotfirst_airflow.controlkeys import with_known_keys
from spotfirst_airflow.fleets.base import ATTEMPT_TAG, RUN_TAG, STORAGE_TAG
from spotfirst_airflow.fleets.ec2.aws import call
from spotfirst_airflow.fleets.ec2.envelopes import Event, Poison, parse, read
from spotfirst_airflow.fleets.ec2.instances import TOKEN_TAG
from spotfirst_airflow.waking import ring

__all__ = [
    "Event",
    "NoticeQueue",
    "Notices",
    "OpenStorage",
    "Poison",
    "Postbox",
    "open_with",
    "parse",
]

_log = logging.getLogger(__name__)

VISIBILITY_S = 20
"""How long whoever received a message may take before another gets it: a storage that does not
answer is given up after less, and two of the notice's 120 s must still be left for a second try."""
STALE = timedelta(minutes=10)
"""A notice is worth nothing any more: the instance is gone, and EC2 says so itself."""
INTERRUPTION_AHEAD = timedelta(seconds=120)
"""From the warning to the interruption (AWS, "Spot Instance interruption notices")."""
_PER_CALL = 10  # as many as SQS gives at once
_ENDINGS = {"stopping", "stopped", "shutting-down", "terminated"}

OpenStorage = Callable[[str, Mapping[str, str]], Storage]
"""From a URL and the ``AWS_*`` variables of whoever looks after the run."""
RunAll = Callable[[Callable[["_Post"], bool], Iterable["_Post"]], Iterable[bool]]
"""``map``, or that of an executor."""


class Message(NamedTuple):
    """One message of SQS's: what it says, and what deletes it."""

    body: str
    receipt: str
    sent_at: datetime | None = None


class NoticeQueue:
    """One SQS queue, through the client that ``client()`` gives. Calls raise what :func:`~spotfirst_airflow.fleets.ec2.aws.call` does."""

    def __init__(self, client: Callable[[], Any], url: str) -> None:
        self._client = client
        self.url = url

    def receive(self, *, wait_s: float = 0.0, calls: int = 10) -> list[Message]:
        """What is in the queue: at most ``calls`` calls, ten messages each.

        The first call waits up to ``wait_s`` (whole seconds, at most 20) for a message; the others
        are made only while a call comes back full, and do not wait. One that fails ends it: what
        came before is handled now, and not after :data:`VISIBILITY_S`.
        """
        messages: list[Message] = []
        for number in range(calls):
            try:
                answer: dict[str, Any] = call(
                    self._client().receive_message,
                    QueueUrl=self.url,
                    MaxNumberOfMessages=_PER_CALL,
                    WaitTimeSeconds=0 if number else min(20, int(wait_s)),
                    VisibilityTimeout=VISIBILITY_S,
                    AttributeNames=["SentTimestamp"],
                )
            except FleetError:
                if not messages:
                    raise
                break
            found = answer.get("Messages", [])
            messages += [Message(m.get("Body", ""), m["ReceiptHandle"], _sent_at(m)) for m in found]
            if len(found) < _PER_CALL:
                break
        return messages

    def delete(self, messages: Sequence[Message]) -> None:
        """Delete these. One that is not deleted comes back, and is handled again in vain."""
        for start in range(0, len(messages), _PER_CALL):
            call(
                self._client().delete_message_batch,
                QueueUrl=self.url,
                Entries=[
                    {"Id": str(number), "ReceiptHandle": message.receipt}
                    for number, message in enumerate(messages[start : start + _PER_CALL])
                ],
            )


class Postbox(Protocol):
    """Who knows instances, and wants to hear of them: the watcher."""

    def ask_tags(self, instance_ids: Collection[str]) -> dict[str, dict[str, str]]:
        """The tags of those instances that are known, or that EC2 knows. Raises FleetError."""

    def known_tags(self, instance_id: str) -> dict[str, str] | None:
        """The same without asking EC2."""

    def noticed(self, instance_id: str, notice: Notice) -> None:
        """The instance will be taken back."""

    def expire(self) -> None:
        """What was answered is out of date."""


class _Post(NamedTuple):
    """A message that is about an instance. ``tags`` is ``None`` when EC2 cannot tell them."""

    message: Message
    event: Event
    tags: dict[str, str] | None


class Notices:
    """Receives, journals, wakes. Thread-safe: several may poll one queue.

    ``environments`` are those with which runs of this process reach their storages, the likeliest
    first. ``attend`` is called with a run that has news and that nobody in this process waits
    for, and with the environment that reaches it: whoever looks after it may look too late.
    """

    def __init__(
        self,
        queue: NoticeQueue,
        instances: Postbox,
        *,
        environments: Callable[[], Sequence[Mapping[str, str]]],
        by: str,
        open_storage: OpenStorage,
        clock: Clock = utc_now,
        attend: Callable[[Run, Mapping[str, str]], object] | None = None,
    ) -> None:
        self._queue = queue
        self._instances = instances
        self._environments = environments
        self._by = by
        self._open_storage = open_storage
        self._clock = clock
        self._attend = attend
        self._unreadable = 0
        self.warning = ""
        """What people should know of this queue; empty while there is nothing."""

    def poll(self, *, wait_s: float = 0.0, run_all: RunAll = map) -> int:
        """Receive and handle what is there; how many messages. Raises :class:`FleetError`."""
        messages = self._queue.receive(wait_s=wait_s)
        warnings: list[tuple[Message, Event]] = []
        changed: set[str] = set()
        problems: list[str] = []
        for message in messages:
            content = read(message.body, sent_at=message.sent_at)
            problems += content.problems
            for event in content.events:
                if event.kind != "state":
                    warnings.append((message, event))
                elif event.state in _ENDINGS:
                    changed.add(event.instance_id)
        self._take_note(problems)
        self._pass_on(changed)
        posts = self._with_tags(warnings)
        left = {
            post.message.receipt
            for post, handled in zip(posts, run_all(self._handle, posts), strict=True)
            if not handled
        }
        self._queue.delete([message for message in messages if message.receipt not in left])
        return len(messages)

    def _take_note(self, problems: Sequence[str]) -> None:
        """Say of what cannot be read how much it is, and what: at first, and ten times as much."""
        if not problems:
            return
        before, self._unreadable = self._unreadable, self._unreadable + len(problems)
        if before and len(str(before)) == len(str(self._unreadable)):
            return
        text = (
            f"messages of the notice queue {self._queue.url} cannot be read; {self._unreadable} so "
            f"far, and they are deleted, such as this one: {problems[0]}. An interruption that is "
            "announced so is heard only from the instance itself: have EventBridge send its events "
            "to the queue as they are"
        )
        _log.warning("%s", text)
        self.warning = self.warning or text

    def _pass_on(self, changed: Collection[str]) -> None:
        """Have those looked at again who wait for instances in another state."""
        known = [tags for i in changed if (tags := self._instances.known_tags(i)) is not None]
        if known:
            self._instances.expire()
        for tags in known:
            ring(tags.get(RUN_TAG, ""))

    def _with_tags(self, warnings: Sequence[tuple[Message, Event]]) -> list[_Post]:
        try:
            tags = self._instances.ask_tags({event.instance_id for _, event in warnings})
        except FleetError as error:
            _log.warning("Leaving messages in %s for later: %s", self._queue.url, error)
            tags = {
                event.instance_id: known
                for _, event in warnings
                if (known := self._instances.known_tags(event.instance_id)) is not None
            }
        return [_Post(message, event, tags.get(event.instance_id)) for message, event in warnings]

    def _handle(self, post: _Post) -> bool:
        """Whether the message can be deleted. Never raises."""
        _, event, tags = post
        try:
            if tags is not None and self._journal(event, tags):
                return True
        except SpotfirstError as error:
            _log.warning("Cannot pass on the %s of %s: %s", event.kind, event.instance_id, error)
        except Exception:  # noqa: BLE001 - one message must not keep the others from their runs
            _log.exception("Cannot pass on the %s of %s", event.kind, event.instance_id)
        if self._clock() - event.at < STALE:
            return False
        _log.info("Deleting the %s of %s: it is too old", event.kind, event.instance_id)
        return True

    def _journal(self, event: Event, tags: Mapping[str, str]) -> bool:
        """Write the notice into the journal of the instance's run; whether that is settled."""
        run_id, number = tags.get(RUN_TAG, ""), tags.get(ATTEMPT_TAG, "")
        if not is_run_id(run_id) or not number.isdecimal() or not tags.get(STORAGE_TAG):
            _log.debug("%s is none of Spotfirst's", event.instance_id)
            return True
        now = self._clock()
        notice = Notice(kind="rebalance", seen_at=now)
        if event.kind == "interruption":
            notice = Notice(kind="interruption", seen_at=now, time=event.at + INTERRUPTION_AHEAD)
        self._instances.noticed(event.instance_id, notice)
        denied: StorageDenied | None = None
        for environment in self._environments():
            run = Run(self._open_storage(tags[STORAGE_TAG], environment), run_id)
            try:
                found, is_news = self._decide(run, int(number), tags.get(TOKEN_TAG, ""), notice)
            except StorageDenied as error:
                denied = error
                continue
            if found:
                awake = ring(run_id)
                if is_news and not awake and self._attend is not None:
                    self._attend(run, environment)
                return True
        if denied is not None:
            raise denied
        _log.warning(
            "%s says that it is attempt %s of run %s in %s, and that journal has none like it",
            event.instance_id, number, run_id, tags[STORAGE_TAG],
        )  # fmt: skip
        return True

    def _decide(self, run: Run, number: int, token: str, notice: Notice) -> tuple[bool, bool]:
        """Whether the journal knows the attempt, and whether the notice was news to it."""
        news: e.Noticed | None = None

        def choose(state: RunState) -> e.Event | None:
            nonlocal news
            attempt = next((a for a in state.attempts if a.number == number), None)
            news = None
            if attempt is not None and attempt.token == token and attempt.is_open:
                known = attempt.notice
                if known is None or (known.kind, notice.kind) == ("rebalance", "interruption"):
                    news = e.Noticed(at=notice.seen_at, attempt=number, notice=notice)
            return news

        state = run.journal(by=self._by).decide(choose)
        found = any(a.number == number and a.token == token for a in state.attempts)
        return found, news is not None


def _sent_at(message: Mapping[str, Any]) -> datetime | None:
    """When SQS took the message, where it says so."""
    text = message.get("Attributes", {}).get("SentTimestamp", "")
    if not text.isdecimal() or len(text) > 15:
        return None
    return datetime.fromtimestamp(int(text) / 1000, timezone.utc)


def open_with(url: str, environment: Mapping[str, str]) -> Storage:
    """The storage at ``url``, reached with these ``AWS_*`` variables."""
    options: dict[str, Any] = {}
    for name, variable in (
        ("key", "AWS_ACCESS_KEY_ID"),
        ("secret", "AWS_SECRET_ACCESS_KEY"),
        ("token", "AWS_SESSION_TOKEN"),
        ("endpoint_url", "AWS_ENDPOINT_URL_S3"),
    ):
        if environment.get(variable):
            options[name] = environment[variable]
    if region := environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"):
        options["client_kwargs"] = {"region_name": region}
    return with_known_keys(open_storage(url, options=options if is_s3(url) else None))
