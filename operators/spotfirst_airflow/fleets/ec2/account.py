"""What an account has that hardly ever changes: asked once per process, shared by all its fleets."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from datetime import datetime
from typing import Any, ClassVar

from spotfirst.errors import InvalidSpec, LaunchRejected
from spotfirst.market import Pool
from spotfirst.wire import Record
from spotfirst_airflow.fleets.ec2.aws import Aws, call

__all__ = ["Account", "Image", "pages"]

IMAGE_TTL_S = 24 * 3600.0
"""How long the image behind a public parameter is taken for today's. AWS patches it every few weeks."""
_SSM = "ssm:"


class Image(Record):
    """A machine image, and what a launch must know of it to say how large its disk is."""

    image_id: str
    root_device: str
    root_gb: int = 0


class Account:
    """Subnets, images, and which types are offered where. Thread-safe.

    Every method raises :class:`~spotfirst.errors.InvalidSpec` for what is not there, and
    :class:`~spotfirst.errors.FleetUnavailable` and :class:`~spotfirst.errors.LaunchRejected`.
    """

    _shared: ClassVar[dict[Hashable, Account]] = {}
    _sharing = threading.Lock()

    def __init__(self, aws: Aws, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._aws = aws
        self._monotonic = monotonic
        self._lock = threading.RLock()
        self._zones: dict[tuple[str, ...], dict[str, str]] = {}
        self._images: dict[str, tuple[float, Image]] = {}
        self._offered: dict[str, frozenset[str]] = {}
        self.templates: set[str] = set()
        """Names of launch templates that are known to be there."""
        self.mismatches: dict[str, datetime] = {}
        """Since when EC2 has been refusing a token for its parameters."""

    @classmethod
    def of(cls, aws: Aws) -> Account:
        """The one of this process that all with the same identity share."""
        with cls._sharing:
            return cls._shared.setdefault(aws.identity.key, cls(aws))

    @classmethod
    def forget_all(cls) -> None:
        """Ask anew from here on. A forked child must: its parent's locks may be held for ever."""
        cls._sharing = threading.Lock()
        cls._shared = {}

    def subnets(self, ids: Sequence[str]) -> dict[str, str]:
        """The subnet to use in each zone. Of several in one zone, the first that is named.

        EC2 Fleet takes no two: they would be the same capacity pool twice.
        """
        key = tuple(ids)
        with self._lock:
            if key not in self._zones:
                answer = self._ask("subnets", key, "describe_subnets", SubnetIds=list(ids))
                zones = {each["SubnetId"]: each["AvailabilityZone"] for each in answer["Subnets"]}
                by_zone: dict[str, str] = {}
                for subnet in ids:
                    if subnet not in zones:
                        msg = f"fleet option subnets: {subnet} is not in {self._aws.region}"
                        raise InvalidSpec(msg)
                    by_zone.setdefault(zones[subnet], subnet)
                self._zones[key] = by_zone
            return self._zones[key]

    def image(self, ami: str) -> Image:
        """The image of the fleet option ``ami``; behind ``ssm:``, the one of today."""
        now = self._monotonic()
        with self._lock:
            asked_at, image = self._images.get(ami, (now, None))
            if image is None or now - asked_at > IMAGE_TTL_S:
                image = self._image(ami)
                self._images[ami] = now, image
            return image

    def forget_image(self, ami: str) -> None:
        """Look again for what is behind ``ami``: AWS says that the image is gone."""
        with self._lock:
            self._images.pop(ami, None)

    def offered(self, types: Collection[str], zones: Collection[str]) -> list[Pool]:
        """Those pools that there are: not every zone has every type."""
        with self._lock:
            unknown = sorted(set(types) - self._offered.keys())
            if unknown:
                found: dict[str, set[str]] = {name: set() for name in unknown}
                for answer in pages(
                    self._aws.client("ec2").describe_instance_type_offerings,
                    LocationType="availability-zone",
                    Filters=[{"Name": "instance-type", "Values": unknown}],
                ):
                    for each in answer["InstanceTypeOfferings"]:
                        found.setdefault(each["InstanceType"], set()).add(each["Location"])
                self._offered.update({name: frozenset(where) for name, where in found.items()})
            return [
                Pool(instance_type=name, zone=zone)
                for name in types
                for zone in zones
                if zone in self._offered[name]
            ]

    def _image(self, ami: str) -> Image:
        image_id = ami
        if ami.startswith(_SSM):
            client = self._aws.client("ssm")
            try:
                answer = call(client.get_parameter, Name=ami.removeprefix(_SSM))
            except LaunchRejected as error:
                msg = f"fleet option ami: {ami} names no public parameter here: {error}"
                raise InvalidSpec(msg) from error
            image_id = answer["Parameter"]["Value"]
        described = self._ask("ami", ami, "describe_images", ImageIds=[image_id])["Images"]
        if not described:
            msg = f"fleet option ami: there is no {image_id} in {self._aws.region}"
            raise InvalidSpec(msg)
        root = described[0].get("RootDeviceName", "")
        disks = {
            each.get("DeviceName"): each.get("Ebs", {})
            for each in described[0].get("BlockDeviceMappings", ())
        }
        if not root:
            msg = f"fleet option ami: {image_id} names no root device; take another image"
            raise InvalidSpec(msg)
        size = int(disks.get(root, {}).get("VolumeSize") or 0)
        return Image(image_id=image_id, root_device=root, root_gb=size)

    def _ask(self, option: str, value: object, method: str, **parameters: Any) -> Any:
        try:
            return call(getattr(self._aws.client("ec2"), method), **parameters)
        except LaunchRejected as error:
            msg = f"fleet option {option} is {value!r}: {error}"
            raise InvalidSpec(msg) from error


os.register_at_fork(after_in_child=Account.forget_all)


def pages(action: Any, **parameters: Any) -> Iterator[Any]:
    """The answers of a call that answers by the page."""
    token = ""
    while True:
        answer = call(action, **parameters, **({"NextToken": token} if token else {}))
        yield answer
        token = answer.get("NextToken") or ""
        if not token:
            return
