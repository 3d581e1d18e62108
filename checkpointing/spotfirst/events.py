"""What can happen to a run. Each event is one object of its journal.

An event is appended *before* what it allows (``Launching`` before the fleet is called) and
*after* what it tells (``Launched``). Readers keep events whose kind they do not know
(:class:`UnknownEvent`): a newer controller may have written them.
"""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any, Literal

import msgspec

from spotfirst.market import Market, Notice, Pool
from spotfirst.steptimes import StepTimes
from spotfirst.wire import Claimed, Record, decode, encode

__all__ = [
    "Attached",
    "Created",
    "Delivered",
    "Ended",
    "Event",
    "Failed",
    "HandoverRequested",
    "Launched",
    "Launching",
    "NotLaunched",
    "Noticed",
    "Reopened",
    "StopRequested",
    "Stopped",
    "Succeeded",
    "UnknownEvent",
    "Waiting",
    "Warned",
    "decode_event",
    "encode_event",
]

EndCause = Literal[
    "completed",  # the work is done: the command exited with 0, unasked or after its last step
    "script_failed",  # the command exited with something else, on its own account
    "interrupted",  # the fleet took the instance back
    "handed_over",  # it stopped, checkpointed, because it was asked to
    "killed",  # someone sent the command a signal (the out-of-memory killer, an operator)
    "lost",  # the instance or its agent is gone, and nothing says why
    "max_life",  # it ended itself at the end of its maximum life
    "unfit",  # the agent cannot work on such an instance, and another one would be the same
]


def _snake(name: str) -> str:
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


class Event(Claimed, tag_field="kind", tag=_snake):
    """``at`` is the writer's clock; ``by`` names the process that decided."""

    at: datetime
    by: str = ""


class Created(Event):
    """The spec is in place. The first event of every journal."""


class Attached(Event):
    """A task instance (or a command line) now owns the run: only it may stop it."""

    owner: str


class Waiting(Event):
    """No attempt is running, and none is launched, for this reason."""

    reason: str


class Launching(Event):
    """The intent to launch: from here on an instance with this token may exist.

    It is in ``pool``, or in one of ``others``, where the fleet may choose. ``price_usd_h`` is what
    ``pool`` was offered for; what counts is frozen with the launch.
    """

    attempt: int
    token: str
    market: Market
    pool: Pool
    reason: str
    others: tuple[Pool, ...] = ()
    price_usd_h: Decimal | None = None


class Launched(Event):
    """The fleet gave an instance, in ``pool`` if it was free to choose. Its price is frozen here.

    ``clock_rate`` is billed seconds per second: 1, except in a local market that runs faster.
    ``read_usd_gb`` and ``write_usd_gb`` are what a GB (10^9 bytes) costs that it reads from the
    run's storage, and that it writes there: something only where these are in two regions.
    """

    attempt: int
    instance_id: str
    started_at: datetime
    price_usd_h: Decimal
    price_source: str
    price_at: datetime
    on_demand_usd_h: Decimal
    clock_rate: float = 1.0
    pool: Pool | None = None
    read_usd_gb: Decimal = Decimal(0)
    write_usd_gb: Decimal = Decimal(0)


class NotLaunched(Event):
    """The intent came to nothing; no instance exists for its token.

    ``pools`` are those that had no capacity; none named: the one of the intent. ``quota``: they
    had none for us, as the account's quota of that market is used up.
    """

    attempt: int
    cause: Literal["no_capacity", "rejected", "withdrawn"]
    message: str
    pools: tuple[Pool, ...] = ()
    quota: bool = False


class Noticed(Event):
    """The attempt's instance will be taken back."""

    attempt: int
    notice: Notice


class HandoverRequested(Event):
    """The attempt was asked to checkpoint and stop."""

    attempt: int
    reason: str


class Ended(Event):
    """The attempt's instance is gone, and this is what it left.

    ``start_step`` is what it resumed from (``restored_seq`` in the chain), ``step`` the last one
    it trained, and ``checkpoint_step`` the last one it committed. ``training_s`` is the time from its first
    step's start to its last step's end, ``startup_s`` what came before, on the real clock.
    ``step_times`` are those of its steps, where the trainer measured them, and ``checkpoint_s`` is
    what its last checkpoint took.
    ``moved_bytes`` of code and data were fetched; where the instance's prices ask for it, also told
    is how much of a checkpoint was restored, and how much of its own ones was written.
    ``price_timeline`` is what its pool cost while it ran, (since when, USD per hour), where the
    fleet could tell. ``kept_until``: its script failed, and the instance was left to people, until
    then at most.
    """

    attempt: int
    cause: EndCause
    ended_at: datetime
    by_fleet: bool = False
    exit_code: int | None = None
    message: str = ""
    log_tail: tuple[str, ...] = ()
    start_step: int | None = None
    restored_seq: int | None = None
    step: int | None = None
    checkpoint_step: int | None = None
    total_steps: int | None = None
    step_times: StepTimes | None = None
    checkpoint_s: float | None = None
    training_s: float = 0.0
    startup_s: float = 0.0
    moved_bytes: int = 0
    restored_bytes: int = 0
    written_bytes: int = 0
    price_timeline: tuple[tuple[datetime, Decimal], ...] = ()
    kept_until: datetime | None = None


class Warned(Event):
    """Something that people should look at, and that did not stop the run."""

    message: str
    attempt: int | None = None


class StopRequested(Event):
    """The run is to stop, checkpointed, and not to go on by itself."""

    reason: str
    cause: Literal["user", "budget", "deadline", "policy"] = "user"


class Stopped(Event):
    """The run has stopped, every instance is gone. It can be reopened."""

    reason: str


class Succeeded(Event):
    """The command completed."""

    attempt: int
    step: int | None = None
    checkpoint_seq: int | None = None
    metrics: dict[str, float] = {}


class Failed(Event):
    """The run cannot go on by itself, every instance is gone. It can be reopened."""

    message: str
    log_tail: tuple[str, ...] = ()
    retryable: bool = True


class Reopened(Event):
    """A stopped or failed run goes on from its newest checkpoint.

    It may ask for other work from here on: ``amendment`` is then the number of its new spec, and
    its deadline and budget count.
    """

    owner: str
    amendment: int = 0


class Delivered(Event):
    """The owner has received the result: asking again means running anew."""

    owner: str


class UnknownEvent(Event):
    """An event of a kind that this version does not know, kept as it was."""

    original: dict[str, Any] = {}


class _Kind(Record):
    kind: str
    at: datetime
    by: str = ""


KNOWN: dict[str, type[Event]] = {
    _snake(kind.__name__): kind
    for kind in (
        Created, Attached, Waiting, Launching, Launched, NotLaunched, Noticed, HandoverRequested,
        Ended, Warned, StopRequested, Stopped, Succeeded, Failed, Reopened, Delivered,
    )
}  # fmt: skip


def encode_event(event: Event, *, nonce: str) -> bytes:
    """The event as an object that only this call wrote, so a lost answer can be settled."""
    body = encode(event)
    return body[:-1] + b',"nonce":"%s"}' % nonce.encode()


def decode_event(data: bytes, *, path: str) -> Event:
    """Raises :class:`NewerFormat` or :class:`CorruptObject`; an unknown kind is not an error."""
    head = decode(data, _Kind, path=path)
    if head.kind in KNOWN:
        return decode(data, KNOWN[head.kind], path=path)
    original = msgspec.json.decode(data, type=dict[str, Any])
    return UnknownEvent(at=head.at, by=head.by, original=original)
