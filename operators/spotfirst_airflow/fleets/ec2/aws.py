"""AWS's APIs as this fleet uses them: who we are there, and what its errors mean.

Every call goes through :func:`call`, so that each error becomes one of ours in one place:

==================== ================================================================
error                means
==================== ================================================================
``NoCapacity``       these pools have nothing now
``LaunchRejected``   a quota, a permission or the configuration: people must act
``FleetUnavailable`` no answer, throttled or a fault of AWS: nothing can be concluded
==================== ================================================================
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from spotfirst.errors import FleetUnavailable, InvalidSpec, LaunchRejected, NoCapacity

__all__ = ["Aws", "Identity", "call", "explain"]

_T = TypeVar("_T")

_CAPACITY = frozenset({
    "InsufficientInstanceCapacity", "InsufficientCapacity", "InsufficientHostCapacity",
    "InsufficientReservedInstanceCapacity", "InsufficientCapacityOnHost", "UnfulfillableCapacity",
    "SpotMaxPriceTooLow", "Unsupported",  # of a type in a zone
})  # fmt: skip
_QUOTAS = {
    "MaxSpotInstanceCountExceeded": "All G and VT Spot Instance Requests (L-3819A6DF) or, for P types, All P Spot Instance Requests (L-7212CCBC)",
    "VcpuLimitExceeded": "Running On-Demand G and VT instances (L-DB2E81BA) or, for P types, Running On-Demand P instances (L-417A185B)",
    "InstanceLimitExceeded": "Running On-Demand instances",
    "VolumeLimitExceeded": "Storage for gp3 volumes (L-7A658B76)",
    "MaxIOPSLimitExceeded": "IOPS of EBS volumes",
}  # fmt: skip
"""The service quotas behind the codes: aws service-quotas list-service-quotas."""
_DENIED = frozenset({
    "UnauthorizedOperation", "AccessDenied", "AccessDeniedException", "AuthFailure",
    "InvalidClientTokenId", "SignatureDoesNotMatch", "ExpiredToken", "RequestExpired",
    "OptInRequired", "PendingVerification", "Blocked", "UnrecognizedClientException",
})  # fmt: skip
_BUSY = frozenset({
    "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequestsException",
    "EC2ThrottledException", "InternalError", "InternalFailure", "ServiceUnavailable",
    "Unavailable", "Server.InternalError", "RequestTimeout",
})  # fmt: skip


class Identity:
    """Who calls AWS: an Airflow connection of the Amazon provider, or this environment.

    ``key`` is the same for all that may share answers.
    """

    def __init__(
        self,
        *,
        region: str = "",
        aws_conn_id: str = "",
        endpoint_url: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        variables = dict(environment or {})
        self.region = region or variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION", "")
        self._conn_id = aws_conn_id
        self._endpoint_url = endpoint_url
        self._keys = {
            "aws_access_key_id": variables.get("AWS_ACCESS_KEY_ID"),
            "aws_secret_access_key": variables.get("AWS_SECRET_ACCESS_KEY"),
            "aws_session_token": variables.get("AWS_SESSION_TOKEN"),
        }
        self.key = (self.region, aws_conn_id, endpoint_url, self._keys["aws_access_key_id"] or "")

    def client(self, service: str, region: str = "") -> Any:
        """A boto3 client. Raises :class:`InvalidSpec` without a region."""
        from botocore.config import Config

        region = region or self.region
        if not region:
            msg = "the EC2 fleet has no region: give the fleet option region, or set AWS_REGION"
            raise InvalidSpec(msg)
        config = Config(
            retries={"mode": "adaptive", "max_attempts": 4}, connect_timeout=5, read_timeout=30,
            user_agent_extra="spotfirst",
        )  # fmt: skip
        more = {"endpoint_url": self._endpoint_url} if self._endpoint_url else {}
        if self._conn_id:
            from airflow.providers.amazon.aws.hooks.base_aws import AwsBaseHook

            hook: Any = AwsBaseHook(aws_conn_id=self._conn_id, region_name=region)
            return hook.get_session(region_name=region).client(service, config=config, **more)
        import boto3

        return boto3.session.Session(region_name=region, **self._keys).client(
            service, config=config, **more
        )


class Aws:
    """The clients of one identity, each made once. Thread-safe."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._clients: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    @property
    def region(self) -> str:
        """Where instances are."""
        return self.identity.region

    def client(self, service: str, region: str = "") -> Any:
        """The boto3 client of a service."""
        key = (service, region)
        with self._lock:
            if key not in self._clients:
                self._clients[key] = self.identity.client(service, region)
            return self._clients[key]


def call(action: Callable[..., _T], /, **parameters: Any) -> _T:
    """The answer of one call of a client. Raises as the module says."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        return action(**parameters)
    except ClientError as error:
        raise explain(
            error.response.get("Error", {}).get("Code", ""),
            error.response.get("Error", {}).get("Message", str(error)),
            what=error.operation_name,
        ) from error
    except BotoCoreError as error:
        from botocore.exceptions import HTTPClientError, NoCredentialsError, PartialCredentialsError

        if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
            msg = f"no AWS credentials: {error}; give the fleet option aws_conn_id, or set AWS_*"
            raise LaunchRejected(msg) from error
        if isinstance(error, HTTPClientError):
            msg = f"AWS did not answer: {error}"
            raise FleetUnavailable(msg) from error
        msg = f"AWS could not be called: {error}"
        raise LaunchRejected(msg) from error


def explain(code: str, message: str, *, what: str = "") -> Exception:
    """One of AWS's error codes as an error of ours, with what to do about it."""
    where = f"{what}: " if what else ""
    if code in _CAPACITY:
        return NoCapacity(f"{where}{code}: {message}")
    if code in _QUOTAS:
        return LaunchRejected(
            f"{where}{code}: {message} The quota is {_QUOTAS[code]}: ask for more under Service "
            "Quotas > Amazon EC2, or name other instance types"
        )
    if code in _DENIED:
        return LaunchRejected(
            f"{where}{code}: {message} Airflow's role lacks a permission: compare it with "
            "deploy/aws.yaml, and run `spotfirst doctor`"
        )
    if code in _BUSY:
        return FleetUnavailable(f"{where}{code}: {message}")
    return LaunchRejected(f"{where}{code}: {message}")
