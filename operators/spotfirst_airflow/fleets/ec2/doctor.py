"""``spotfirst doctor`` on EC2: what a run needs, looked at without launching anything."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from spotfirst.errors import SpotfirstError
from spotfirst.storage import Storage, open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.fleets.checks import Check, Step, check_clock, check_storage
from spotfirst_airflow.fleets.ec2 import _machines as machines
from spotfirst_airflow.fleets.ec2 import _rights as rights
from spotfirst_airflow.fleets.ec2._bucket import check_bucket
from spotfirst_airflow.fleets.ec2._examination import Examination, Refused, unlooked
from spotfirst_airflow.fleets.ec2._queue import check_queue
from spotfirst_airflow.fleets.ec2._separation import check_separation
from spotfirst_airflow.fleets.ec2.aws import Aws, Identity
from spotfirst_airflow.fleets.ec2.options import Ec2Options
from spotfirst_airflow.fleets.ec2.prices import Prices

__all__ = ["DEFAULT_TYPES", "Ec2Doctor"]

DEFAULT_TYPES = ("g6.xlarge",)
"""Looked at when nobody says which types: the smallest with an L4."""

_ROLE = re.compile(r"arn:([^:]+):sts::(\d+):assumed-role/([^/]+)/.+")
_DATE_ERROR_S = 1.0
"""AWS's Date header has whole seconds."""


class Ec2Doctor:
    """The checks of one account, in the order in which one needs another; of its main region, and
    then of the others that the options name.

    Every call is a look or a dry run; only :meth:`Storage.probe` writes, and removes it again.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        storage_url: str,
        instance_types: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        aws: Aws | None = None,
        clock: Callable[[], datetime] = utc_now,
        opener: Callable[[str], Storage] = open_storage,
        elsewhere: Callable[[Ec2Options], Aws] | None = None,
    ) -> None:
        """``aws`` and ``elsewhere``, for the other regions, are for tests.

        Raises :class:`~spotfirst.errors.InvalidSpec` for options that no fleet takes.
        """
        parsed, *others = Ec2Options.of(options).regions()
        aws = aws or Aws(_identity(parsed, environment))
        types = tuple(instance_types)
        if not types and parsed.requirements is not None:
            types = tuple(Prices(aws).matching(parsed.requirements))
        self._look = Examination(
            aws,
            parsed,
            storage_url=storage_url,
            instance_types=types or DEFAULT_TYPES,
            clock=clock,
        )
        self._elsewhere = [
            Examination(
                elsewhere(each) if elsewhere else Aws(_identity(each, environment)),
                each,
                storage_url=storage_url,
                instance_types=types or DEFAULT_TYPES,
                clock=clock,
            )
            for each in others
        ]
        self._opener = opener
        self._usable = False

    def steps(self) -> list[Step]:
        """To be run in this order; each gives its checks, and raises nothing of ours."""
        return [
            Step(name="credentials", run=lambda: self._guarded("credentials", _check_caller)),
            Step(name="clock", run=self._clock),
            *(
                self._step(name, look)
                for name, look in (
                    *_MACHINES,
                    ("instance profile", rights.check_profile),
                    ("separate runs", check_separation),
                    ("service-linked roles", rights.check_service_roles),
                    *_RIGHTS,
                )
            ),
            Step(name="storage", run=self._storage),
            self._step("bucket", check_bucket),
            self._step("queue", check_queue),
            *(
                self._step_in(there, name, look)
                for there in self._elsewhere
                for name, look in (*_MACHINES, *_RIGHTS, ("queue", check_queue))
            ),
        ]

    def _step(self, name: str, look: Callable[[Examination], list[Check]]) -> Step:
        return Step(name=name, run=lambda: self._guarded(name, look))

    def _step_in(
        self, there: Examination, name: str, look: Callable[[Examination], list[Check]]
    ) -> Step:
        """A check in another region, of which the account and its roles are the same."""
        region = there.options.region

        def run() -> list[Check]:
            here = self._look
            there.account, there.partition, there.caller = here.account, here.partition, here.caller
            there.role_arn = here.role_arn
            return [
                msgspec.structs.replace(check, name=f"{region}: {check.name}")
                for check in self._guarded(name, look, there)
            ]

        return Step(name=f"{region}: {name}", run=run)

    def _guarded(
        self,
        name: str,
        look: Callable[[Examination], list[Check]],
        at: Examination | None = None,
    ) -> list[Check]:
        if look is _check_caller:
            found = _check_caller(self._look)
            self._usable = all(check.verdict != "failed" for check in found)
            return found
        if not self._usable:
            return [Check(name=name, verdict="skipped", found="AWS does not know who we are")]
        if look is check_bucket and not self._look.bucket:
            return [Check(name=name, verdict="skipped", found="the storage is not in S3")]
        try:
            return look(at or self._look)
        except Refused as error:
            return [unlooked(name, error)]

    def _clock(self) -> list[Check]:
        skew_s = self._look.skew_s
        if skew_s is None:
            return [Check(name="clock", verdict="skipped", found="no answer of AWS's had a date")]
        return [check_clock(skew_s, source="AWS", error_s=_DATE_ERROR_S)]

    def _storage(self) -> list[Check]:
        url = self._look.storage_url
        if not self._look.bucket:
            found = f"{url or 'none given'}: instances on EC2 reach storage in S3 only"
            fix = "give --storage s3://BUCKET/PREFIX: output Storage of deploy/aws.yaml"
            return [Check(name="storage", verdict="failed", found=found, fix=fix)]
        try:
            return check_storage(self._opener(url))
        except SpotfirstError as error:
            fix = "give --storage s3://BUCKET/PREFIX: output Storage of deploy/aws.yaml"
            return [Check(name="storage", verdict="failed", found=str(error), fix=fix)]


def _identity(options: Ec2Options, environment: Mapping[str, str] | None) -> Identity:
    return Identity(
        region=options.region, aws_conn_id=options.aws_conn_id,
        endpoint_url=options.endpoint_url, environment=environment,
    )  # fmt: skip


_MACHINES = (
    ("subnets", machines.check_subnets),
    ("security groups", machines.check_groups),
    ("way to S3", machines.check_routes),
    ("instance types", machines.check_types),
    ("AMI", machines.check_image),
    ("quotas", machines.check_quotas),
)
_RIGHTS = (
    ("permission to look", rights.check_looking),
    ("permission to launch", rights.check_launching),
    ("permission to end", rights.check_ending),
)


def _check_caller(look: Examination) -> list[Check]:
    """Who we are for AWS. Leaves account and principal behind."""
    name = "credentials"
    try:
        answer = look.ask("sts", "get_caller_identity")
    except Refused as error:
        return [Check(name=name, verdict="failed", found=str(error), fix=_credentials_fix(error))]
    look.account, arn = answer["Account"], answer["Arn"]
    look.partition = arn.split(":")[1]
    role = _ROLE.fullmatch(arn)
    look.caller = f"arn:{role[1]}:iam::{role[2]}:role/{role[3]}" if role else arn
    if arn.endswith(":root"):
        fix = "give Airflow the controller's role of deploy/aws.yaml, and delete root's keys"
        found = f"{arn}: keys of the account's root, which may do anything"
        return [Check(name=name, verdict="warning", found=found, fix=fix)]
    return [Check(name=name, verdict="ok", found=f"{arn} in {look.aws.region}")]


def _credentials_fix(error: Refused) -> str:
    text = str(error)
    if "No module named" in text:
        return (
            "pip install boto3 where the doctor runs, and where Airflow's workers and triggerer do"
        )
    if "region" in text and not error.code:
        return "give --fleet-option region=…, or set AWS_REGION"
    if error.code in {"ExpiredToken", "ExpiredTokenException"}:
        return "log in again (aws sso login), or let the connection assume a role"
    if error.unavailable:
        return "look at the network: this machine reaches no AWS endpoint (proxy, DNS, firewall?)"
    if "Signature expired" in text or "not yet current" in text:
        return "set this machine's clock: chronyc makestep, or timedatectl set-ntp true"
    return "give --fleet-option aws_conn_id=CONNECTION, or set AWS_ACCESS_KEY_ID or AWS_PROFILE"
