"""Launching once per token, whatever gets lost on the way.

A launch is at most four calls when nothing fails: look for the token, make the launch template
(only for a run's first attempt in this process), CreateFleet, describe what it gave. What an
account has (zones of subnets, the image) is asked once per process.

Why a token never makes two instances:

- CreateFleet is idempotent by client token: the same call gives the same instance again. Unlike
  RunInstances it is one call for all zones, so no zone launches a second one.
- Before each launch the token is looked for in the instances' tags, which are set as they are
  created. So whoever repeats a launch with other parameters (the image is a newer one now) finds
  what the first call launched.
- Such a repeat that comes before the tag is seen is refused by EC2 for its parameters
  (``IdempotentParameterMismatch``): nothing is launched, and the tag is looked for again later.

A token whose launch came to nothing is used up: EC2 gives the same answer for it for ever. So an
answer without an instance never becomes :class:`FleetUnavailable`, after which the same token
would be tried again, but :class:`NoCapacity` or :class:`LaunchRejected`, after which another is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

from spotfirst.errors import (
    FleetError,
    FleetUnavailable,
    InvalidSpec,
    LaunchRejected,
    NoCapacity,
    QuotaReached,
)
from spotfirst.market import Market, Pool
from spotfirst.wire import Clock, utc_now
from spotfirst_airflow.fleets.base import ATTEMPT_TAG, LaunchRequest
from spotfirst_airflow.fleets.ec2.account import Account
from spotfirst_airflow.fleets.ec2.aws import Aws, call, code_of, explain
from spotfirst_airflow.fleets.ec2.describing import describe
from spotfirst_airflow.fleets.ec2.instances import TOKEN_TAG, is_over, tag_list, tags_of
from spotfirst_airflow.fleets.ec2.options import Ec2Options
from spotfirst_airflow.fleets.ec2.template import ensure, run_tags, template_of

__all__ = ["Launcher", "look_up"]

LONGEST_TOKEN = 64
MISMATCH_PATIENCE_S = 120.0
"""An earlier call with this token was answered, or is about to be. After so long without an
instance that carries its tag, that call came to nothing."""
_MOST_OVERRIDES = 300
"""Of a fleet: "EC2 Fleet quotas" in the user guide."""
_MOST_VALUES = 200
"""Of a filter of DescribeInstances."""

Described = Mapping[str, Any]
"""An entry of DescribeInstances."""


class Launcher:
    """Launches for one run. ``user_data`` is asked for only when it is needed.

    ``clock`` tells when an instance was launched, should EC2 not list it yet.
    """

    def __init__(
        self,
        aws: Aws,
        options: Ec2Options,
        *,
        user_data: Callable[[LaunchRequest], str],
        clock: Clock = utc_now,
    ) -> None:
        self._aws = aws
        self._options = options
        self._user_data = user_data
        self._clock = clock
        self._account = Account.of(aws)

    def launch(self, request: LaunchRequest) -> Described:
        """The token's instance, launched now or before, and possibly terminated since.

        Raises :class:`NoCapacity` or :class:`LaunchRejected`, after which no instance has this
        token, and :class:`FleetUnavailable`, after which one may: launch again.
        """
        _check_token(request.token)
        tags = self._tags(request)
        if found := self._look_up(request.token):
            return found
        try:
            parameters = self._parameters(request, tags)
        except InvalidSpec as error:
            raise LaunchRejected(str(error)) from error
        answer = self._create(request, parameters)
        if "InstanceId" in answer:
            return answer
        launched = next((i for i in answer.get("Instances", ()) if i.get("InstanceIds")), None)
        if launched is None:
            raise self._refusal(request, answer.get("Errors", ()))
        return self._describe(request, launched, tags)

    # -- asking EC2 for it ------------------------------------------------------------------

    def _create(self, request: LaunchRequest, parameters: dict[str, Any]) -> Described:
        """CreateFleet's answer, or the instance that an earlier call with this token launched.

        Made again, once each, after no answer and with a new template. Whatever comes of that is
        read as that of the first call, but for a refusal after a silence: it proves nothing about
        the call that nobody answered.
        """
        was_silent = is_made_again = False
        while True:
            try:
                answer: Described = call(self._aws.client("ec2").create_fleet, **parameters)
            except NoCapacity as error:
                raise type(error)(str(error), pools=self._pools(request)) from error
            except FleetUnavailable as error:
                if found := self._look_up(request.token):
                    return found
                # With a code, AWS did answer: it is busy, and boto3 has tried again already.
                if code_of(error) or was_silent:
                    raise
                was_silent = True
            except LaunchRejected as error:
                if code_of(error) == "IdempotentParameterMismatch":
                    return self._launched_before(request, error)
                refusal = self._read(error, request)
                if not _is_no_template(code_of(error)):
                    raise (FleetUnavailable(str(error)) if was_silent else refusal) from error
                if is_made_again:
                    raise FleetUnavailable(str(error)) from error
                # Deleted by someone, or so new that not all of EC2 knows it.
                is_made_again = True
                self._make_template(request, again=True)
            else:
                return answer

    def _launched_before(self, request: LaunchRequest, error: LaunchRejected) -> Described:
        """What an earlier call with this token, and other parameters, has launched."""
        if found := self._look_up(request.token):
            self._account.mismatches.pop(request.token, None)
            return found
        since = self._account.mismatches.setdefault(request.token, self._clock())
        if self._clock() - since < timedelta(seconds=MISMATCH_PATIENCE_S):
            msg = f"an earlier launch of {request.token} is not to be seen yet: {error}"
            raise FleetUnavailable(msg) from error
        del self._account.mismatches[request.token]
        msg = f"an earlier launch of {request.token} came to nothing, and nothing says why"
        raise NoCapacity(msg) from error

    def _look_up(self, token: str) -> Described | None:
        """The instance with this token: one that lives, or else the oldest."""
        found = look_up(self._aws, [token]).get(token, [])
        return min(found, key=lambda i: (is_over(i), i["LaunchTime"]), default=None)

    # -- what is asked for ------------------------------------------------------------------

    def _tags(self, request: LaunchRequest) -> dict[str, str]:
        mine = {ATTEMPT_TAG: str(request.attempt), TOKEN_TAG: request.token}
        return run_tags(request) | mine

    def _parameters(self, request: LaunchRequest, tags: dict[str, str]) -> dict[str, Any]:
        """CreateFleet's. The same whenever the same launch is asked for."""
        subnets = self._account.subnets(self._options.subnets)
        spot = request.market is Market.SPOT
        strategy: dict[str, Any] = {
            "SpotOptions": {
                "AllocationStrategy": "price-capacity-optimized",
                "InstanceInterruptionBehavior": "terminate",
            }
        }
        if not spot:
            strategy = {"OnDemandOptions": {"AllocationStrategy": "lowest-price"}}
        overrides = [
            {"InstanceType": pool.instance_type, "SubnetId": subnets[pool.zone]}
            for pool in self._pools(request)
        ]
        name = self._make_template(request)
        return {
            "Type": "instant",
            "ClientToken": request.token,
            "TargetCapacitySpecification": {
                "TotalTargetCapacity": 1,
                "DefaultTargetCapacityType": "spot" if spot else "on-demand",
            },
            "LaunchTemplateConfigs": [
                {
                    "LaunchTemplateSpecification": {"LaunchTemplateName": name, "Version": "1"},
                    "Overrides": overrides,
                }
            ],
            "TagSpecifications": [
                {"ResourceType": kind, "Tags": tag_list(tags)} for kind in ("instance", "fleet")
            ],
            **strategy,
        }

    def _pools(self, request: LaunchRequest) -> list[Pool]:
        """The pools to take one of. Raises :class:`LaunchRejected` when none has a subnet."""
        subnets = self._account.subnets(self._options.subnets)
        asked = dict.fromkeys((request.pool, *request.others))
        pools = [pool for pool in asked if pool.zone in subnets]
        if not pools:
            msg = (
                f"{request.pool}: none of the fleet option subnets is there; they are in "
                f"{', '.join(subnets)}"
            )
            raise LaunchRejected(msg)
        return pools[:_MOST_OVERRIDES]

    def _make_template(self, request: LaunchRequest, *, again: bool = False) -> str:
        image = self._account.image(self._options.ami)
        user_data = self._user_data(request)
        template = template_of(self._options, request, image=image, user_data=user_data)
        ensure(self._aws, template, again=again)
        return template.name

    # -- what became of it ------------------------------------------------------------------

    def _refusal(self, request: LaunchRequest, errors: Sequence[Mapping[str, Any]]) -> FleetError:
        """Why there is no instance. Any error that may pass by itself makes it worth waiting."""
        explained = [
            (explain(e.get("ErrorCode", ""), e.get("ErrorMessage", "")), self._pool_of(e))
            for e in errors
        ]
        message = "; ".join(dict.fromkeys(str(error) for error, _ in explained))
        message = f"CreateFleet: {message or 'no instance, and no reason'}"
        for error, _ in explained:
            self._learn(error, str(error))
        rejected = [error for error, _ in explained if isinstance(error, LaunchRejected)]
        if rejected and len(rejected) == len(explained) and not self._was_stale(errors):
            return LaunchRejected(message)
        if any(isinstance(error, QuotaReached) for error, _ in explained):
            return QuotaReached(message, pools=self._pools(request))
        pools = dict.fromkeys(pool for _, pool in explained if pool is not None)
        return NoCapacity(message, pools=tuple(pools) or tuple(self._pools(request)))

    def _read(self, error: LaunchRejected, request: LaunchRequest) -> FleetError:
        """The error that a refused call means."""
        self._learn(error, code_of(error))
        if self._was_stale([{"ErrorCode": code_of(error)}]):
            return NoCapacity(str(error), pools=self._pools(request))
        return error

    def _learn(self, error: Exception, code: str) -> None:
        """Forget what this error says is not so any more."""
        if "InvalidAMIID" in code and isinstance(error, LaunchRejected):
            self._account.forget_image(self._options.ami)

    def _was_stale(self, errors: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the next attempt does better.

        The public image has been replaced by a newer one, or the template was just deleted.
        """
        codes = [error.get("ErrorCode", "") for error in errors]
        replaced = self._options.ami.startswith("ssm:")
        return all(
            _is_no_template(code) or (replaced and code.startswith("InvalidAMIID"))
            for code in codes
        )

    def _pool_of(self, error: Mapping[str, Any]) -> Pool | None:
        override = error.get("LaunchTemplateAndOverrides", {}).get("Overrides", {})
        zone = override.get("AvailabilityZone") or self._zone_of(override.get("SubnetId", ""))
        if not zone or "InstanceType" not in override:
            return None
        return Pool(instance_type=override["InstanceType"], zone=zone)

    def _zone_of(self, subnet: str) -> str:
        subnets = self._account.subnets(self._options.subnets)
        return next((zone for zone, each in subnets.items() if each == subnet), "")

    def _describe(
        self, request: LaunchRequest, launched: Mapping[str, Any], tags: dict[str, str]
    ) -> Described:
        """The instance as EC2 describes it, or as far as CreateFleet told while EC2 does not."""
        instance_id = launched["InstanceIds"][0]
        override = launched.get("LaunchTemplateAndOverrides", {}).get("Overrides", {})
        zone = (
            launched.get("AvailabilityZone")
            or override.get("AvailabilityZone")
            or self._zone_of(launched.get("SubnetId") or override.get("SubnetId", ""))
            or request.pool.zone
        )
        told: dict[str, Any] = {
            "InstanceId": instance_id,
            "InstanceType": launched.get("InstanceType") or override["InstanceType"],
            "State": {"Code": 0, "Name": "pending"},
            "LaunchTime": self._clock().replace(microsecond=0),
            "Placement": {"AvailabilityZone": zone},
        }
        if request.market is Market.SPOT:
            told["InstanceLifecycle"] = "spot"
        try:
            found = describe(lambda: self._aws.client("ec2"), InstanceIds=[instance_id])
            told |= found[0] if found else {}
        except FleetError:
            pass  # it is launched; a moment later EC2 will list it
        # Tags may be seen later than the instance.
        return told | {"Tags": tag_list(tags_of(told) | tags)}


def look_up(aws: Aws, tokens: Collection[str]) -> dict[str, list[Described]]:
    """The instances with these tokens, as EC2 lists them now. Raises :class:`FleetUnavailable`.

    One that was launched in the last seconds may be missing.
    """
    unique = list(dict.fromkeys(tokens))
    found: dict[str, list[Described]] = {}
    for start in range(0, len(unique), _MOST_VALUES):
        values = unique[start : start + _MOST_VALUES]
        filters = [{"Name": f"tag:{TOKEN_TAG}", "Values": values}]
        for each in describe(lambda: aws.client("ec2"), Filters=filters):
            found.setdefault(tags_of(each).get(TOKEN_TAG, ""), []).append(each)
    return found


def _check_token(token: str) -> None:
    if not token or len(token) > LONGEST_TOKEN or not token.isascii() or set(token) & set("*?"):
        msg = f"token {token!r} must be 1 to {LONGEST_TOKEN} ASCII characters, without '*' and '?'"
        raise LaunchRejected(msg)


def _is_no_template(code: str) -> bool:
    return code.startswith("InvalidLaunchTemplate") and "NotFound" in code
