"""What a message of the notice queue holds: EventBridge's events, however they were wrapped.

An event comes as it is from a rule with the queue as its target. On other ways something is wrapped
around it, and taken off here: SNS's notification, with or without raw delivery; lists and batches
of pipes and Lambda (``Records``); text within text, also in base64; and what an input path or an
input transformer leaves of it, as long as instance and action are in fields of their own.

Anything else is named, never guessed: acting on a false notice destroys a healthy attempt.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import Collection, Mapping
from datetime import datetime, timezone
from typing import Any, Literal, NamedTuple

import msgspec

from spotfirst.wire import Record, prepared

__all__ = ["Content", "Event", "Poison", "parse", "read"]

_DEPTH = 8
_EVENTS = 1000
_SHOWN = 300
_INSTANCE_ID = re.compile(r"i-[0-9a-f]{8,17}")
_ACTIONS = {"terminate", "stop", "hibernate"}
_STATES = {"pending", "running", "shutting-down", "terminated", "stopping", "stopped"}

Kind = Literal["interruption", "rebalance", "state"]
_KINDS: dict[str, Kind] = {
    "EC2 Spot Instance Interruption Warning": "interruption",
    "EC2 Instance Rebalance Recommendation": "rebalance",
    "EC2 Instance State-change Notification": "state",
}
_CONFIRMATIONS = {"SubscriptionConfirmation", "UnsubscribeConfirmation"}
_WRAPPERS = (
    "Message", "Sns", "body", "Body", "Records", "records", "Messages", "messages", "events",
    "Events", "event", "kinesis", "data", "payload",
)  # fmt: skip
_INSTANCE_NAMES = ("instanceid", "ec2instanceid", "instance")
_ACTION_NAMES = ("instanceaction", "action")


class Poison(ValueError):
    """A message without anything that can be understood."""


class Event(Record):
    """One event of EC2's. ``state`` is the new one, of a state change."""

    kind: Kind
    instance_id: str
    at: datetime
    state: str = ""


class Content(NamedTuple):
    """What a message holds. ``problems`` says what of it cannot be understood, and why."""

    events: tuple[Event, ...]
    problems: tuple[str, ...]


class _Envelope(msgspec.Struct):
    kind: str = msgspec.field(name="detail-type")
    time: datetime
    detail: dict[str, Any]


def parse(body: str, *, sent_at: datetime | None = None) -> tuple[Event, ...]:
    """The events of a message; none for events of other kinds. Raises :class:`Poison`.

    ``sent_at`` is when the message was sent: that is when an event happened that lacks its time.
    """
    content = read(body, sent_at=sent_at)
    if content.problems and not content.events:
        raise Poison(content.problems[0])
    return content.events


def read(body: str, *, sent_at: datetime | None = None) -> Content:
    """All that a message holds, and what of it cannot be understood. Never raises."""
    reading = _Reading(sent_at)
    reading.text(body, _DEPTH)
    return Content(tuple(reading.events[:_EVENTS]), tuple(reading.problems[:_EVENTS]))


class _Reading:
    def __init__(self, sent_at: datetime | None) -> None:
        self._sent_at = sent_at
        self.events: list[Event] = []
        self.problems: list[str] = []

    def text(self, text: str, depth: int) -> None:
        """JSON, or base64 of it."""
        try:
            value = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
            try:
                inner = base64.b64decode(text, validate=True).decode()
                value = msgspec.json.decode(inner)
            except (binascii.Error, ValueError, RecursionError):
                self._problem(f"no event of EventBridge's: {error}", text)
                return
        self.value(value, depth - 1)

    def value(self, value: Any, depth: int) -> None:
        if depth <= 0 or len(self.events) + len(self.problems) >= _EVENTS:
            self._problem("no event of EventBridge's: wrapped too often, or too many", value)
        elif isinstance(value, str):
            self.text(value, depth)
        elif isinstance(value, list) and value:
            for item in value:
                self.value(item, depth - 1)
        elif isinstance(value, dict) and value:
            self._fields(value, depth)
        else:
            self._problem("no event of EventBridge's", value)

    def _fields(self, fields: dict[str, Any], depth: int) -> None:
        if "detail-type" in fields and isinstance(fields.get("detail"), dict):
            self._envelope(fields)
            return
        if _is_one(fields.get("Type"), _CONFIRMATIONS):
            self._problem(
                f"SNS's {fields['Type']} of {fields.get('TopicArn')}: confirm the subscription, or "
                "no notice will come",
                fields,
            )
            return
        if self._bare(fields):
            return
        inner = next((fields[name] for name in _WRAPPERS if fields.get(name)), None)
        if isinstance(inner, (str, list, dict)):
            self.value(inner, depth - 1)
        else:
            self._problem("no event of EventBridge's", fields)

    def _envelope(self, fields: Mapping[str, Any]) -> None:
        try:
            envelope = msgspec.convert(fields, type=prepared(_Envelope))
        except msgspec.ValidationError as error:
            self._problem(f"no event of EventBridge's: {error}", fields)
            return
        kind = _KINDS.get(envelope.kind)
        if kind is not None:
            at = envelope.time
            at = at if at.tzinfo else at.replace(tzinfo=timezone.utc)
            self._event(kind, envelope.kind, _plain(envelope.detail), at)

    def _bare(self, fields: Mapping[str, Any]) -> bool:
        """What an input path or transformer made of an event; whether it is that."""
        plain = _plain(fields)
        instance = next((plain[name] for name in _INSTANCE_NAMES if name in plain), None)
        if not isinstance(instance, str) or not _INSTANCE_ID.fullmatch(instance):
            return False
        told = plain.get("detailtype")
        kind = _KINDS.get(told) if isinstance(told, str) else None
        if told is None and any(_is_one(plain.get(name), _ACTIONS) for name in _ACTION_NAMES):
            kind = "interruption"
        elif told is None and _is_one(plain.get("state"), _STATES):
            kind = "state"
        elif len(plain) == 1 and "instanceid" in plain:
            kind = "rebalance"  # all that the detail of a recommendation has
        if kind is None:
            return isinstance(told, str)  # another kind of event
        at = self._sent_at or datetime.now(timezone.utc)
        with contextlib.suppress(msgspec.ValidationError):
            at = msgspec.convert(plain.get("time"), type=datetime)
        self._event(kind, told or kind, plain, at if at.tzinfo else at.replace(tzinfo=timezone.utc))
        return True

    def _event(self, kind: Kind, told: str, detail: Mapping[str, Any], at: datetime) -> None:
        # The instance of the detail: in the resources, AWS's samples disagree on its ARN.
        instance = next((detail[name] for name in _INSTANCE_NAMES if name in detail), None)
        action = next((detail[name] for name in _ACTION_NAMES if name in detail), None)
        if not isinstance(instance, str) or not _INSTANCE_ID.fullmatch(instance):
            self._problem(f"{told} with the instance id {instance!r}", detail)
        elif kind == "interruption" and not _is_one(action, _ACTIONS):
            self._problem(f"{told} with the action {action!r}", detail)
        else:
            state = str(detail.get("state", "")) if kind == "state" else ""
            self.events.append(Event(kind=kind, instance_id=instance, at=at, state=state))

    def _problem(self, why: str, content: object) -> None:
        try:
            shown = content if isinstance(content, str) else repr(content)
        except RecursionError:
            shown = "much that is nested"
        self.problems.append(f"{why[:_SHOWN]} in {shown[:_SHOWN]!r}")


def _is_one(value: object, values: Collection[str]) -> bool:
    return isinstance(value, str) and value in values


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields by their letters alone: ``instance-id``, ``InstanceId`` and ``instance_id``."""
    return {re.sub(r"[^a-z0-9]", "", name.lower()): value for name, value in fields.items()}
