"""The EC2 fleet of several regions: one fleet each, and which of them a call is for.

A zone's name begins with its region's, so the pool of an intent says where its launch goes, before
a crash and after it. Nothing else is launched anywhere, so a token's instance is nowhere else.

What one region does not answer, the others need not wait for: its offers are left out, and an
instance is asked for only where it was launched. Only of tokens of which this process does not know
where they are, every region has to speak before anything is said.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Protocol, TypeVar

import msgspec

from spotfirst.errors import FleetUnavailable, InvalidSpec, LaunchRejected
from spotfirst.market import Pool
from spotfirst.run import Run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage
from spotfirst.wire import Clock, utc_now
from spotfirst_airflow.fleets.base import Instance, LaunchRequest, Offer
from spotfirst_airflow.fleets.ec2.fleet import Ec2Fleet
from spotfirst_airflow.fleets.ec2.options import Ec2Options

__all__ = ["Ec2Regions"]

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

OFFERS_AGAIN = timedelta(seconds=60)
"""A region that gave no offers is left alone for so long: to wait for it takes the others' time."""


class _Make(Protocol):
    def __call__(
        self, options: Mapping[str, Any], *, environment: Mapping[str, str]
    ) -> Ec2Fleet: ...


class Ec2Regions:
    """Instances on EC2, in the fleet option ``region`` and in those of ``elsewhere``.

    Without the latter it is the fleet of one region and nothing more. ``make`` makes those fleets.
    """

    heartbeat_s = Ec2Fleet.heartbeat_s
    notice_poll_s = Ec2Fleet.notice_poll_s

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        clock: Clock = utc_now,
        make: _Make = Ec2Fleet,
    ) -> None:
        parsed = Ec2Options.of(options)
        self._fleets = {
            each.region: make(msgspec.to_builtins(each), environment=environment)
            for each in parsed.regions()
        }
        self._main = self._fleets[parsed.region]
        self._clock = clock
        self._silent: dict[str, datetime] = {}
        """Since when a region has given no offers, that was asked then."""
        self._where: dict[str, Ec2Fleet] = {}
        """By token: the fleet that has launched it."""
        self.keep_s = self._main.keep_s

    settle = Ec2Fleet.settle

    def check(self, spec: RunSpec) -> None:
        """Raise :class:`InvalidSpec` for what cannot be launched in one of the regions."""
        for region, fleet in self._fleets.items():
            try:
                fleet.check(spec)
            except InvalidSpec as error:
                if len(self._fleets) == 1:
                    raise
                msg = f"in {region}: {error}; mend it, or leave the region out"
                raise InvalidSpec(msg) from error

    def prepare(self, storage: Storage) -> None:
        """As :meth:`Ec2Fleet.prepare`: there is one storage for all."""
        self._main.prepare(storage)

    def offers(self, instance_types: Sequence[str]) -> list[Offer]:
        """Those of all regions that answer. Raises :class:`FleetUnavailable` when none does."""
        found: list[Offer] = []
        failed: dict[str, FleetUnavailable] = {}
        now = self._clock()
        silent = {r for r, since in self._silent.items() if now - since < OFFERS_AGAIN}
        asked = self._fleets.keys() - silent or self._fleets.keys()
        for region, fleet in self._fleets.items():
            if region not in asked:
                continue
            try:
                found += fleet.offers(instance_types)
                self._silent.pop(region, None)
            except FleetUnavailable as error:
                failed[region], self._silent[region] = error, now
        if len(failed) == len(asked):
            self._silent.clear()
            raise _together(failed)
        for region, why in failed.items():
            _log.warning("No offers of %s: %s", region, why)
        return found

    def launch(self, request: LaunchRequest) -> Instance:
        """In the region of the request's pool, and of its ``others`` in those that are there."""
        fleet = self._fleet_of(request.pool)
        if fleet is None:
            msg = f"{request.pool} is in none of the regions {', '.join(self._fleets)}"
            raise LaunchRejected(msg)
        others = tuple(pool for pool in request.others if self._fleet_of(pool) is fleet)
        instance = fleet.launch(msgspec.structs.replace(request, others=others))
        self._where[request.token] = fleet
        return instance

    def describe(self, tokens: Collection[str]) -> dict[str, Instance]:
        """The instances with these tokens.

        Raises :class:`FleetUnavailable` when a region does not answer that may have one of them.
        """
        found: dict[str, Instance] = {}
        for fleet, mine in self._placed(tokens).items():
            found |= fleet.describe(mine)
        left = [token for token in tokens if token not in self._where]
        failed: dict[str, FleetUnavailable] = {}
        for region, fleet in self._fleets.items():
            left = [token for token in left if token not in found]
            if not left:
                return found
            try:
                found |= fleet.describe(left)
            except FleetUnavailable as error:
                failed[region] = error
        if failed and any(token not in found for token in left):
            raise _together(failed)
        return found

    def recall(self, instances: Collection[Instance]) -> None:
        """What the journal knows; see :class:`spotfirst_airflow.recalling.Recalls`."""
        for instance in instances:
            fleet = self._fleet_of(instance.pool)
            if fleet is not None:
                self._where[instance.token] = fleet
                fleet.recall([instance])

    def terminate(self, tokens: Collection[str]) -> None:
        """End these instances, where they are; a token that is nowhere yet, in every region.

        Every region is asked before :class:`FleetUnavailable` is raised for one.
        """
        placed = self._placed(tokens)
        lost = [token for token in tokens if token not in self._where]
        self._everywhere(lambda fleet: fleet.terminate([*placed.get(fleet, ()), *lost]))

    def warnings(self) -> list[str]:
        """Those of all regions."""
        return [text for fleet in self._fleets.values() for text in fleet.warnings()]

    def owned(self) -> list[Instance]:
        """Every instance of Spotfirst's in all regions, which all have to answer."""
        return [each for found in self._everywhere(Ec2Fleet.owned) for each in found]

    # -- beyond the protocol ----------------------------------------------------------------

    def keep(self, token: str, *, until: datetime) -> str:
        """As :meth:`Ec2Fleet.keep`, where the instance is."""
        refused: LaunchRejected | None = None
        fleets = [self._where[token]] if token in self._where else list(self._fleets.values())
        for fleet in fleets:
            try:
                return fleet.keep(token, until=until)
            except LaunchRejected as error:
                refused = error
        assert refused is not None
        raise refused

    def tidy(self, is_over: Callable[[Mapping[str, str]], bool]) -> int:
        """As :meth:`Ec2Fleet.tidy`, in all regions."""
        return sum(self._everywhere(lambda fleet: fleet.tidy(is_over)))

    def admit(self, run: Run, spec: RunSpec, instances: Sequence[tuple[str, Pool]]) -> None:
        """As :meth:`Ec2Fleet.admit`, in all regions: there is one storage."""
        self._main.admit(run, spec, instances, region_of=self._region_of)

    def dismiss(self, run: Run) -> None:
        """As :meth:`Ec2Fleet.dismiss`."""
        self._main.dismiss(run)

    def price_timeline(self, instance: Instance) -> list[tuple[datetime, Decimal]]:
        """As :meth:`Ec2Fleet.price_timeline`, where the instance was."""
        fleet = self._fleet_of(instance.pool)
        return fleet.price_timeline(instance) if fleet is not None else []

    # -- which region -----------------------------------------------------------------------

    def _fleet_of(self, pool: Pool) -> Ec2Fleet | None:
        """That of the region whose name the pool's zone begins with."""
        if len(self._fleets) == 1:
            return self._main  # it says itself what is not there, and may have no name yet
        found = [region for region in self._fleets if pool.zone.startswith(region)]
        return self._fleets[max(found, key=len)] if found else None

    def _region_of(self, pool: Pool) -> str:
        """Also of one that the options do not name any more."""
        fleet = self._fleet_of(pool)
        return fleet.region if fleet is not None else pool.zone[:-1]

    def _placed(self, tokens: Iterable[str]) -> dict[Ec2Fleet, list[str]]:
        found: dict[Ec2Fleet, list[str]] = {}
        for token in tokens:
            if token in self._where:
                found.setdefault(self._where[token], []).append(token)
        return found

    def _everywhere(self, action: Callable[[Ec2Fleet], _T]) -> list[_T]:
        """What every region gives. Raises after all were asked."""
        given: list[_T] = []
        failed: dict[str, FleetUnavailable] = {}
        for region, fleet in self._fleets.items():
            try:
                given.append(action(fleet))
            except FleetUnavailable as error:
                failed[region] = error
        if failed:
            raise _together(failed)
        return given


def _together(failed: Mapping[str, FleetUnavailable]) -> FleetUnavailable:
    """One error for those of several regions."""
    if len(failed) == 1:
        [error] = failed.values()
        return error
    return FleetUnavailable("; ".join(f"{region}: {error}" for region, error in failed.items()))
