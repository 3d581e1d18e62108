"""The truth about a simulated AWS region: instances, what becomes of them, and the bill.

What callers see of it, late and in AWS's shapes, is in ``ec2client``, ``clients`` and ``imds``.
Everything an instance will go through is drawn when it is launched, from the seed and its number,
so that who looks at it, and how often, changes nothing.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from datetime import datetime, timedelta
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Literal

from tests.fakes.clock import SteppedClock
from tests.fakes.market import CENT, PoolMarket

ACCOUNT = "123456789012"
FREE_WITHIN_S = 3600.0
EndedBy = Literal["aws", "user", "itself"]
PoolName = tuple[str, str]
"""(instance type, zone)."""


class Weather:
    """What a cloud is like. Times are means, in seconds; shares are of instances or answers."""

    def __init__(self, **changes: float) -> None:
        self.up_s, self.down_s, self.price_moves_s = 3600.0, 600.0, 0.0
        self.life_s = 0.0
        """Until a spot instance is interrupted, whatever its pool does; 0: never."""
        self.silent_share = 0.1
        """Of the interruptions: without any notice."""
        self.short_share = 0.1
        """Of the interruptions: with a notice shorter than two minutes."""
        self.rebalance_share = 0.3
        self.event_lost_share = self.event_twice_share = 0.1
        self.hidden_s = 0.0
        """How long at most a new instance is missing from answers; its tags may take longer."""
        self.stale_s = 0.0
        """How long at most the end of an instance is missing from answers."""
        self.flicker_share = 0.0
        """Of the answers to filters: an instance that was there before is left out."""
        self.boot_s = 30.0
        self.shutdown_s = 20.0
        self.dated_share = 1.0
        """Of the ends: the answer says when it was."""
        self.untag_s = 600.0
        """How long a terminated instance keeps its tags."""
        self.forget_s = 3600.0
        for name, value in changes.items():
            if not hasattr(self, name):
                msg = f"no such weather: {name}"
                raise TypeError(msg)
            setattr(self, name, value)


class CloudInstance:
    """One instance: what it is, and all that was and will be of it."""

    def __init__(self, cloud: Cloud, number: int, *, pool: PoolName, spot: bool) -> None:
        now = cloud.clock.now.replace(microsecond=0)
        weather, random_ = cloud.weather, random.Random(f"{cloud.seed}/instance/{number}")
        self.cloud, self.pool, self.spot = cloud, pool, spot
        self.instance_id = f"i-{random_.getrandbits(68):017x}"
        self.launched_at = now
        self.running_at = now + timedelta(seconds=round(random_.uniform(0.2, 1) * weather.boot_s))
        self.visible_at = now + timedelta(seconds=random_.uniform(0, weather.hidden_s))
        self.tagged_at = self.visible_at + timedelta(seconds=random_.uniform(0, weather.hidden_s))
        market = cloud.pools[pool]
        self.price_usd_h = market.spot_usd_h(now) if spot else market.on_demand_usd_h
        self.subnet_id = ""
        self.template: dict[str, Any] = {}
        self.tags: dict[str, str] = {}
        self.late_tags: list[tuple[datetime, dict[str, str]]] = []
        """Tags that were added, and since when they are seen."""
        self.fleet_id = ""
        self.ends_at: datetime | None = None
        """From here on nothing is billed: the instance is shutting down."""
        self.gone_at: datetime | None = None
        self.ended_by: EndedBy | None = None
        self.stopped = False
        self.stale_s = random_.uniform(0, weather.stale_s)
        self._shutdown_s = round(random_.uniform(0.1, 1) * weather.shutdown_s)
        self._end_form = random_.randrange(3) if random_.random() < weather.dated_share else -1
        self.notice_at: datetime | None = None
        self.interrupted_at: datetime | None = None
        self.rebalance_at: datetime | None = None
        if spot:
            self._draw_interruption(random_, market)

    def _draw_interruption(self, random_: random.Random, market: PoolMarket) -> None:
        weather, now = self.cloud.weather, self.launched_at
        dates = []
        if weather.life_s:
            dates.append(now + timedelta(seconds=round(random_.expovariate(1 / weather.life_s))))
        # A pool that has no capacity left takes back most of what it gave.
        until = market.lasts_until(now)
        if until is not None and random_.random() < 0.7:
            dates.append(until + timedelta(seconds=random_.randrange(30)))
        kind, notice_s, early = random_.random(), random_.randrange(10, 110), random_.random()
        if not dates:
            return
        self.notice_at = max(min(dates), now + timedelta(seconds=5))
        self.interrupted_at = self.notice_at + timedelta(seconds=120)
        if kind < weather.silent_share:
            self.notice_at = None
        elif kind < weather.silent_share + weather.short_share:
            self.notice_at = self.interrupted_at - timedelta(seconds=notice_s)
        if early < weather.rebalance_share:
            before = timedelta(seconds=random_.randrange(-20, 300))
            self.rebalance_at = max(now, (self.notice_at or self.interrupted_at) - before)

    @property
    def now(self) -> datetime:
        return self.cloud.clock.now

    def end(self, by: EndedBy, at: datetime | None = None) -> None:
        """It shuts down, unless it already does."""
        if self.ends_at is None:
            self.ends_at = (at or self.now).replace(microsecond=0)
            self.gone_at = self.ends_at + timedelta(seconds=self._shutdown_s)
            self.ended_by = by

    def stop(self) -> None:
        """Stopped, not terminated: nothing but its volume is billed."""
        if self.ends_at is None:
            self.end("user")
            self.stopped = True

    def interrupt(self, *, notice_s: float | None = 120) -> None:
        """AWS takes it back that much later; at once, and without a word, for ``None``."""
        if notice_s is None:
            self.notice_at, self.interrupted_at = None, self.now
        else:
            self.notice_at = self.now
            self.interrupted_at = self.now + timedelta(seconds=notice_s)
        self.cloud.settle()

    @property
    def is_running(self) -> bool:
        """Whether it costs money now."""
        return self.ends_at is None

    def state(self, at: datetime) -> tuple[int, str]:
        """(code, name) at a time."""
        if self.ends_at is not None and at >= self.ends_at:
            over = self.gone_at is not None and at >= self.gone_at
            if self.stopped:
                return (80, "stopped") if over else (64, "stopping")
            return (48, "terminated") if over else (32, "shutting-down")
        return (16, "running") if at >= self.running_at else (0, "pending")

    @property
    def is_dated(self) -> bool:
        """Whether answers say when it ended."""
        return "(" in self.reasons()[1]

    def reasons(self) -> tuple[dict[str, str], str]:
        """(state reason, state transition reason), in one of the forms that are seen of AWS."""
        if self.ends_at is None:
            return {}, ""
        when = f"({self.ends_at:%Y-%m-%d %H:%M:%S} GMT)"
        code, text, origin = {
            "aws": ("Server.SpotInstanceTermination", "Spot instance termination", "Service"),
            "user": ("Client.UserInitiatedShutdown", "User initiated shutdown", "User"),
            "itself": ("Client.InstanceInitiatedShutdown", "Instance initiated shutdown", ""),
        }[self.ended_by or "user"]
        reason = {"Code": code, "Message": f"{code}: {text}"}
        if self.ended_by == "user":  # this one is always dated
            return reason, f"User initiated {when}"
        if self._end_form < 0:
            return reason, "" if origin else f"{code}: {text}"
        if self._end_form == 0 and origin:
            return reason, f"{origin} initiated {when}"
        return reason, f"{code}: {text} {when}"

    def seen_tags(self, at: datetime) -> dict[str, str]:
        untagged = timedelta(seconds=self.cloud.weather.untag_s)
        if self.gone_at is not None and not self.stopped and at >= self.gone_at + untagged:
            return {}
        tags = dict(self.tags) if at >= self.tagged_at else {}
        for since, more in self.late_tags:
            if at >= since:
                tags |= more
        return tags

    # -- the bill ---------------------------------------------------------------------------

    def used_s(self) -> float:
        """Seconds that AWS counts: from the launch until it began to shut down, or until now."""
        return ((self.ends_at or self.now) - self.launched_at).total_seconds()

    @property
    def is_free(self) -> bool:
        """AWS's rule: a spot instance that AWS interrupts within its first hour."""
        return self.spot and self.ended_by == "aws" and self.used_s() < FREE_WITHIN_S

    def cost_usd(self) -> Decimal:
        """At the price of the launch, to a hundredth of a cent."""
        if self.is_free:
            return Decimal(0)
        exact = Decimal(repr(self.used_s())) * self.price_usd_h / 3600
        return exact.quantize(CENT, rounding=ROUND_HALF_UP)


class Cloud:
    """One region of one account.

    ``subnets`` maps ids to zones. ``pools`` are made from ``types`` (on-demand USD per hour by
    instance type) and the subnets' zones.
    """

    def __init__(
        self,
        seed: object = 0,
        *,
        clock: SteppedClock | None = None,
        weather: Weather | None = None,
        types: dict[str, Decimal] | None = None,
        subnets: dict[str, str] | None = None,
        region: str = "us-east-1",
        span_s: float = 6 * 3600.0,
    ) -> None:
        self.seed, self.region = seed, region
        self.clock = clock or SteppedClock()
        self.weather = weather or Weather()
        self.random = random.Random(f"{seed}/cloud")
        self.subnets = subnets or {
            "subnet-0000000000000000a": f"{region}a", "subnet-0000000000000000b": f"{region}b",
        }  # fmt: skip
        self.types = types or {"g6.xlarge": Decimal("1.006"), "g5.xlarge": Decimal("1.258")}
        self.pools: dict[PoolName, PoolMarket] = {
            (kind, zone): PoolMarket(
                f"{seed}/{kind}/{zone}", self.clock.now, on_demand_usd_h=price, span_s=span_s,
                up_s=self.weather.up_s, down_s=self.weather.down_s,
                moves_s=self.weather.price_moves_s,
            )
            for kind, price in self.types.items()
            for zone in self.subnets.values()
        }  # fmt: skip
        self.instances: dict[str, CloudInstance] = {}
        self.templates: dict[str, dict[str, Any]] = {}
        """By name: ``LaunchTemplateId``, ``LaunchTemplateData``, … as AWS describes them."""
        self.fleets: dict[str, tuple[str, dict[str, Any]]] = {}
        """By client token: what was asked for, as JSON, and the answer."""
        self.default_image = "ami-0123456789abcdef0"
        """What every public parameter of SSM's names."""
        self.launch_error: tuple[str, str] | None = None
        """(code, message) of the error that every launch ends with: a quota, a permission."""
        self.access_points: dict[str, dict[str, Any]] = {}
        """By name, as AWS describes them, with their ``Policy``."""
        self.access_point_error: tuple[str, str] | None = None
        """(code, message) of the error that making one ends with."""
        self.access_point_policy_error: tuple[str, str] | None = None
        """The same of putting a policy."""
        self.queue: list[QueuedMessage] = []
        self.calls: Counter[str] = Counter()
        self._told: set[tuple[str, str, str]] = set()

    # -- time -------------------------------------------------------------------------------

    def tick(self, seconds: float = 1.0) -> None:
        """Let time pass, a second at a time."""
        for _ in range(round(seconds)):
            self.clock.step(1)
            self.settle()

    def settle(self) -> None:
        """Bring about what is due by now."""
        now = self.clock.now
        for instance in self.instances.values():
            if instance.ends_at is not None:
                if now >= instance.ends_at:
                    state = {"state": instance.state(now)[1]}
                    self._tell(instance, "EC2 Instance State-change Notification", state)
                continue
            if instance.rebalance_at is not None and now >= instance.rebalance_at:
                self._tell(instance, "EC2 Instance Rebalance Recommendation", {})
            if instance.notice_at is not None and now >= instance.notice_at:
                action = {"instance-action": "terminate"}
                self._tell(instance, "EC2 Spot Instance Interruption Warning", action)
            if instance.interrupted_at is not None and now >= instance.interrupted_at:
                instance.end("aws", instance.interrupted_at)

    # -- launching --------------------------------------------------------------------------

    def has_capacity(self, pool: PoolName, *, spot: bool) -> bool:
        market = self.pools.get(pool)
        if market is None:
            return False
        return market.has_spot(self.clock.now) if spot else market.has_on_demand

    def launch(self, pool: PoolName, *, spot: bool) -> CloudInstance:
        instance = CloudInstance(self, len(self.instances), pool=pool, spot=spot)
        self.instances[instance.instance_id] = instance
        return instance

    def running(self) -> list[CloudInstance]:
        """The instances that cost money now."""
        return [instance for instance in self.instances.values() if instance.is_running]

    # -- events -----------------------------------------------------------------------------

    def _tell(self, instance: CloudInstance, kind: str, detail: dict[str, str]) -> None:
        """EventBridge's message into the queue: late, sometimes twice, sometimes not at all."""
        what = (instance.instance_id, kind, detail.get("state", ""))
        if what in self._told:
            return
        self._told.add(what)
        arn = f"arn:aws:ec2:{instance.pool[1]}:instance/{instance.instance_id}"
        event = {
            "version": "0",
            "id": f"{self.random.getrandbits(128):032x}",
            "detail-type": kind,
            "source": "aws.ec2",
            "account": ACCOUNT,
            "time": f"{self.clock.now:%Y-%m-%dT%H:%M:%SZ}",
            "region": self.region,
            "resources": [arn],
            "detail": {"instance-id": instance.instance_id, **detail},
        }
        draw = self.random.random()
        lost, twice = self.weather.event_lost_share, self.weather.event_twice_share
        copies = 0 if draw < lost else 2 if draw < lost + twice else 1
        for _ in range(copies):
            due = self.clock.now + timedelta(seconds=self.random.randrange(20))
            self.enqueue(json.dumps(event), due)

    def enqueue(self, body: str, due: datetime | None = None) -> None:
        """Put a message into the queue."""
        number = f"{self.random.getrandbits(64):016x}"
        self.queue.append(QueuedMessage(number, body, due or self.clock.now))


class QueuedMessage:
    """A message of the queue; ``due`` is when it can be received (again)."""

    def __init__(self, message_id: str, body: str, due: datetime) -> None:
        self.message_id, self.body, self.due = message_id, body, due
        self.receipts = 0
