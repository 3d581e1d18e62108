"""A wrong option is refused with its name, before AWS is asked anything."""

from __future__ import annotations

from typing import Any

import pytest

from spotfirst.errors import InvalidSpec
from spotfirst_airflow.fleets.ec2.options import Ec2Options
from tests.fleets.ec2.launches import OPTIONS


def test_options_have_defaults_for_all_but_the_account() -> None:
    options = Ec2Options.of(OPTIONS)
    options.check_launch()
    assert options.ami == "ami-0a"
    assert Ec2Options.of({}).ami.startswith("ssm:/aws/service/deeplearning/")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("subnets", ["vpc-0a"]),
        ("subnets", ["subnet-0a", "subnet-0a"]),
        ("security_groups", ["default"]),
        ("instance_profile", "arn:aws:iam::123456789012:instance-profile/spotfirst"),
        ("ami", "Deep Learning AMI"),
        ("volume_gb", 4),
        ("volume_type", "io2"),
        ("requirements", {"gpus": 0}),
        ("python", " "),
        ("python_versions", ["3.9"]),
        ("python_versions", []),
        ("on_failure", "leave"),
        ("keep_h", 0),
        ("keep_h", 1000),
        ("interruption_mean_h", -1),
        ("interruption_mean_h", float("inf")),
        ("pip_index", "https://index.example"),
        ("subnet", "subnet-0a"),
    ],
)
def test_a_wrong_option_is_named(option: str, value: Any) -> None:
    with pytest.raises(InvalidSpec, match=option):
        Ec2Options.of(OPTIONS | {option: value})


@pytest.mark.parametrize("missing", ["subnets", "instance_profile"])
def test_a_look_needs_less_than_a_launch(missing: str) -> None:
    options = Ec2Options.of({name: value for name, value in OPTIONS.items() if name != missing})
    with pytest.raises(InvalidSpec, match=missing):
        options.check_launch()
