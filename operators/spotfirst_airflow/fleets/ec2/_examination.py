"""What the doctor's checks share: one way to ask AWS, and what earlier checks found."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import msgspec

from spotfirst.errors import FleetUnavailable, SpotfirstError
from spotfirst_airflow.fleets.checks import Check
from spotfirst_airflow.fleets.ec2.aws import Aws, call
from spotfirst_airflow.fleets.ec2.options import Ec2Options

__all__ = ["STATEMENTS", "Examination", "Refused", "allow", "statements", "unlooked"]

STATEMENTS = {
    "ec2:DescribeImages": "Look",
    "ec2:DescribeInstances": "Look",
    "ec2:DescribeInstanceTypeOfferings": "Look",
    "ec2:DescribeInstanceTypes": "Look",
    "ec2:DescribeLaunchTemplates": "Look",
    "ec2:DescribeSpotPriceHistory": "Look",
    "ec2:DescribeSubnets": "Look",
    "ec2:GetSpotPlacementScores": "Look",
    "ec2:DescribeRouteTables": "DoctorNetwork",
    "ec2:DescribeSecurityGroups": "DoctorNetwork",
    "ec2:DescribeVpcEndpoints": "DoctorNetwork",
    "ec2:CreateFleet": "LaunchTagged",
    "ec2:CreateLaunchTemplate": "Templates",
    "ec2:CreateTags": "TagAtCreation",
    "ec2:RunInstances": "LaunchTagged",
    "ec2:TerminateInstances": "EndOwn",
    "events:DescribeRule": "DoctorRules",
    "events:ListRuleNamesByTarget": "DoctorRules",
    "iam:CreateServiceLinkedRole": "ServiceRoles",
    "iam:GetInstanceProfile": "DoctorProfile",
    "iam:GetRole": "DoctorServiceRoles",
    "iam:PassRole": "PassInstanceRole",
    "iam:SimulatePrincipalPolicy": "DoctorSimulation",
    "s3:CreateAccessPoint": "AccessPoints",
    "s3:GetAccessPoint": "AccessPoints",
    "s3:GetBucketLocation": "DoctorBucket",
    "s3:GetBucketPolicy": "DoctorBucket",
    "s3:GetBucketPublicAccessBlock": "DoctorBucket",
    "s3:GetBucketVersioning": "DoctorBucket",
    "s3:GetEncryptionConfiguration": "DoctorBucket",
    "s3:GetLifecycleConfiguration": "DoctorBucket",
    "servicequotas:GetAWSDefaultServiceQuota": "DoctorQuotas",
    "servicequotas:GetServiceQuota": "DoctorQuotas",
    "sqs:DeleteMessage": "Notices",
    "sqs:GetQueueAttributes": "Notices",
    "sqs:ReceiveMessage": "Notices",
    "ssm:GetParameter": "FindImage",
}
"""The statement of deploy/aws.yaml that allows an action."""

_DENIED = frozenset({
    "403", "AccessDenied", "AccessDeniedException", "AuthorizationError", "Forbidden",
    "UnauthorizedOperation", "AWS.SimpleQueueService.AccessDenied",
})  # fmt: skip
_ACTIONS = {
    "GetBucketEncryption": "GetEncryptionConfiguration",
    "GetBucketLifecycleConfiguration": "GetLifecycleConfiguration",
    "GetPublicAccessBlock": "GetBucketPublicAccessBlock",
}
"""Calls of S3 whose permission has another name."""
_PERFORM = re.compile(r"to perform:? ([a-z0-9-]+:[A-Za-z]+)")


class Refused(SpotfirstError):
    """AWS answered with an error, or not at all. ``action`` is the permission that it was about."""

    def __init__(self, message: str, *, code: str, action: str, unavailable: bool) -> None:
        super().__init__(message)
        self.code = code
        self.action = action
        self.unavailable = unavailable

    @property
    def denied(self) -> bool:
        """Whether a permission is missing."""
        return self.code in _DENIED or self.code.startswith("AuthFailure.")


class Examination:
    """One look at an account. Checks leave here what later ones need."""

    def __init__(
        self,
        aws: Aws,
        options: Ec2Options,
        *,
        storage_url: str,
        instance_types: Sequence[str],
        clock: Callable[[], datetime],
    ) -> None:
        self.aws = aws
        self.options = options
        self.storage_url = storage_url.rstrip("/")
        self.type_names = tuple(instance_types)
        self._clock = clock
        self.account = ""
        self.partition = "aws"
        self.caller = ""
        self.skew_s: float | None = None
        self.subnets: list[dict[str, Any]] = []
        self.types: dict[str, dict[str, Any]] = {}
        self.image_id = ""
        self.role_arn = ""

    @property
    def storage_region(self) -> str:
        """Where the options say that the storage's bucket is."""
        return self.options.storage_region or self.aws.region

    @property
    def bucket(self) -> str:
        """The bucket of the storage; empty when it is not in S3."""
        scheme, _, rest = self.storage_url.partition("://")
        return rest.partition("/")[0] if scheme in {"s3", "s3a"} else ""

    def ask(self, service: str, method: str, *, region: str = "", **parameters: Any) -> Any:
        """The answer of one call. Raises :class:`Refused`."""
        try:
            client = self.aws.client(service, region)
        except SpotfirstError as error:
            raise Refused(str(error), code="", action="", unavailable=False) from error
        except Exception as error:
            # A connection that Airflow does not have, a profile that is not there, no provider.
            why = f"no client for {service}: {type(error).__name__}: {error}"
            raise Refused(why, code="", action="", unavailable=False) from error
        before = self._clock()
        try:
            answer = call(getattr(client, method), **parameters)
        except SpotfirstError as error:
            response = getattr(error.__cause__, "response", None) or {}
            self._note_time(response, before)
            raise _refused(error, response, service, method) from error
        self._note_time(answer, before)
        return answer

    def ask_all(self, service: str, method: str, key: str, **parameters: Any) -> list[Any]:
        """All pages of one list. Raises :class:`Refused`."""
        found: list[Any] = []
        more: dict[str, Any] = {}
        while True:
            answer = self.ask(service, method, **parameters, **more)
            found += answer.get(key, [])
            if not answer.get("NextToken"):
                return found
            more = {"NextToken": answer["NextToken"]}

    def simulate(
        self, principal: str, action: str, resource: str, **context: str
    ) -> Literal["allowed", "denied", "unknown"]:
        """What IAM says that a role or user may do; unknown where nobody lets us ask."""
        entries = [
            {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": "string"}
            for key, value in context.items()
        ]
        try:
            answer = self.ask(
                "iam", "simulate_principal_policy", PolicySourceArn=principal,
                ActionNames=[action], ResourceArns=[resource], ContextEntries=entries,
            )  # fmt: skip
        except Refused:
            return "unknown"
        decisions = {result["EvalDecision"] for result in answer["EvaluationResults"]}
        return "allowed" if decisions == {"allowed"} else "denied"

    def _note_time(self, answer: Any, before: datetime) -> None:
        """AWS's clock, from the first answer that tells it."""
        if self.skew_s is not None or not isinstance(answer, dict):
            return
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        text = {name.lower(): value for name, value in headers.items()}.get("date", "")
        try:
            theirs = parsedate_to_datetime(text)
        except ValueError:
            return
        if theirs.tzinfo is None:
            theirs = theirs.replace(tzinfo=timezone.utc)
        ours = before + (self._clock() - before) / 2
        self.skew_s = (ours - theirs).total_seconds()


def allow(action: str) -> str:
    """The sentence that repairs a missing permission."""
    statement = STATEMENTS.get(action)
    where = f": statement {statement} of deploy/aws.yaml" if statement else ""
    return f"allow {action or 'the call'} to the controller's role{where}"


def statements(policy: str) -> list[dict[str, Any]]:
    """Those of a policy's text: it may have a single one without a list."""
    found = (msgspec.json.decode(policy) if policy else {}).get("Statement", [])
    return [found] if isinstance(found, dict) else list(found)


def unlooked(name: str, error: Refused) -> Check:
    """The verdict where a look itself failed: nothing can be said, so nothing is called broken."""
    if error.unavailable:
        why = f"could not be looked at: {error}"
        return Check(name=name, verdict="warning", found=why, fix="run the doctor again")
    if error.denied:
        why = f"could not be looked at: {error.code} for {error.action}"
        return Check(name=name, verdict="warning", found=why, fix=allow(error.action))
    fix = "correct what the message names; docs/ec2.md lists errors"
    return Check(name=name, verdict="failed", found=str(error), fix=fix)


def _refused(error: SpotfirstError, response: dict[str, Any], service: str, method: str) -> Refused:
    told = response.get("Error", {})
    code = str(told.get("Code", ""))
    operation = "".join(part.title() for part in method.split("_"))
    operation = getattr(error.__cause__, "operation_name", operation)
    prefix = {"s3control": "s3", "service-quotas": "servicequotas"}.get(service, service)
    if service == "s3":
        operation = _ACTIONS.get(operation, operation)
    if code.startswith("AuthFailure.ServiceLinkedRole"):
        prefix, operation = "iam", "CreateServiceLinkedRole"
    match = _PERFORM.search(str(told.get("Message", "")))
    action = match.group(1) if match else f"{prefix}:{operation}"
    message = f"{code}: {told['Message']}" if told.get("Message") else str(error)
    return Refused(
        message, code=code, action=action, unavailable=isinstance(error, FleetUnavailable)
    )
