"""AWS's APIs as this fleet uses them: who we are there, and what its errors mean.

Every call goes through :func:`call`, so that each error becomes one of ours in one place:

==================== ================================================================
error                means
==================== ================================================================
``NoCapacity``       these pools have nothing now
``QuotaReached``     a ``NoCapacity`` of a whole market: an account's quota is used up
``LaunchRejected``   a permission or the configuration: people must act
``FleetUnavailable`` no answer, throttled or a fault of AWS: nothing can be concluded
==================== ================================================================
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, TypeVar

from spotfirst.errors import (
    FleetUnavailable,
    InvalidSpec,
    LaunchRejected,
    NoCapacity,
    QuotaReached,
)

__all__ = ["Aws", "Identity", "call", "code_of", "explain"]

_T = TypeVar("_T")

_CAPACITY = frozenset({
    "InsufficientInstanceCapacity", "InsufficientCapacity", "InsufficientHostCapacity",
    "InsufficientReservedInstanceCapacity", "InsufficientCapacityOnHost", "UnfulfillableCapacity",
    "InsufficientVolumeCapacity", "InsufficientAddressCapacity",
    "SpotMaxPriceTooLow", "InsufficientFreeAddressesInSubnet",
    "Unsupported",  # of a type in a zone
})  # fmt: skip
_NOT_IN_ZONE = "not supported in your requested Availability Zone"
"""EC2 Fleet says so under a code that otherwise means a wrong request."""
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
    "InvalidClientTokenId", "SignatureDoesNotMatch", "OptInRequired", "PendingVerification", "Blocked", "UnrecognizedClientException",
})  # fmt: skip
_BUSY = frozenset({
    "RequestLimitExceeded", "Throttling", "ThrottlingException", "TooManyRequestsException",
    "EC2ThrottledException", "InternalError", "InternalFailure", "ServiceUnavailable",
    "Unavailable", "Server.InternalError", "RequestTimeout",
    # Of our session, not of the launch: a connection gets a new one by itself.
    "ExpiredToken", "ExpiredTokenException", "RequestExpired",
})  # fmt: skip


class Identity:
    """Who calls AWS: an Airflow connection of the Amazon provider, or this environment.

    ``key`` is the same for all that may share answers. Making one asks nobody anything.
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
        # A connection may know better than the environment; see region.
        self._region = region or ("" if aws_conn_id else _region_in(variables))
        self._fallback_region = _region_in(variables)
        self._conn_id = aws_conn_id
        self._endpoint_url = endpoint_url
        self._keys = {
            "aws_access_key_id": variables.get("AWS_ACCESS_KEY_ID"),
            "aws_secret_access_key": variables.get("AWS_SECRET_ACCESS_KEY"),
            "aws_session_token": variables.get("AWS_SESSION_TOKEN"),
        }
        who = aws_conn_id or _fingerprint(self._keys)
        self.key = (self._region or self._fallback_region, aws_conn_id, endpoint_url, who)

    @property
    def region(self) -> str:
        """As given, else the connection's, else the environment's. Raises :class:`InvalidSpec`."""
        if not self._region and self._conn_id:
            self._region = self._hook("ec2").region_name or ""
        self._region = self._region or self._fallback_region
        if not self._region:
            msg = "the EC2 fleet has no region: give the fleet option region, or set AWS_REGION"
            raise InvalidSpec(msg)
        return self._region

    def client(self, service: str, region: str = "") -> Any:
        """A boto3 client. Raises :class:`InvalidSpec` without a region, and as :func:`call`."""
        return _explained(lambda: self._client(service, region or self.region))

    def _client(self, service: str, region: str) -> Any:
        from botocore.config import Config

        config = Config(
            retries={"mode": "adaptive", "max_attempts": 4}, connect_timeout=5, read_timeout=60,
            user_agent_extra="spotfirst",
        )  # fmt: skip
        more = {"endpoint_url": self._endpoint_url} if self._endpoint_url else {}
        if self._conn_id and self._endpoint_url:
            session = self._hook(service).get_session(region_name=region)
            return session.client(service, config=config, **more)
        if self._conn_id:
            # With the endpoints and certificates that the connection names.
            return self._hook(service).get_client_type(region_name=region, config=config)
        import boto3

        return boto3.session.Session(region_name=region, **self._keys).client(
            service, config=config, **more
        )

    def _hook(self, service: str) -> Any:
        from airflow.providers.amazon.aws.hooks.base_aws import AwsBaseHook

        hook = AwsBaseHook(
            aws_conn_id=self._conn_id, client_type=service, region_name=self._region or None
        )
        # The hook itself would go on with whatever credentials this machine has.
        if not isinstance(hook.conn_config.conn_id, str):
            msg = f"fleet option aws_conn_id: there is no Airflow connection {self._conn_id!r}"
            raise InvalidSpec(msg)
        return hook


class Aws:
    """The clients of one identity, each made once. Thread-safe."""

    _shared: ClassVar[dict[Hashable, Aws]] = {}
    _sharing = threading.Lock()

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self._clients: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, identity: Identity) -> Aws:
        """The one of this process that all with the same identity share: clients are slow to make."""
        with cls._sharing:
            return cls._shared.setdefault(identity.key, cls(identity))

    @classmethod
    def forget_all(cls) -> None:
        """Make clients anew: a forked child must not use its parent's connections."""
        cls._sharing = threading.Lock()
        cls._shared = {}

    @property
    def region(self) -> str:
        """Where instances are. Raises :class:`InvalidSpec` when nothing says so."""
        return self.identity.region

    def client(self, service: str, region: str = "") -> Any:
        """The boto3 client of a service."""
        key = (service, region)
        with self._lock:
            if key not in self._clients:
                self._clients[key] = self.identity.client(service, region)
            return self._clients[key]


os.register_at_fork(after_in_child=Aws.forget_all)


def call(action: Callable[..., _T], /, **parameters: Any) -> _T:
    """The answer of one call of a client. Raises as the module says."""
    return _explained(lambda: action(**parameters))


def _explained(action: Callable[[], _T]) -> _T:
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        CredentialRetrievalError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )
    from botocore.exceptions import (
        ConnectionError as NotConnected,
    )
    from botocore.parsers import ResponseParserError

    try:
        return action()
    except ClientError as error:
        raise explain(
            error.response.get("Error", {}).get("Code", ""),
            error.response.get("Error", {}).get("Message", str(error)),
            what=error.operation_name,
            status=error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0),
        ) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        msg = f"no AWS credentials: {error}; give the fleet option aws_conn_id, or set AWS_*"
        raise LaunchRejected(msg) from error
    except (HTTPClientError, NotConnected, CredentialRetrievalError, ResponseParserError) as error:
        msg = f"AWS did not answer: {error}"
        raise FleetUnavailable(msg) from error
    except BotoCoreError as error:
        msg = f"AWS could not be called: {error}"
        raise LaunchRejected(msg) from error


def code_of(error: BaseException) -> str:
    """AWS's code of an error that :func:`call` raised; empty when there was no answer."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def explain(code: str, message: str, *, what: str = "", status: int = 0) -> Exception:
    """One of AWS's error codes as an error of ours, with what to do about it.

    Under an HTTP ``status`` of 500 or more a code may be any, and of what stands between us and
    AWS (a proxy's page has the code ``502``): nothing was refused.
    """
    where = f"{what}: " if what else ""
    if code in _CAPACITY or _NOT_IN_ZONE in message:
        return NoCapacity(f"{where}{code}: {message}")
    if code in _QUOTAS:
        return QuotaReached(
            f"{where}{code}: {message} The quota is {_QUOTAS[code]}: ask for more under Service "
            "Quotas > Amazon EC2, or name other instance types"
        )
    if code in _DENIED or code.startswith("AuthFailure."):
        return LaunchRejected(
            f"{where}{code}: {message} Airflow's role lacks a permission: compare it with "
            "deploy/aws.yaml, and run `spotfirst doctor`"
        )
    if code in _BUSY or status >= 500 or status == 429:
        return FleetUnavailable(f"{where}{code}: {message}")
    return LaunchRejected(f"{where}{code}: {message}")


def _fingerprint(keys: Mapping[str, str | None]) -> str:
    """The same for the same keys, all parts of them: a secret that was mistyped may be mended."""
    given = "\n".join(f"{name} {value}" for name, value in sorted(keys.items()) if value)
    return hashlib.sha256(given.encode()).hexdigest() if given else ""


def _region_in(variables: Mapping[str, str]) -> str:
    return variables.get("AWS_REGION") or variables.get("AWS_DEFAULT_REGION", "")
