"""An access point for each run: its instances' only way to the storage, with a list of them.

All instances have one role, and IAM does not know which run one is of. With the stack's parameter
``SeparateRuns`` the role gets to objects through access points alone. A run's has a name that
follows from the run, so every controller finds the same one, and makes the same one.

===================== ===========================================================================
when                  what is done
===================== ===========================================================================
before a launch       it is made, unless it is there, with a policy that admits no instance
an attempt begins     its instance is let in, by whichever controller looks next: the list is that
or ends               of the journal
every half minute     the policy is compared with that list: a controller that was held up may
                      have put an older one
the run is over       it is removed, by its controller or by the reaper
===================== ===========================================================================

Until it is let in, an instance's requests are refused, and it waits.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from spotfirst.errors import FleetUnavailable, LaunchRejected, QuotaReached
from spotfirst.spec import RunSpec
from spotfirst.wire import Clock, utc_now
from spotfirst_airflow.fleets.ec2.accesspolicy import (
    Place,
    Policy,
    policy_of,
    tags_of_policy,
)
from spotfirst_airflow.fleets.ec2.account import pages
from spotfirst_airflow.fleets.ec2.aws import Aws, call, code_of
from spotfirst_airflow.fleets.ec2.options import SeparateRuns

__all__ = ["AccessPoints"]

LOOK_AGAIN_S = 30.0
"""How often the policy is compared with what it should be."""
_HALF_MADE = timedelta(hours=1)
"""Who made an access point gives it a policy in the next moment, or is dead."""
_NOTHING = ("NoSuchAccessPoint", "NoSuchAccessPointPolicy")
_FULL = frozenset({"TooManyAccessPoints", "LimitExceeded", "LimitExceededException",
                   "ServiceQuotaExceededException"})  # fmt: skip


class AccessPoints:
    """Those of one stack. Raises as :func:`~spotfirst_airflow.fleets.ec2.aws.call` does."""

    def __init__(
        self,
        aws: Aws,
        stack: SeparateRuns,
        *,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._aws = aws
        self._clock = clock
        self._role = stack.role
        self._monotonic = monotonic
        head, _, self._prefix = stack.access_points.partition(":accesspoint/")
        self._head = f"{head}:accesspoint/"
        _, self._partition, _, self._region, self._account = head.split(":")
        self._known: dict[str, tuple[str, float]] = {}
        """By access point: the policy that it had, and when."""

    def way(self, storage_url: str, run_id: str) -> str:
        """The storage's URL for the run's instances. The access point is there then.

        Raises :class:`QuotaReached` when the account has as many as it may.
        """
        place = Place.of(storage_url)
        name = self._name(place, run_id)
        found = self._get(name) or self._create(name, place.bucket)
        if found.get("Bucket", place.bucket) != place.bucket:
            msg = f"access point {name} leads to bucket {found['Bucket']}, not to {place.bucket}"
            raise LaunchRejected(msg)
        if self._policy(name) is None:
            # Now, rather than with the first instance: a permission that is missing shows here.
            closed = policy_of(self._head + name, self._role, place, run_id)
            try:
                self._put(name, closed)
            except LaunchRejected as error:
                if code_of(error) != _NOTHING[0]:
                    raise
                msg = f"access point {name} is not known everywhere yet: {error}"
                raise FleetUnavailable(msg) from error
        return f"s3://{found['Alias']}/{place.prefix}".rstrip("/")

    def admit(
        self, storage_url: str, run_id: str, spec: RunSpec, instances: Sequence[tuple[str, str]]
    ) -> None:
        """Let only these in, by their ids and regions."""
        place = Place.of(storage_url)
        name = self._name(place, run_id)
        wanted = policy_of(
            self._head + name, self._role, place, run_id, spec=spec,
            instances=[
                f"arn:{self._partition}:ec2:{region}:{self._account}:instance/{instance_id}"
                for instance_id, region in sorted(instances)
            ],
        )  # fmt: skip
        before, at = self._known.get(name, ("", 0.0))
        now = self._monotonic()
        if before == wanted.name and now - at < LOOK_AGAIN_S:
            return
        is_there = before in {"", wanted.name} and wanted.names(self._policy(name))
        if not is_there:
            self._put(name, wanted)
        self._known[name] = wanted.name, now

    def dismiss(self, storage_url: str, run_id: str) -> None:
        """Remove the run's, if it is there."""
        self._delete(self._name(Place.of(storage_url), run_id))

    def tidy(self, is_over: Callable[[Mapping[str, str]], bool]) -> int:
        """Remove those of runs that are over; how many.

        And those that never got a policy: no instance can use one, and a launch would make another.
        """
        removed = 0
        for point in self._all():
            name = point["Name"]
            text = self._policy(name)
            tags = tags_of_policy(text or "", point["Bucket"])
            if self._is_old(name) if text is None else is_over(tags):
                self._delete(name)
                removed += 1
        return removed

    def _is_old(self, name: str) -> bool:
        made_at = (self._get(name) or {}).get("CreationDate")
        return made_at is not None and self._clock() - made_at > _HALF_MADE

    # -- the calls --------------------------------------------------------------------------

    def _name(self, place: Place, run_id: str) -> str:
        digest = hashlib.sha256(f"{place.bucket}/{place.prefix}\n{run_id}".encode()).hexdigest()
        return f"{self._prefix}-{digest[:24]}"

    def _get(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(self._ask("get_access_point", Name=name))
        except LaunchRejected as error:
            if code_of(error) in _NOTHING:
                return None
            raise

    def _create(self, name: str, bucket: str) -> dict[str, Any]:
        try:
            self._ask("create_access_point", Name=name, Bucket=bucket)
        except LaunchRejected as error:
            code = code_of(error)
            if code in _FULL:
                msg = (
                    f"the account has as many access points in {self._region} as it may, and the "
                    f"run needs one ({code}): ask for more under Service Quotas > Amazon S3"
                )
                raise QuotaReached(msg) from error
            if code != "AccessPointAlreadyOwnedByYou":
                raise
        # Asked for, and not taken from the answer: of two who make it at once, both take this one.
        found = self._get(name)
        if found is None:
            msg = f"access point {name} was made, and is not to be seen yet"
            raise FleetUnavailable(msg)
        return found

    def _policy(self, name: str) -> str | None:
        """The policy's text; ``None`` without one."""
        try:
            return str(self._ask("get_access_point_policy", Name=name)["Policy"])
        except LaunchRejected as error:
            if code_of(error) in _NOTHING:
                return None
            raise

    def _put(self, name: str, policy: Policy) -> None:
        self._known.pop(name, None)
        self._ask("put_access_point_policy", Name=name, Policy=policy.text)

    def _delete(self, name: str) -> None:
        self._known.pop(name, None)
        try:
            self._ask("delete_access_point", Name=name)
        except LaunchRejected as error:
            if code_of(error) not in _NOTHING:
                raise

    def _all(self) -> Iterator[dict[str, Any]]:
        client = self._aws.client("s3control", self._region)
        for answer in pages(client.list_access_points, AccountId=self._account):
            for point in answer.get("AccessPointList", ()):
                if point["Name"].startswith(f"{self._prefix}-"):
                    yield point

    def _ask(self, method: str, **parameters: Any) -> Any:
        client = self._aws.client("s3control", self._region)
        try:
            return call(getattr(client, method), AccountId=self._account, **parameters)
        except LaunchRejected as error:
            # With its cause, which has the code.
            raise LaunchRejected(f"fleet option separate_runs: {error}") from error.__cause__
