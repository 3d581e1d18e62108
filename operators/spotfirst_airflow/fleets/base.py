"""What the controller needs of any fleet: five calls, each safe to repeat."""

from __future__ import annotations

import enum
import functools
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, Protocol, runtime_checkable

from spotfirst.errors import InvalidSpec
from spotfirst.market import Market, Notice, Pool
from spotfirst.spec import RunSpec
from spotfirst.wire import Record

__all__ = [
    "ATTEMPT_TAG",
    "KEEP_TAG",
    "RUN_TAG",
    "STORAGE_TAG",
    "EndedBy",
    "Fleet",
    "Instance",
    "InstanceState",
    "LaunchRequest",
    "Offer",
    "fleet_class",
    "fleet_names",
    "load_fleet",
]

RUN_TAG = "spotfirst:run"
ATTEMPT_TAG = "spotfirst:attempt"
STORAGE_TAG = "spotfirst:storage"
"""Tags that lead from an instance back to its owner: its run, its attempt, its storage's URL."""
KEEP_TAG = "spotfirst:keep-until"
"""Tag with a time in ISO 8601, until which people want the instance of a failed script."""

EndedBy = Literal["fleet", "itself", "request", "unknown"]
"""Who ended an instance: the fleet took it back; it shut itself down; we asked; nobody says."""


class InstanceState(str, enum.Enum):
    """``PENDING`` is booting; ``TERMINATED`` is for ever."""

    PENDING = "pending"
    RUNNING = "running"
    TERMINATED = "terminated"


class Offer(Record):
    """What one pool costs now.

    ``available`` is what is known: ``False`` only when a launch would surely fail.
    ``read_usd_gb`` is what a GB (10^9 bytes) costs that an instance there reads from the run's
    storage, ``write_usd_gb`` one that it writes there: 0 within a region.
    """

    pool: Pool
    market: Market
    price_usd_h: Decimal
    price_source: str
    price_at: datetime
    available: bool = True
    read_usd_gb: Decimal = Decimal(0)
    write_usd_gb: Decimal = Decimal(0)


class LaunchRequest(Record):
    """One attempt to launch. The same token always means the same instance.

    ``spec_digest`` is for the agent: the SHA-256 of the only spec that it may run.

    A fleet that knows better than by price where capacity will last may take one of ``others``
    instead of ``pool``. They are the same whenever the same token is asked for.
    """

    token: str
    run_id: str
    attempt: int
    market: Market
    pool: Pool
    others: tuple[Pool, ...] = ()
    storage_url: str
    max_life_s: float
    spec_digest: str = ""
    tags: dict[str, str] = {}


class Instance(Record):
    """An instance as the fleet sees it. ``clock_rate`` is billed seconds per second.

    ``read_usd_gb`` and ``write_usd_gb`` are as in :class:`Offer`.
    ``ended_why`` is what the fleet knows for people, where it is needed: nobody else says it.
    """

    token: str
    instance_id: str
    state: InstanceState
    market: Market
    pool: Pool
    started_at: datetime
    price_usd_h: Decimal
    price_source: str
    on_demand_usd_h: Decimal
    clock_rate: float = 1.0
    read_usd_gb: Decimal = Decimal(0)
    write_usd_gb: Decimal = Decimal(0)
    notice: Notice | None = None
    ended_at: datetime | None = None
    ended_by: EndedBy | None = None
    ended_why: str = ""
    tags: dict[str, str] = {}


@runtime_checkable
class Fleet(Protocol):
    """Made per run: ``FleetClass(options, environment=…)``.

    Every call may block for seconds (run it in a thread) and may be repeated or made by several
    controllers at once. Calls raise :class:`~spotfirst.errors.FleetUnavailable` when nothing can
    be said; never conclude from that that an instance is gone.
    """

    heartbeat_s: float
    """How often its instances beat, unless the request says so: 5 suits a cloud."""
    notice_poll_s: float
    """How often its instances look for a notice; AWS recommends 5."""

    def __init__(self, options: Mapping[str, Any], *, environment: Mapping[str, str]) -> None:
        """``options`` come from the spec. ``environment`` is what an instance needs to reach the
        storage, credentials included: a local fleet hands it to the process, a cloud fleet
        leaves it to the instance's role. Raises :class:`~spotfirst.errors.InvalidSpec`.
        """

    @classmethod
    def settle(cls, options: Mapping[str, Any], *, now: datetime) -> dict[str, Any]:
        """The options as they are frozen into a spec, with what depends on now filled in."""

    def check(self, spec: RunSpec) -> None:
        """Raise :class:`~spotfirst.errors.InvalidSpec` for what this fleet cannot do."""

    def offers(self, instance_types: Sequence[str]) -> list[Offer]:
        """Spot and on-demand offers of all pools of these types (all types when empty)."""

    def launch(self, request: LaunchRequest) -> Instance:
        """Start an instance that runs ``python -m spotfirst.agent``, once per token.

        Its environment is that of :class:`spotfirst.agent.settings.Settings`. A fleet that knows
        how often a spot pool is interrupted tells it there, for the checkpoint period.

        Raises :class:`~spotfirst.errors.NoCapacity` or
        :class:`~spotfirst.errors.LaunchRejected`, after which no instance has this token.
        """

    def describe(self, tokens: Collection[str]) -> dict[str, Instance]:
        """The instances with these tokens; a token that the fleet does not know is left out."""

    def terminate(self, tokens: Collection[str]) -> None:
        """End these instances at once. No error for those that are gone or unknown.

        A token that was never launched can afterwards not be launched any more.
        """

    def owned(self) -> list[Instance]:
        """Every instance of Spotfirst's in this fleet that is not terminated.

        Their tags name the owner: :data:`RUN_TAG`, :data:`ATTEMPT_TAG`, :data:`STORAGE_TAG`.
        """


def load_fleet(name: str, options: Mapping[str, Any], *, environment: Mapping[str, str]) -> Fleet:
    """The fleet of this name. Raises :class:`InvalidSpec` when there is none, or for its options."""
    return fleet_class(name)(options, environment=environment)


def fleet_names() -> list[str]:
    """The fleets that are installed."""
    return sorted(_installed())


@functools.cache  # it reads the metadata of every installed package
def _installed() -> dict[str, Any]:
    # Late: a quarter of what a local instance's supervisor, which has no use for it, would import.
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group="spotfirst.fleets")}


def fleet_class(name: str) -> type[Fleet]:
    """The class behind a fleet's name."""
    found = _installed()
    if name not in found:
        msg = f"unknown fleet {name!r}; installed are: {', '.join(sorted(found)) or 'none'}"
        raise InvalidSpec(msg)
    loaded: type[Fleet] = found[name].load()
    return loaded
