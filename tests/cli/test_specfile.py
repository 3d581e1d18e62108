"""What a spec file and ``--set`` mean."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import pytest

from spotfirst.checkpoints.retention import Retention
from spotfirst.errors import InvalidSpec
from spotfirst_airflow.arguments import to_request
from spotfirst_airflow.cli._specfile import (
    assign,
    parse_fleet_options,
    parse_pairs,
    read_spec_file,
)

YAML = """
command: [python, train.py]
code: ./training
deadline: 8h
budget_usd: 12.50
env: {LR: 0.1, DEBUG: true}
tags: {team: search}
"""
TOML = """
command = ["python", "train.py"]
code = "./training"
deadline = "8h"
budget_usd = "12.50"
[env]
LR = 0.1
DEBUG = true
[tags]
team = "search"
"""
JSON = """{"command": ["python", "train.py"], "code": "./training", "deadline": "8h",
"budget_usd": 12.50, "env": {"LR": 0.1, "DEBUG": true}, "tags": {"team": "search"}}"""


@pytest.mark.parametrize(("name", "text"), [("s.yaml", YAML), ("s.toml", TOML), ("s.json", JSON)])
def test_the_same_spec_reads_the_same_in_each_format(tmp_path: Path, name: str, text: str) -> None:
    if name.endswith("toml"):
        pytest.importorskip("tomllib")
    (tmp_path / name).write_text(text)
    request = to_request(read_spec_file(tmp_path / name))
    assert request.command == ("python", "train.py")
    assert request.code == str(tmp_path / "training")
    assert request.deadline == timedelta(hours=8)
    assert request.budget_usd == Decimal("12.5")
    assert request.env == {"LR": "0.1", "DEBUG": "true"}
    assert request.tags == {"team": "search"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.json", "{", "is not valid"),
        ("s.json", "[1]", "holds no keys"),
        ("s.ini", "", "must end in"),
        ("s.yaml", "command: [a\n", "is not valid"),
    ],
)
def test_a_file_that_is_no_spec_is_refused_by_name(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidSpec, match=message):
        read_spec_file(tmp_path / name)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"comand": []}, "unknown keys comand"),
        ({"command": "python train.py"}, "is one string"),
        ({"command": ["a"], "checkpoint_mode": "never"}, "checkpoint_mode"),
        ({"command": ["a"], "budget_usd": "much"}, "budget_usd 'much'"),
        ({"command": ["a"], "retention": {"newest": 3}}, "unknown keys newest"),
        ({"command": ["a"], "retention": {"last": 0}}, "last"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        to_request(values)


def test_retention_of_a_spec_says_which_checkpoints_stay(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(
        "command: [a]\nretention: {last: 5, every_steps: 1000, best: 2, metric: accuracy, mode: max}"
    )
    values = read_spec_file(tmp_path / "spec.yaml")
    assign(values, {"retention.last": "9"})
    meant = Retention(last=9, every_steps=1000, best=2, metric="accuracy", mode="max")
    assert to_request(values).retention == meant


def test_set_goes_into_depth_and_reads_json_but_leaves_variables_text() -> None:
    values: dict[str, object] = {"env": {"A": "1"}, "fleet_options": {"notice_s": 5}}
    pairs = parse_pairs(
        [
            "env.B=2",
            "policy=on_demand",
            "script_retries=3",
            'fleet_options.market={"kind": "calm"}',
        ],
        "--set",
    )
    assign(values, pairs)
    assert values == {
        "env": {"A": "1", "B": "2"},
        "policy": "on_demand",
        "script_retries": 3,
        "fleet_options": {"notice_s": 5, "market": {"kind": "calm"}},
    }


def test_fleet_options_are_those_of_a_spec() -> None:
    pairs = ["region=eu-west-1", "subnets=subnet-1, subnet-2", "volume_gb=200"]
    pairs += ['requirements={"gpus": 1}', "python_versions=3.10", 'security_groups=["sg-1"]']
    assert parse_fleet_options(pairs) == {
        "region": "eu-west-1", "subnets": ["subnet-1", "subnet-2"], "volume_gb": 200,
        "requirements": {"gpus": 1}, "python_versions": ["3.10"], "security_groups": ["sg-1"],
    }  # fmt: skip
