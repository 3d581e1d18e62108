"""What ``fleet_options`` may say about EC2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

import msgspec

from spotfirst.errors import InvalidSpec
from spotfirst.wire import Record
from spotfirst_airflow.fleets.ec2.egress import egress_usd_gb
from spotfirst_airflow.fleets.options import parse, require

__all__ = ["Ec2Options", "Elsewhere", "Requirements", "SeparateRuns"]

DEFAULT_AMI = (
    "ssm:/aws/service/deeplearning/ami/x86_64/"
    "oss-nvidia-driver-gpu-pytorch-2.10-ubuntu-24.04/latest/ami-id"
)
"""AWS's Deep Learning AMI: drivers, CUDA, Python and torch are in it."""

_SUBNET = re.compile(r"subnet-[0-9a-f]+")
_PROFILE = re.compile(r"[\w+=,.@-]{1,128}", re.ASCII)
_GROUP = re.compile(r"sg-[0-9a-f]+")
_PYTHON = re.compile(r"3\.[1-9]\d")
_REGION = re.compile(r"[a-z]{2,}(-[a-z]+)+-\d+")
_EVERYWHERE = ("ssm:", "alias/")
_POINTS = re.compile(
    r"arn:[a-z-]+:s3:[a-z0-9-]+:\d{12}:accesspoint/[a-z0-9][a-z0-9-]{1,22}[a-z0-9]"
)
_ROLE = re.compile(r"arn:[a-z-]+:iam::\d{12}:role/[\w+=,.@/-]+", re.ASCII)
_AMI = re.compile(r"ami-[0-9a-f]+|ssm:/[A-Za-z0-9_./-]+")


class Requirements(Record, forbid_unknown_fields=True):
    """What an instance must have, instead of a list of types.

    ``gpu_names`` are those of the price table (``spotfirst prices``), such as ``L4``.
    ``gpu_memory_gib`` is of one GPU, ``memory_gib`` of the instance.
    """

    gpus: int = 1
    gpu_names: tuple[str, ...] = ()
    gpu_memory_gib: float = 0
    vcpus: int = 0
    memory_gib: float = 0


class SeparateRuns(Record, forbid_unknown_fields=True):
    """What the stack says of access points (:mod:`~spotfirst_airflow.fleets.ec2.accesspoints`).

    ``access_points`` is how their ARNs begin, ``role`` the ARN of the instances' role.
    """

    access_points: str
    role: str


class Elsewhere(Record, forbid_unknown_fields=True):
    """One more region, with what is of one region only. The rest is as in the main one.

    ``ami`` and ``kms_key`` may be left out when the main ones have the same name everywhere: a
    parameter (``ssm:``), or an alias (``alias/``).
    """

    region: str
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    ami: str = ""
    queue_url: str = ""
    kms_key: str = ""


class Ec2Options(Record):
    """The options of :class:`~spotfirst_airflow.fleets.ec2.Ec2Fleet`.

    ``region`` is that of the connection when empty. ``subnets`` say which zones are used.
    ``instance_profile`` is the name of the role that reads and writes the storage. ``ami`` is an id
    or ``ssm:`` and the name of a public parameter. With ``image`` the training runs in that
    container. ``python`` is the interpreter on the instance (or in the container) that has torch;
    ``python_versions`` are those that Spotfirst's wheels are published for, as it has one of them;
    ``pip_install`` names what is installed beside it, from ``pip_index`` (none: nothing is fetched
    from any index). ``queue_url`` is the SQS queue to which EventBridge sends what happens to
    instances. ``interruption_mean_h`` is how many hours a spot instance of these pools lasts on average
    before AWS takes it back, as far as you know: no API of AWS's tells it. The checkpoint period follows
    from it (``docs/checkpointing.md``); 0 means that nobody knows. ``aws_conn_id`` is an Airflow connection of the Amazon provider, for credentials, a
    role to assume, and a region. ``on_failure="keep"`` leaves the instance of a script that failed
    up for ``keep_h`` hours. With ``separate_runs`` each run's instances reach the storage by an
    access point of their own.

    ``elsewhere`` are more regions to take instances from. ``storage_region`` is that of the storage's
    bucket; ``region`` when empty. ``egress_usd_gb`` is what a GB costs from one region to another, in
    place of the list in ``egress``. ``endpoint_url`` is only for tests of this fleet.
    """

    region: str = ""
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    instance_profile: str = ""
    ami: str = DEFAULT_AMI
    image: str = ""
    requirements: Requirements | None = None
    volume_gb: int = 100
    volume_type: str = "gp3"
    kms_key: str = ""
    python: str = "python3"
    python_versions: tuple[str, ...] = ("3.12", "3.13")
    pip_install: tuple[str, ...] = ()
    pip_index: str = ""
    queue_url: str = ""
    interruption_mean_h: float = 0
    aws_conn_id: str = ""
    on_failure: Literal["terminate", "keep"] = "terminate"
    keep_h: float = 4.0
    separate_runs: SeparateRuns | None = None
    elsewhere: tuple[Elsewhere, ...] = ()
    storage_region: str = ""
    egress_usd_gb: Decimal | None = None
    endpoint_url: str = ""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Ec2Options:
        """Raises :class:`InvalidSpec` for what can be seen without asking AWS."""
        parsed = parse(cls, options, where="EC2 fleet")
        for name, pattern, values in (
            ("subnets", _SUBNET, parsed.subnets),
            ("security_groups", _GROUP, parsed.security_groups),
        ):
            for value in values:
                require(bool(pattern.fullmatch(value)), name, value, "ids of EC2's")
            require(len(set(values)) == len(values), name, values, "all different")
        require(bool(_AMI.fullmatch(parsed.ami)), "ami", parsed.ami, "'ami-…' or 'ssm:/…'")
        profile = parsed.instance_profile
        if profile:
            known = bool(_PROFILE.fullmatch(profile))
            require(known, "instance_profile", profile, "the name of one, not its ARN")
        # The others need a number of IOPS.
        volume_types = "'gp3' or 'gp2'"
        require(
            parsed.volume_type in {"gp3", "gp2"}, "volume_type", parsed.volume_type, volume_types
        )
        if parsed.requirements is not None:
            gpus = parsed.requirements.gpus
            require(gpus >= 1, "requirements.gpus", gpus, "1 or more")
        require(parsed.volume_gb >= 8, "volume_gb", parsed.volume_gb, "8 or more")
        require(0 < parsed.keep_h <= 168, "keep_h", parsed.keep_h, "above 0, and at most 168")
        mean_h = parsed.interruption_mean_h
        require(0 <= mean_h < math.inf, "interruption_mean_h", mean_h, "hours, or 0")
        if apart := parsed.separate_runs:
            for name, pattern, value, what in (
                (
                    "access_points",
                    _POINTS,
                    apart.access_points,
                    "the beginning of access points' ARNs",
                ),
                ("role", _ROLE, apart.role, "the ARN of the instances' role"),
            ):
                known = bool(pattern.fullmatch(value))
                require(known, f"separate_runs.{name}", value, f"{what}, as in output FleetOptions")
        for version in parsed.python_versions:
            known = bool(_PYTHON.fullmatch(version))
            require(known, "python_versions", version, "'3.10' or newer")
        require(bool(parsed.python_versions), "python_versions", (), "at least one")
        require(bool(parsed.python.strip()), "python", parsed.python, "the name of an interpreter")
        if parsed.pip_index and not parsed.pip_install:
            msg = "fleet option pip_index is given, and pip_install names nothing to get from it"
            raise InvalidSpec(msg)
        usd_gb = parsed.egress_usd_gb
        known = usd_gb is None or (usd_gb.is_finite() and usd_gb >= 0)
        require(known, "egress_usd_gb", usd_gb, "dollars per GB, 0 or more")
        place = parsed.storage_region
        known = not place or bool(_REGION.fullmatch(place))
        require(known, "storage_region", place, "a region, such as us-east-1")
        parsed._check_elsewhere()  # noqa: SLF001 - of this very class
        return parsed

    def _check_elsewhere(self) -> None:
        if not self.elsewhere:
            return
        if not self.region:
            msg = (
                "fleet option elsewhere is given, and region is not: say which one is the main one"
            )
            raise InvalidSpec(msg)
        seen = {self.region}
        for each in self.elsewhere:
            what = f"elsewhere ({each.region})"
            known = bool(_REGION.fullmatch(each.region))
            require(known, "elsewhere", each.region, "a region, such as us-west-2")
            require(each.region not in seen, "elsewhere", each.region, "a region named only once")
            seen.add(each.region)
            if not each.subnets:
                msg = f"fleet option {what} has no subnets: give one in each zone to use"
                raise InvalidSpec(msg)
            for thing, value, own in (
                ("an ami", self.ami, each.ami),
                ("a kms_key", self.kms_key, each.kms_key),
            ):
                if value and not own and not value.startswith(_EVERYWHERE):
                    msg = (
                        f"fleet option {what} needs {thing} of its own: {value} is in {self.region}"
                    )
                    raise InvalidSpec(msg)
            try:
                Ec2Options.of(msgspec.to_builtins(self.within(each)))
            except InvalidSpec as error:
                msg = f"fleet option {what}: {error}"
                raise InvalidSpec(msg) from error

    def regions(self) -> tuple[Ec2Options, ...]:
        """The options of the fleet in each region, the main one first."""
        main = msgspec.structs.replace(self, elsewhere=())
        return (main, *map(self.within, self.elsewhere))

    def within(self, there: Elsewhere) -> Ec2Options:
        """The options of the fleet in one of the other regions."""
        return msgspec.structs.replace(
            self,
            region=there.region,
            subnets=there.subnets,
            security_groups=there.security_groups,
            ami=there.ami or self.ami,
            queue_url=there.queue_url,
            kms_key=there.kms_key or self.kms_key,
            elsewhere=(),
            storage_region=self.storage_region or self.region,
        )

    def way_usd_gb(self, region: str) -> tuple[Decimal, Decimal]:
        """USD per GB that an instance in ``region`` reads from the storage, and writes to it."""
        storage = self.storage_region or region
        if storage != region and self.egress_usd_gb is not None:
            return self.egress_usd_gb, self.egress_usd_gb
        return egress_usd_gb(storage, region), egress_usd_gb(region, storage)

    def check_launch(self) -> None:
        """Raise :class:`InvalidSpec` for what a launch needs, and a look at instances does not."""
        for name, value, what in (
            ("subnets", self.subnets, "the ids of one subnet in each zone to use"),
            ("instance_profile", self.instance_profile, "the profile that deploy/aws.yaml makes"),
        ):
            if not value:
                msg = f"the EC2 fleet needs the fleet option {name}: {what}; see docs/ec2.md"
                raise InvalidSpec(msg)
