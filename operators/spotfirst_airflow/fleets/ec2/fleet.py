"""The fleet of one region: the calls of :class:`~spotfirst_airflow.fleets.Fleet`, on EC2.

Nothing is remembered that EC2 does not know as well: any process may make any call. What a process
holds in memory (clients, answers of EC2, what it asked to end) is shared by all of its fleets with
the same identity.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec

from spotfirst.errors import FleetError, FleetUnavailable, InvalidSpec, LaunchRejected
from spotfirst.market import Market, Pool
from spotfirst.run import Run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage
from spotfirst.wire import Clock, utc_now
from spotfirst_airflow.fleets.base import KEEP_TAG, Instance, LaunchRequest, Offer
from spotfirst_airflow.fleets.ec2 import template, wheelhouse
from spotfirst_airflow.fleets.ec2.accesspoints import AccessPoints
from spotfirst_airflow.fleets.ec2.account import Account
from spotfirst_airflow.fleets.ec2.aws import Aws, Identity, call
from spotfirst_airflow.fleets.ec2.ending import Endings
from spotfirst_airflow.fleets.ec2.instances import Priced, described_of, instance_of, is_over
from spotfirst_airflow.fleets.ec2.launching import Launcher, look_up
from spotfirst_airflow.fleets.ec2.notices import open_with
from spotfirst_airflow.fleets.ec2.options import Ec2Options
from spotfirst_airflow.fleets.ec2.prices import SPOT_TTL_S, Price, Prices
from spotfirst_airflow.fleets.ec2.userdata import user_data
from spotfirst_airflow.fleets.ec2.watching import Seen, Watcher

__all__ = ["Ec2Fleet"]

Publish = Callable[[Storage, Sequence[str]], str]
"""Puts the wheels for these Pythons into a storage; their keys, as the user data takes them."""


class Ec2Fleet:
    """Instances on EC2, in one region; of several, see :mod:`~spotfirst_airflow.fleets.ec2.regions`.

    Options: :class:`~spotfirst_airflow.fleets.ec2.options.Ec2Options`; unknown or impossible ones
    raise :class:`InvalidSpec`. ``elsewhere`` is not looked at. Making a fleet asks AWS nothing.

    ``aws``, ``watcher``, ``prices`` and ``publish`` are for tests; by default they are made for the
    identity that the options and the environment name, and shared with all fleets of this process.
    """

    heartbeat_s = 5.0
    notice_poll_s = 5.0

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        environment: Mapping[str, str],
        clock: Clock = utc_now,
        aws: Aws | None = None,
        watcher: Watcher | None = None,
        prices: Prices | None = None,
        publish: Publish = wheelhouse.publish_all,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._options = Ec2Options.of(options)
        self._environment = dict(environment)
        self._clock = clock
        self._given_aws, self._given_watcher, self._given_prices = aws, watcher, prices
        self._publish = publish
        self._monotonic = monotonic
        self._asked_types: list[str] = []
        """Whose spot prices were asked for last: all of one run's types are one call."""
        self._access_points: AccessPoints | None = None
        self.keep_s = 3600 * self._options.keep_h if self._options.on_failure == "keep" else 0.0

    @classmethod
    def settle(cls, options: Mapping[str, Any], *, now: datetime) -> dict[str, Any]:  # noqa: ARG003
        """The options with all defaults. The image behind ``ssm:`` stays open: AWS patches it."""
        # Through JSON, as a spec will: what is read back must equal what was written.
        plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(Ec2Options.of(options)))
        return plain

    def check(self, spec: RunSpec) -> None:
        """Raise :class:`InvalidSpec` for what cannot be launched, as far as AWS tells.

        When AWS does not answer, nothing is said: the launch will tell.
        """
        self._options.check_launch()
        if spec.instance_types and self._options.requirements is not None:
            msg = (
                f"run {spec.run_id}: instance_types and the fleet option requirements are both "
                "given; leave one out"
            )
            raise InvalidSpec(msg)
        for name, value in spec.tags.items():
            if len(value) > template.LONGEST_TAG:
                msg = (
                    f"run {spec.run_id}: the tag {name} has {len(value)} characters, and EC2 takes "
                    f"{template.LONGEST_TAG}"
                )
                raise InvalidSpec(msg)
        types = self._types(spec.instance_types)
        for name in types:
            try:
                self._prices.on_demand(name)
            except InvalidSpec as error:
                msg = f"instance_types has {name!r}: {error}"
                raise InvalidSpec(msg) from error
        try:
            zones = self._account.subnets(self._options.subnets)
            if not self._account.offered(types, zones):
                msg = (
                    f"run {spec.run_id}: none of the instance_types {', '.join(types)} is offered in "
                    f"{', '.join(zones)}; give other instance types, or subnets in other zones"
                )
                raise InvalidSpec(msg)
            self._account.image(self._options.ami)
        except LaunchRejected as error:
            msg = f"run {spec.run_id} could not be launched: {error}"
            raise InvalidSpec(msg) from error
        except FleetUnavailable:
            return

    def prepare(self, storage: Storage) -> None:
        """Put the instances' wheels into the storage; see :class:`submission.Prepares`.

        Here, and not in a launch: a triggerer with many runs must not wait for a download. The
        launch looks again, as the version may be another one there. Raises as
        :func:`wheelhouse.publish`.
        """
        self._publish(storage, self._options.python_versions)

    def offers(self, instance_types: Sequence[str]) -> list[Offer]:
        """Spot and on-demand offers in the zones of our subnets; no types: by the requirements.

        A pool that has no spot price sells none. That one has capacity is never known before.
        """
        offers: list[Offer] = []
        unpriced: dict[str, str] = {}
        with _passing():
            types = self._types(instance_types)
            zones = self._account.subnets(self._options.subnets)
            pools = self._account.offered(types, zones)
            spot = self._prices.spot(types, zones)
            self._asked_types = types
            for pool in pools:
                try:
                    offers += self._offers_of(pool, spot.get(pool))
                except InvalidSpec as error:
                    unpriced[pool.instance_type] = str(error)
        if unpriced and not offers:
            raise FleetUnavailable("; ".join(unpriced.values()))
        return offers

    def _offers_of(self, pool: Pool, spot: Price | None) -> list[Offer]:
        """Raises :class:`InvalidSpec` without an on-demand price, which savings are counted by."""
        prices = {Market.ON_DEMAND: self._prices.on_demand(pool.instance_type)}
        if spot is not None:
            prices[Market.SPOT] = spot
        read_usd_gb, write_usd_gb = self._way_usd_gb()
        return [
            Offer(
                pool=pool,
                market=market,
                price_usd_h=price.usd_h,
                price_source=price.source,
                price_at=price.at,
                read_usd_gb=read_usd_gb,
                write_usd_gb=write_usd_gb,
            )
            for market, price in prices.items()
        ]

    def launch(self, request: LaunchRequest) -> Instance:
        """Start an instance, or return the one that the token already has.

        It may be terminated by now. A quota that is used up is no capacity in that market.
        """
        if self._endings.is_withdrawn(request.token):
            msg = f"token {request.token} was ended before it was launched"
            raise LaunchRejected(msg)
        launcher = Launcher(self._aws, self._options, user_data=self._user_data, clock=self._clock)
        try:
            self._options.check_launch()
            described = launcher.launch(request)
        except InvalidSpec as error:
            raise LaunchRejected(str(error)) from error
        watcher = self._watcher
        watcher.saw(described, token=request.token)
        if self._endings.is_withdrawn(request.token):  # ended while it was being launched
            self._endings.pursue(watcher, clock=self._clock)
        instance = instance_of(described, price=self._price)
        return self._with_way(msgspec.structs.replace(instance, token=request.token))

    def describe(self, tokens: Collection[str]) -> dict[str, Instance]:
        """The instances with these tokens, as EC2 knew them at most some seconds ago."""
        found = self._watcher.find(tokens)
        self._endings.pursue(self._watcher, clock=self._clock)
        return {token: self._instance(seen, price=self._price) for token, seen in found.items()}

    def recall(self, instances: Collection[Instance]) -> None:
        """What the journal knows, for a process that has just begun.

        See :class:`spotfirst_airflow.recalling.Recalls`.
        """
        for instance in instances:
            self._watcher.saw(described_of(instance), token=instance.token)

    def terminate(self, tokens: Collection[str]) -> None:
        """End these instances at once: also those that were launched elsewhere a moment ago.

        What that can mean for a token that was never launched: see
        :mod:`spotfirst_airflow.fleets.ec2.ending`.
        """
        if tokens:
            with _passing():
                self._endings.end(tokens, self._watcher, clock=self._clock)

    def warnings(self) -> list[str]:
        """What people should know who look at a run of this fleet."""
        return self._watcher.warnings()

    def owned(self) -> list[Instance]:
        """Every instance of Spotfirst's that is not terminated, also a stopped one.

        With what it costs now, since that is asked for all at once.
        """
        seen = self._watcher.owned()
        self._endings.pursue(self._watcher, clock=self._clock)
        return [self._instance(each, price=self._price_now) for each in seen]

    # -- beyond the protocol ----------------------------------------------------------------

    def keep(self, token: str, *, until: datetime) -> str:
        """Mark the instance as wanted until then; the command that opens a shell on it.

        See :class:`spotfirst_airflow.keeping.Keeps`.
        """
        seen = self._watcher.find([token]).get(token)
        found = [seen.described] if seen else look_up(self._aws, [token]).get(token, [])
        alive = [each for each in found if not is_over(each)]
        if not alive:
            msg = f"the instance of {token} is gone, so it cannot be kept"
            raise LaunchRejected(msg)
        instance_id = alive[0]["InstanceId"]
        call(
            self._aws.client("ec2").create_tags,
            Resources=[instance_id],
            Tags=[{"Key": KEEP_TAG, "Value": until.isoformat()}],
        )
        self._watcher.expire()
        return f"aws ssm start-session --region {self._aws.region} --target {instance_id}"

    def tidy(self, is_over: Callable[[Mapping[str, str]], bool]) -> int:
        """Delete launch templates and access points of runs that are over.

        See :class:`reaping.Tidies`.
        """
        with _passing():
            removed = template.tidy(self._aws, is_over)
            points = self._points
            return removed + (points.tidy(is_over) if points is not None else 0)

    def admit(
        self,
        run: Run,
        spec: RunSpec,
        instances: Sequence[tuple[str, Pool]],
        *,
        region_of: Callable[[Pool], str] | None = None,
    ) -> None:
        """Let these instances use the storage; see :class:`spotfirst_airflow.separating.Separates`.

        ``region_of`` tells where a pool is, should it not be here.
        """
        with _without_invalid():
            points = self._points
            if points is not None:
                placed = [(i, region_of(p) if region_of else self.region) for i, p in instances]
                points.admit(run.root.url, run.run_id, spec, placed)

    def dismiss(self, run: Run) -> None:
        """Remove the run's access point."""
        with _without_invalid():
            points = self._points
            if points is not None:
                points.dismiss(run.root.url, run.run_id)

    def price_timeline(self, instance: Instance) -> list[tuple[datetime, Decimal]]:
        """What its pool cost while it ran; see :class:`spotfirst_airflow.timelines.TellsPrices`."""
        with _passing():
            return self._prices.spot_between(
                instance.pool, instance.started_at, instance.ended_at or self._clock()
            )

    # -- what it is made of -----------------------------------------------------------------

    @property
    def region(self) -> str:
        """Where its instances are. Raises :class:`InvalidSpec` when nothing says so."""
        return self._aws.region

    @property
    def _aws(self) -> Aws:
        if self._given_aws is not None:
            return self._given_aws
        identity = Identity(
            region=self._options.region,
            aws_conn_id=self._options.aws_conn_id,
            endpoint_url=self._options.endpoint_url,
            environment=self._environment,
        )
        return Aws.of(identity)

    @property
    def _points(self) -> AccessPoints | None:
        """Where runs are kept apart."""
        stack = self._options.separate_runs
        if stack is not None and self._access_points is None:
            self._access_points = AccessPoints(
                self._aws, stack, clock=self._clock, monotonic=self._monotonic
            )
        return self._access_points

    @property
    def _account(self) -> Account:
        return Account.of(self._aws)

    @property
    def _endings(self) -> Endings:
        return Endings.of(self._aws)

    @property
    def _prices(self) -> Prices:
        if self._given_prices is None:
            self._given_prices = Prices(self._aws, clock=self._clock)
        return self._given_prices

    @property
    def _watcher(self) -> Watcher:
        if self._given_watcher is None:
            self._given_watcher = Watcher.of(
                self._aws, self._options.queue_url, environment=self._environment
            )
        return self._given_watcher

    def _types(self, instance_types: Sequence[str]) -> list[str]:
        if instance_types:
            return list(dict.fromkeys(instance_types))
        if self._options.requirements is None:
            msg = (
                "the EC2 fleet needs instance_types, such as g6.xlarge, or the fleet option "
                "requirements"
            )
            raise InvalidSpec(msg)
        return self._prices.matching(self._options.requirements)

    def _user_data(self, request: LaunchRequest) -> str:
        storage = open_with(request.storage_url, self._environment)
        options, points = self._options, self._points
        way = request.storage_url
        if points is not None:
            way = points.way(request.storage_url, request.run_id)
        return user_data(
            storage_url=way,
            # Of the storage: nothing else that the instance calls is of one region.
            region=options.storage_region or self._aws.region,
            run_id=request.run_id,
            max_life_s=request.max_life_s,
            spec_digest=request.spec_digest,
            wheelhouse=self._publish(storage, options.python_versions),
            python=options.python,
            image=options.image,
            endpoint_url=self._environment.get("AWS_ENDPOINT_URL_S3", ""),
            keep_h=self.keep_s / 3600,
            interruption_mean_s=3600 * options.interruption_mean_h,
            pip_install=options.pip_install,
            pip_index=options.pip_index,
        )

    def _instance(self, seen: Seen, *, price: Priced) -> Instance:
        instance = instance_of(seen.described, price=price)
        # A terminated instance may have lost its tags.
        instance = msgspec.structs.replace(
            instance, token=seen.token or instance.token, notice=seen.notice
        )
        return self._with_way(instance)

    def _with_way(self, instance: Instance) -> Instance:
        read_usd_gb, write_usd_gb = self._way_usd_gb()
        return msgspec.structs.replace(instance, read_usd_gb=read_usd_gb, write_usd_gb=write_usd_gb)

    def _way_usd_gb(self) -> tuple[Decimal, Decimal]:
        """What a GB costs that is read from the storage here, and written to it."""
        if not self._options.storage_region:
            return Decimal(0), Decimal(0)
        return self._options.way_usd_gb(self._aws.region)

    def _price(self, pool: Pool, market: Market, at: datetime) -> tuple[Decimal, str, Decimal]:
        """What an instance costs that was launched then.

        Never fails: what is not known is said in the source. Right after the launch, the spot price
        is that of now, which is at most a minute old; later, as for a run whose controllers were
        all gone just then, that of the launch. Without one, the on-demand price stands for it: a
        budget must not be passed because EC2 did not answer.
        """
        is_new = self._clock() - at < timedelta(seconds=SPOT_TTL_S)
        return self._price_at(pool, market, None if is_new else at)

    def _price_now(self, pool: Pool, market: Market, _: datetime) -> tuple[Decimal, str, Decimal]:
        """What an instance costs now: one call for all that are of one type."""
        return self._price_at(pool, market, None)

    def _price_at(
        self, pool: Pool, market: Market, at: datetime | None
    ) -> tuple[Decimal, str, Decimal]:
        try:
            on_demand = self._prices.on_demand(pool.instance_type)
        except InvalidSpec:
            on_demand = None
        list_usd_h = on_demand.usd_h if on_demand else Decimal(0)
        if market is Market.SPOT:
            with contextlib.suppress(FleetError):
                price = self._prices.spot_at(pool, at) if at else None
                if price is None:
                    known = pool.instance_type in self._asked_types
                    types = self._asked_types if known else [pool.instance_type]
                    price = self._prices.spot(types, [pool.zone]).get(pool)
                if price is not None:
                    return price.usd_h, price.source, list_usd_h or price.usd_h
        if on_demand is None:
            return Decimal(0), "not known: no price table has this type", Decimal(0)
        why = " (the spot price is not known)" if market is Market.SPOT else ""
        return on_demand.usd_h, on_demand.source + why, on_demand.usd_h


@contextlib.contextmanager
def _passing() -> Iterator[None]:
    """Outside of a launch a refusal ends nothing: people mend it while the run goes on."""
    try:
        yield
    except (LaunchRejected, InvalidSpec) as error:
        raise FleetUnavailable(str(error)) from error


@contextlib.contextmanager
def _without_invalid() -> Iterator[None]:
    """A connection that is not there now may be there later."""
    try:
        yield
    except InvalidSpec as error:
        raise FleetUnavailable(str(error)) from error
