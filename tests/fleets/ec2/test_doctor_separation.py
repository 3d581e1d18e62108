"""The doctor in an account whose stack keeps runs apart, and where options and stack disagree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.fleets.ec2.examined import World, an_account, wrong
from tests.fleets.ec2.stacks import Stack, denial

APART = {
    "access_points": "arn:aws:s3:us-east-1:123456789012:accesspoint/spotfirst-0a1b2c3d",
    "role": "arn:aws:iam::123456789012:role/other",
}


@pytest.fixture(scope="module")
def account() -> Iterator[Stack]:
    """Shared: no test here changes it."""
    with an_account(SeparateRuns="true") as stack:
        yield stack


@pytest.fixture
def apart(account: Stack) -> World:
    return World(account)


def test_the_stack_and_its_own_options_agree(apart: World) -> None:
    checks = apart.ask()
    assert wrong(checks) == {}
    assert {check.verdict for check in checks.values()} == {"ok"}
    listed = apart.client("s3control").list_access_points(AccountId="123456789012")
    assert listed["AccessPointList"] == []


def test_a_stack_that_keeps_runs_apart_needs_the_option(apart: World) -> None:
    del apart.options["separate_runs"]
    check = apart.ask()["instance role"]
    assert check.verdict == "failed"
    assert "separate_runs" in check.fix


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"role": APART["role"]}, "the role"),
        ({"access_points": APART["access_points"].replace("us-east-1", "eu-west-1")}, "the region"),
        (
            {"access_points": APART["access_points"].replace("123456789012", "1" * 12)},
            "the account",
        ),
    ],
)
def test_what_is_of_another_stack_is_named(
    apart: World, changes: dict[str, Any], found: str
) -> None:
    apart.options["separate_runs"] = {**apart.options["separate_runs"], **changes}
    check = apart.ask()["separate runs"]
    assert check.verdict == "failed"
    assert check.found.startswith(found)
    assert "FleetOptions" in check.fix


def test_a_permission_that_is_missing_is_named_with_its_statement(apart: World) -> None:
    apart.aws.planted["s3control", "get_access_point"] = denial("s3:GetAccessPoint")
    check = apart.ask()["permission to access points"]
    assert check.verdict == "failed"
    assert "statement AccessPoints of deploy/aws.yaml" in check.fix


def test_without_iams_simulator_it_says_what_it_does_not_know(apart: World) -> None:
    apart.aws.planted["iam", "simulate_principal_policy"] = denial("iam:SimulatePrincipalPolicy")
    checks = apart.ask()
    assert checks["separate runs"].verdict == "skipped"
    assert checks["permission to access points"].verdict == "ok"
