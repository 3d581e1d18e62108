"""The local fleet behind the protocol of :mod:`spotfirst_airflow.fleets.base`.

Nothing is held in memory: every call reads the registry, so any process may make it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec

from spotfirst.errors import FleetUnavailable, FormatError, InvalidSpec, LaunchRejected, NoCapacity
from spotfirst.market import Market as Purchase
from spotfirst.market import Notice, Pool
from spotfirst.spec import RunSpec
from spotfirst.wire import Clock, utc_now
from spotfirst_airflow.fleets.base import (
    ATTEMPT_TAG,
    RUN_TAG,
    STORAGE_TAG,
    EndedBy,
    Instance,
    InstanceState,
    LaunchRequest,
    Offer,
)
from spotfirst_airflow.fleets.local import supervisor
from spotfirst_airflow.fleets.local.catalogue import (
    ON_DEMAND_SOURCE,
    InstanceType,
    known_types,
)
from spotfirst_airflow.fleets.local.options import LocalOptions
from spotfirst_airflow.fleets.local.processes import carrying, kill_all
from spotfirst_airflow.fleets.local.registry import (
    Boot,
    Claim,
    Folder,
    InterruptRequest,
    Registry,
    Running,
    Terminated,
    TerminateRequest,
    is_token,
)
from spotfirst_airflow.markets import Market, ZoneState, market_options

__all__ = ["LocalFleet"]

_BOOT_PATIENCE_S = 60.0
"""After so long without a supervisor, a claimed token is given up."""
_TERMINATE_PATIENCE_S = 5.0
"""After so long, a supervisor that was asked to end its instance is killed itself."""
_SWEEP_PATIENCE_S = 5.0


class LocalFleet:
    """Instances that are processes on this machine, in a spot market that is made up.

    Options: :class:`~spotfirst_airflow.fleets.local.options.LocalOptions`; unknown or impossible
    ones raise :class:`InvalidSpec`. To launch, they must have gone through :meth:`settle`.
    """

    heartbeat_s = 0.5
    notice_poll_s = 0.25
    """What specs get that leave these open. Both cost nothing here, and notices may be short."""

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        clock: Clock = utc_now,
    ) -> None:
        self._options = LocalOptions.of(options)
        self._environment = dict(environment)
        self._clock = clock
        self._market = Market(market_options(self._options.market))
        self._registry = Registry(self._options.folder)

    @classmethod
    def settle(cls, options: Mapping[str, Any], *, now: datetime) -> dict[str, Any]:
        """The options with the registry's folder, and with the market's beginning: ``now``."""
        settled = LocalOptions.of(options).settled(now)
        # Through JSON, as a spec will: what is read back must equal what was written.
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(settled))
        return plain

    def check(self, spec: RunSpec) -> None:
        """Raise :class:`InvalidSpec` for unknown instance types, or recordings that cannot play."""
        known_types(spec.instance_types)
        for zone in self._options.zones:
            self._market.at(zone, 0.0)

    def offers(self, instance_types: Sequence[str]) -> list[Offer]:
        """Every type on demand, which is always there, and on spot, in every zone."""
        now = self._clock()
        time_s = self._options.market_time_s(now)
        offers = []
        with _answering():
            for zone in self._options.zones:
                state = self._market.at(zone, time_s)
                free = state.capacity > self._running(zone)
                way_usd_gb = self._options.way_usd_gb(zone)
                for kind in known_types(instance_types):
                    pool = Pool(instance_type=kind.name, zone=zone)
                    for market in Purchase:
                        price, source = self._price(market, kind, state)
                        offers.append(
                            Offer(
                                pool=pool,
                                market=market,
                                price_usd_h=price,
                                price_source=source,
                                price_at=now,
                                available=free or market is Purchase.ON_DEMAND,
                                read_usd_gb=way_usd_gb,
                                write_usd_gb=way_usd_gb,
                            )
                        )
        return offers

    def launch(self, request: LaunchRequest) -> Instance:
        """Start an instance, or return the one that the token already has.

        Returns when the supervisor has booted. The agent follows ``boot_s`` later.
        """
        self._check_launch(request)
        with _answering():
            folder = self._registry.folder(request.token)
            if not folder.path.exists():
                self._claim(request)
            self._start(folder)
            instance = self._observe(request.token)
            self._registry.prune_sometimes(self._clock())
        if instance is None:
            ended = folder.read(Terminated)
            why = ended.rejected if ended else "its folder was deleted"
            msg = f"token {request.token} cannot be launched: {why}"
            raise LaunchRejected(msg)
        return instance

    def describe(self, tokens: Collection[str]) -> dict[str, Instance]:
        """The instances with these tokens. Ends what is left of those whose supervisor is gone."""
        with _answering():
            found = {token: self._observe(token) for token in tokens if is_token(token)}
        return {token: instance for token, instance in found.items() if instance is not None}

    def terminate(self, tokens: Collection[str]) -> None:
        """End these instances, and return when none of their processes is left."""
        with _answering():
            pending = [t for t in dict.fromkeys(tokens) if is_token(t) and self._ask_to_end(t)]
            give_up = time.monotonic() + _TERMINATE_PATIENCE_S
            while pending and time.monotonic() < give_up:
                time.sleep(0.01)
                pending = [token for token in pending if not self._is_over(token)]
            for token in pending:
                self._force(token)

    def interrupt(self, token: str, *, notice: bool = True) -> bool:
        """Let the market take a spot instance, whatever its options say; whether it will.

        For tests and rehearsals, as AWS's Fault Injection Service does it on EC2.
        """
        with _answering():
            folder = self._registry.folder(token)
            claim = folder.read(Claim) if is_token(token) else None
            if claim is None or claim.request.market is not Purchase.SPOT:
                return False
            if folder.has(Terminated):
                return False
            folder.create(InterruptRequest(at=self._clock(), notice=notice))
        return True

    def owned(self) -> list[Instance]:
        """Every living instance of this root, whichever run it is for."""
        with _answering():
            found = []
            for token in self._registry.live():
                instance = self._observe(token)
                if instance is not None and instance.state is not InstanceState.TERMINATED:
                    found.append(instance)
                elif self._registry.folder(token).has(Terminated):
                    self._registry.forget(token)
            self._registry.prune_sometimes(self._clock())
        return found

    # -- launching --------------------------------------------------------------------------

    def _check_launch(self, request: LaunchRequest) -> None:
        if not is_token(request.token):
            msg = (
                f"token {request.token!r} must be 1 to 128 letters, digits, '.', '_' or '-', "
                "and start with a letter or digit"
            )
            raise LaunchRejected(msg)
        if request.pool.zone not in self._options.zones:
            msg = (
                f"the local fleet has no zone {request.pool.zone!r}; "
                f"it has {', '.join(self._options.zones)}"
            )
            raise LaunchRejected(msg)
        if self._options.epoch is None or not self._options.root:
            msg = "the local fleet's options have no epoch or root; pass them through settle first"
            raise InvalidSpec(msg)
        try:
            known_types([request.pool.instance_type])
        except InvalidSpec as error:
            raise LaunchRejected(str(error)) from error

    def _claim(self, request: LaunchRequest) -> None:
        """Give the token an instance if there is room. Raises :class:`NoCapacity`."""
        [kind] = known_types([request.pool.instance_type])
        with self._registry.launching():
            now = self._clock()
            zone = request.pool.zone
            state = self._market.at(zone, self._options.market_time_s(now))
            running = self._running(zone)
            if request.market is Purchase.SPOT and state.capacity <= running:
                # Someone else may have launched this very token while we waited.
                if self._registry.folder(request.token).path.exists():
                    return
                msg = (
                    f"{request.pool} has no spot capacity now: {running} instances run, "
                    f"and the market has room for {state.capacity}"
                )
                raise NoCapacity(msg)
            price, source = self._price(request.market, kind, state)
            self._registry.claim(
                Claim(
                    instance_id=f"i-{secrets.token_hex(9)[:17]}",
                    request=request,
                    options=msgspec.to_builtins(self._options),
                    market_key=self._options.market_key,
                    claimed_at=now,
                    price_usd_h=price,
                    price_source=source,
                    on_demand_usd_h=kind.on_demand_usd_h,
                    clock_rate=self._options.time_scale,
                )
            )

    def _start(self, folder: Folder) -> None:
        """Start a supervisor unless there was one. Several may start at once: one boots."""
        claim = folder.read(Claim)
        if claim is None or folder.has(Boot) or folder.has(Terminated):
            return
        with folder.log.open("ab") as log:
            starter = subprocess.Popen(
                [sys.executable, "-m", supervisor.__name__, str(folder.path)],
                cwd=folder.path,  # python -m looks there first, and nobody puts code there
                env=_inherited() | self._environment | _identity(claim),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            status: int | None = starter.wait(_BOOT_PATIENCE_S)
        except subprocess.TimeoutExpired:
            status = None
        if status in {0, supervisor.LOST_BOOT}:
            return
        # An exit status of its own says that it will never work here; a signal or a hang does not.
        rejected = _why_not(folder, status) if status is not None and status > 0 else ""
        if self._give_up(folder, claim, rejected=rejected) and status is None:
            starter.kill()
        starter.wait()

    def _running(self, zone: str) -> int:
        return supervisor.older_instances(
            self._registry, market_key=self._options.market_key, zone=zone, before=None
        )

    def _price(self, market: Purchase, kind: InstanceType, state: ZoneState) -> tuple[Decimal, str]:
        if market is Purchase.ON_DEMAND:
            return kind.on_demand_usd_h, ON_DEMAND_SOURCE
        price = kind.spot_price(price_usd_h=state.price_usd_h, factor=state.price_factor)
        return price, f"local fleet: {self._options.market['kind']} market"

    # -- looking and ending -----------------------------------------------------------------

    def _observe(self, token: str) -> Instance | None:
        """The instance as it is, after burying it if its supervisor died."""
        folder = self._registry.folder(token)
        claim = folder.read(Claim)
        if claim is None:
            return None
        ended = folder.read(Terminated) or self._settle(folder, claim)
        if ended is not None and ended.rejected:
            return None
        running = folder.read(Running)
        state = InstanceState.PENDING if running is None else InstanceState.RUNNING
        request = claim.request
        way_usd_gb = self._options.way_usd_gb(request.pool.zone)
        return Instance(
            token=token,
            instance_id=claim.instance_id,
            state=state if ended is None else InstanceState.TERMINATED,
            market=request.market,
            pool=request.pool,
            started_at=claim.claimed_at,
            price_usd_h=claim.price_usd_h,
            price_source=claim.price_source,
            on_demand_usd_h=claim.on_demand_usd_h,
            clock_rate=claim.clock_rate,
            read_usd_gb=way_usd_gb,
            write_usd_gb=way_usd_gb,
            notice=folder.read(Notice),
            ended_at=ended.at if ended else None,
            ended_by=ended.by if ended else None,
            ended_why=ended.message if ended else "",
            tags=request.tags
            | {
                RUN_TAG: request.run_id,
                ATTEMPT_TAG: str(request.attempt),
                STORAGE_TAG: request.storage_url,
            },
        )

    def _settle(self, folder: Folder, claim: Claim) -> Terminated | None:
        """Find out whether an instance that nobody says has ended is alive."""
        boot = folder.read(Boot)
        if boot is None:
            if self._clock() - claim.claimed_at > timedelta(seconds=_BOOT_PATIENCE_S):
                self._give_up(folder, claim)
        elif boot.process is None:
            self._finish(folder, claim)
        elif not folder.is_held():
            self._bury(folder, claim)
        return folder.read(Terminated)

    def _give_up(self, folder: Folder, claim: Claim, *, rejected: str = "") -> bool:
        """Declare that the token will never boot, unless it has; whether it was declared."""
        if not folder.create(Boot(at=self._clock())):
            return False
        self._finish(folder, claim, rejected=rejected)
        return True

    def _finish(self, folder: Folder, claim: Claim, *, rejected: str = "") -> None:
        """Write down the end of an instance that never began, and so lasted no time."""
        by: EndedBy = "request" if folder.has(TerminateRequest) else "unknown"
        ended = Terminated(
            at=claim.claimed_at, by=by, message="it was never started", rejected=rejected
        )  # fmt: skip
        folder.create(ended)
        self._registry.forget(claim.request.token)

    def _bury(self, folder: Folder, claim: Claim) -> None:
        """End what a dead supervisor left, and write down that it ended."""
        if folder.has(Terminated):  # its own last word, written just now
            return

        def left() -> Any:
            return carrying(supervisor.INSTANCE_ID_VARIABLE, claim.instance_id)

        if not kill_all(left, patience_s=_SWEEP_PATIENCE_S):
            return  # not proven gone, so not terminated
        by: EndedBy = "request" if folder.has(TerminateRequest) else "unknown"
        at = max(folder.last_alive() or claim.claimed_at, claim.claimed_at)
        folder.create(Terminated(at=at, by=by, message="its supervisor died"))
        self._registry.forget(claim.request.token)

    def _ask_to_end(self, token: str) -> bool:
        """Ask an instance to end; whether there is an end to wait for."""
        now = self._clock()
        if self._registry.withdraw(token, now):
            return False
        folder = self._registry.folder(token)
        claim = folder.read(Claim)
        if claim is None or folder.has(Terminated):
            return False
        folder.create(TerminateRequest(at=now))
        if self._give_up(folder, claim):
            return False
        boot = folder.read(Boot)
        if boot is not None and boot.process is not None:
            boot.process.send(signal.SIGTERM)  # only wakes it: it polls for the request
        return True

    def _force(self, token: str) -> None:
        """End an instance whose supervisor does not do as it was asked."""
        boot = self._registry.folder(token).read(Boot)
        if boot is not None and boot.process is not None:
            boot.process.send(signal.SIGKILL)
        give_up = time.monotonic() + _SWEEP_PATIENCE_S
        while not self._is_over(token):
            if time.monotonic() > give_up:
                msg = f"instance {token} does not end; look at {self._registry.root}"
                raise FleetUnavailable(msg)
            time.sleep(0.01)

    def _is_over(self, token: str) -> bool:
        folder = self._registry.folder(token)
        claim = folder.read(Claim)
        return claim is None or folder.has(Terminated) or self._settle(folder, claim) is not None


def _inherited() -> dict[str, str]:
    """What an instance gets of this process's environment: not Airflow's secrets, nor our own."""
    mine = ("AIRFLOW", "_AIRFLOW", "SPOTFIRST_")
    return {name: value for name, value in os.environ.items() if not name.startswith(mine)}


def _identity(claim: Claim) -> dict[str, str]:
    return {
        "SPOTFIRST_INSTANCE": claim.request.token,
        supervisor.INSTANCE_ID_VARIABLE: claim.instance_id,
    }


def _why_not(folder: Folder, status: int) -> str:
    lines = folder.log.read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it said nothing"
    return f"its supervisor ended with {status}: {last} (all in {folder.log})"


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """What goes wrong with the registry's files says nothing about the instances."""
    try:
        yield
    except OSError as error:
        msg = (
            f"the local fleet's files cannot be used: {error}; "
            "check the disk, its permissions and the fleet's option root"
        )
        raise FleetUnavailable(msg) from error
    except FormatError as error:
        msg = f"the local fleet's files cannot be read: {error}"
        raise FleetUnavailable(msg) from error
