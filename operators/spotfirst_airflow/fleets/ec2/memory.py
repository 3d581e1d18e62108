"""What was seen of instances, kept against answers that lack them.

An instance is never taken for gone because an answer lacks it. Answers of EC2 are eventually
consistent, and a terminated instance loses its tags before its record goes. So what was seen once
keeps its last known state until EC2, asked for its id, says that it is terminated, or has said for
:data:`GONE_AFTER_S` that no such instance exists.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from spotfirst.market import Notice
from spotfirst_airflow.fleets.ec2.instances import TOKEN_TAG, tags_of

__all__ = ["Memory", "Seen"]

GONE_AFTER_S = 300.0
"""How long EC2 must say that an instance does not exist."""
ASK_AGAIN_S = 30.0
"""How often EC2 is asked for the id of an instance that its answers lack, and how long a launched
one may be missing before it is asked for."""
FORGET_AFTER_S = 24 * 3600.0
"""How long a terminated instance is remembered that nobody asks for any more."""
_TERMINATED = "terminated"
_GONE = {
    "State": {"Code": 48, "Name": _TERMINATED},
    "StateReason": {
        "Code": "Spotfirst.NotFound",
        "Message": "EC2 has forgotten the instance, and nobody saw how it ended",
    },
}


@dataclass(frozen=True)
class Seen:
    """An instance as EC2 described it last, and what was announced about it.

    ``described`` is an item of DescribeInstances' ``Instances``. Of an instance that EC2 has
    forgotten it says ``terminated``, with the state reason ``Spotfirst.NotFound``.
    """

    token: str
    described: Mapping[str, Any]
    notice: Notice | None = None

    @property
    def instance_id(self) -> str:
        """EC2's name for it."""
        return str(self.described["InstanceId"])

    @property
    def state(self) -> str:
        """EC2's word for its state, such as ``running``."""
        return str(self.described.get("State", {}).get("Name", "pending"))

    @property
    def is_terminated(self) -> bool:
        """Whether it is gone, for ever."""
        return self.state == _TERMINATED

    @property
    def tags(self) -> dict[str, str]:
        """All its tags."""
        return tags_of(self.described)


@dataclass(frozen=True)
class _Known:
    seen: Seen
    ask_at: float
    """When to ask for its id, if answers lack it."""
    wanted_at: float
    """When someone wanted to know of it last."""
    not_found_since: float | None = None


class Memory:
    """All instances by id. ``now`` counts seconds of a monotonic clock. Not thread-safe."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._notices: dict[str, Notice] = {}

    def __iter__(self) -> Iterator[Seen]:
        return map(self._tell, self._known.values())

    def __getitem__(self, instance_id: str) -> Seen:
        return self._tell(self._known[instance_id])

    def __contains__(self, instance_id: str) -> bool:
        return instance_id in self._known

    def of(self, tokens: Collection[str], *, now: float) -> dict[str, list[Seen]]:
        """The instances of these tokens: those that live first, then the oldest first."""
        found: dict[str, list[Seen]] = {}
        for instance_id, known in self._known.items():
            if known.seen.token in tokens:
                self._known[instance_id] = replace(known, wanted_at=now)
                found.setdefault(known.seen.token, []).append(self._tell(known))
        for seen in found.values():
            seen.sort(key=_rank)
        return found

    def add(self, described: Mapping[str, Any], *, token: str, now: float) -> None:
        """An instance that another call told of. What is known of it already stands."""
        known = self._known.get(described["InstanceId"])
        if known is None:
            seen = Seen(token=token or _token(described), described=dict(described))
            known = _Known(seen=seen, ask_at=now + ASK_AGAIN_S, wanted_at=now)
        else:
            described = {**described, **known.seen.described}
            known = replace(known, seen=replace(known.seen, described=described))
        self._known[described["InstanceId"]] = known

    def notice(self, instance_id: str, notice: Notice) -> None:
        """What was announced, for an instance that is known or will be."""
        before = self._notices.get(instance_id)
        if before is None or (before.kind, notice.kind) == ("rebalance", "interruption"):
            self._notices[instance_id] = notice

    def missing(self, answer: Collection[str], *, now: float) -> list[str]:
        """Whose ids are to be asked for now, because the answer lacks them."""
        return [
            instance_id
            for instance_id, known in self._known.items()
            if instance_id not in answer and not known.seen.is_terminated and now >= known.ask_at
        ]

    def take(self, answer: Mapping[str, Mapping[str, Any]], *, now: float) -> None:
        """All that EC2 listed."""
        for described in answer.values():
            self._take(described, now)
        for instance_id, known in list(self._known.items()):
            is_over = known.seen.is_terminated and instance_id not in answer
            if is_over and now - known.wanted_at > FORGET_AFTER_S:
                del self._known[instance_id]
                self._notices.pop(instance_id, None)

    def take_missing(
        self,
        asked: Collection[str],
        described: Mapping[str, Mapping[str, Any]],
        not_found: Collection[str],
        *,
        now: float,
    ) -> None:
        """What EC2 said of the ids that it was asked for."""
        for instance_id in asked:
            if instance_id in described:
                self._take(described[instance_id], now)
            known = replace(self._known[instance_id], ask_at=now + ASK_AGAIN_S)
            if instance_id in not_found:
                since = now if known.not_found_since is None else known.not_found_since
                known = replace(known, not_found_since=since)
                if now - since >= GONE_AFTER_S:
                    gone = {**known.seen.described, **_GONE}
                    known = replace(known, seen=replace(known.seen, described=gone))
            self._known[instance_id] = known

    def _take(self, described: Mapping[str, Any], now: float) -> None:
        known = self._known.get(described["InstanceId"])
        if known is None:
            seen = Seen(token=_token(described), described=described)
            known = _Known(seen=seen, ask_at=now, wanted_at=now)
        elif not known.seen.is_terminated:
            if not _token(described):
                described = {**described, "Tags": known.seen.described.get("Tags", [])}
            seen = replace(known.seen, described=described)
            known = replace(known, seen=seen, ask_at=now, not_found_since=None)
        self._known[described["InstanceId"]] = known

    def _tell(self, known: _Known) -> Seen:
        return replace(known.seen, notice=self._notices.get(known.seen.instance_id))


def _token(described: Mapping[str, Any]) -> str:
    return tags_of(described).get(TOKEN_TAG, "")


def _rank(seen: Seen) -> tuple[bool, str, str]:
    return seen.is_terminated, str(seen.described.get("LaunchTime", "")), seen.instance_id
