"""What AWS's errors mean to us, and who calls."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
)
from botocore.parsers import ResponseParserError

from spotfirst.errors import (
    FleetUnavailable,
    InvalidSpec,
    LaunchRejected,
    NoCapacity,
    QuotaReached,
)
from spotfirst_airflow.fleets.ec2.aws import Aws, Identity, call, code_of, explain

SILENCES = [
    ConnectTimeoutError(endpoint_url="https://ec2"),
    ReadTimeoutError(endpoint_url="https://ec2", error="timed out"),
    EndpointConnectionError(endpoint_url="https://ec2", error="no route"),
    CredentialRetrievalError(provider="iam-role", error_msg="timed out"),
    ResponseParserError("this is no XML"),
]


def failing(error: Exception) -> Any:
    def action(**parameters: Any) -> None:
        raise error

    return action


def refusal(code: str, *, status: int = 400) -> ClientError:
    answer: Any = {
        "Error": {"Code": code, "Message": "so it is"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return ClientError(answer, "CreateFleet")


@pytest.mark.parametrize("silence", SILENCES, ids=lambda each: type(each).__name__)
def test_of_a_silence_nothing_is_concluded(silence: Exception) -> None:
    with pytest.raises(FleetUnavailable):
        call(failing(silence))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("InsufficientInstanceCapacity", NoCapacity),
        ("UnfulfillableCapacity", NoCapacity),
        ("InsufficientVolumeCapacity", NoCapacity),
        ("MaxSpotInstanceCountExceeded", QuotaReached),
        ("VcpuLimitExceeded", QuotaReached),
        ("UnauthorizedOperation", LaunchRejected),
        ("AuthFailure.ServiceLinkedRoleCreationNotPermitted", LaunchRejected),
        ("InvalidParameterValue", LaunchRejected),
        ("RequestLimitExceeded", FleetUnavailable),
        ("InternalError", FleetUnavailable),
        ("ExpiredToken", FleetUnavailable),
    ],
)
def test_each_code_is_one_of_our_errors(code: str, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=f"CreateFleet: {code}") as caught:
        call(failing(refusal(code)))
    assert type(caught.value) is kind
    assert code_of(caught.value) == code


@pytest.mark.parametrize(
    ("code", "status"), [("502", 502), ("503", 503), ("InternalServerError", 500), ("429", 429)]
)
def test_a_fault_on_the_way_refuses_nothing_whatever_its_code(code: str, status: int) -> None:
    """What botocore makes of a proxy's page, or of an empty answer, has the status as its code."""
    with pytest.raises(FleetUnavailable):
        call(failing(refusal(code, status=status)))


def test_a_pool_without_capacity_is_none_under_whatever_status() -> None:
    with pytest.raises(NoCapacity):
        call(failing(refusal("InsufficientInstanceCapacity", status=500)))


def test_a_type_that_a_zone_lacks_is_no_capacity_under_whatever_code() -> None:
    message = (
        "Your requested instance type (p5.48xlarge) is not supported in your requested "
        "Availability Zone (us-east-1e)."
    )
    assert isinstance(explain("InvalidFleetConfiguration", message), NoCapacity)


def test_a_quota_says_which_one_and_where_to_raise_it() -> None:
    assert "L-3819A6DF" in str(explain("MaxSpotInstanceCountExceeded", ""))
    assert "Service Quotas" in str(explain("VcpuLimitExceeded", ""))


def test_a_call_that_we_make_wrongly_fails_at_once() -> None:
    with pytest.raises(LaunchRejected, match="could not be called"):
        call(failing(ParamValidationError(report="x")))


def test_without_credentials_people_are_told_where_to_give_them() -> None:
    with pytest.raises(LaunchRejected, match="aws_conn_id"):
        call(failing(NoCredentialsError()))


def test_a_silence_has_no_code() -> None:
    with pytest.raises(FleetUnavailable) as caught:
        call(failing(SILENCES[0]))
    assert code_of(caught.value) == ""


# -- who calls ------------------------------------------------------------------------------------


def test_the_region_is_the_options_before_the_environments() -> None:
    assert Identity(region="eu-west-1", environment={"AWS_REGION": "x"}).region == "eu-west-1"
    assert Identity(environment={"AWS_REGION": "eu-west-2"}).region == "eu-west-2"
    assert Identity(environment={"AWS_DEFAULT_REGION": "eu-west-3"}).region == "eu-west-3"


def test_no_region_says_where_to_give_one() -> None:
    with pytest.raises(InvalidSpec, match="AWS_REGION"):
        Identity().client("ec2")


def test_a_connections_region_is_taken_before_the_environments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = hooks(monkeypatch, region="eu-north-1")
    identity = Identity(aws_conn_id="aws_gpu", environment={"AWS_REGION": "us-east-1"})
    assert identity.region == "eu-north-1"
    assert identity.client("ec2") == "ec2 in eu-north-1"
    assert {each["aws_conn_id"] for each in made} == {"aws_gpu"}


def test_a_connection_that_does_not_exist_is_not_replaced_by_other_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hooks(monkeypatch, region="eu-north-1")
    with pytest.raises(InvalidSpec, match="no Airflow connection 'aws_cpu'"):
        Identity(aws_conn_id="aws_cpu").client("ec2")


def test_a_connection_that_may_not_assume_its_role_is_explained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hooks(monkeypatch, region="eu-north-1", error=refusal("AccessDenied"))
    with pytest.raises(LaunchRejected, match="lacks a permission"):
        Identity(aws_conn_id="aws_gpu").client("ec2")


def test_all_with_the_same_identity_share_their_clients() -> None:
    keys = {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "r-1"}
    one, two = (Aws.of(Identity(environment=keys)) for _ in range(2))
    other = Aws.of(Identity(environment=keys | {"AWS_ACCESS_KEY_ID": "AKIDOTHER"}))
    assert one is two
    assert one is not other
    assert one.client("ec2") is one.client("ec2")


def hooks(
    monkeypatch: pytest.MonkeyPatch, *, region: str, error: Exception | None = None
) -> list[dict[str, Any]]:
    """Put a hook in the place of the Amazon provider's; with what hooks were made."""
    made: list[dict[str, Any]] = []

    class Hook:
        def __init__(self, **given: Any) -> None:
            made.append(given)
            self.region_name = given["region_name"] or region
            self.service = given["client_type"]
            known = given["aws_conn_id"] == "aws_gpu"
            self.conn_config = SimpleNamespace(conn_id="aws_gpu" if known else object())

        def get_client_type(self, **given: Any) -> str:
            if error is not None:
                raise error
            return f"{self.service} in {given['region_name']}"

    name = "airflow.providers.amazon.aws.hooks.base_aws"
    parts = name.split(".")
    for n in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:n]), ModuleType(parts[n - 1]))
    stand_in: Any = SimpleNamespace(AwsBaseHook=Hook)
    monkeypatch.setitem(sys.modules, name, stand_in)
    return made


def test_a_secret_that_was_mended_is_used_from_then_on() -> None:
    keys = {
        "AWS_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "AKIA1",
        "AWS_SECRET_ACCESS_KEY": "x",
    }
    mistyped, mended = (
        Identity(environment=keys | {"AWS_SECRET_ACCESS_KEY": secret}) for secret in ("y", "x")
    )
    assert mended.key == Identity(environment=keys).key != mistyped.key
    assert "AKIA1" not in str(mended.key)
