"""What templates rendered to is checked before anything is launched."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from decimal import Decimal

import pytest

from spotfirst.checkpoints.retention import Retention
from spotfirst.errors import InvalidSpec
from spotfirst_airflow.rendering import (
    check_rendered,
    parse_moment,
    parse_retention,
    parse_usd,
)


@pytest.mark.parametrize("lost", ["", "  ", "None", None])
def test_template_that_lost_its_value_is_refused_by_name(lost: str | None) -> None:
    with pytest.raises(InvalidSpec, match=r"resume_from .*params\.x"):
        check_rendered({"resume_from": "{{ params.x }}"}, {"resume_from": lost})


def test_lost_word_of_a_command_is_named_by_its_place() -> None:
    written = {"command": ["python", "train.py", "{{ params.steps }}"]}
    with pytest.raises(InvalidSpec, match=r"command\[2\]"):
        check_rendered(written, {"command": ["python", "train.py", ""]})


def test_lost_tag_is_named_by_its_key() -> None:
    with pytest.raises(InvalidSpec, match="'team'"):
        check_rendered({"tags": {"team": "{{ var.x }}"}}, {"tags": {"team": "None"}})


def test_argument_that_was_left_out_may_be_empty() -> None:
    check_rendered({"resume_from": None, "env": None}, {"resume_from": None, "env": None})


def test_word_none_that_was_written_as_such_stands() -> None:
    check_rendered({"command": ["echo", "none"]}, {"command": ["echo", "none"]})


def test_environment_variable_may_be_set_to_nothing() -> None:
    check_rendered({"env": {"DEBUG": "{{ x }}"}}, {"env": {"DEBUG": ""}})


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("8h", timedelta(hours=8)),
        (" 90 m ", timedelta(minutes=90)),
        ("1.5d", timedelta(days=1.5)),
        ("2030-01-31T18:00:00Z", datetime(2030, 1, 31, 18, tzinfo=timezone.utc)),
    ],
)
def test_deadline_may_be_written_as_text(text: str, meant: object) -> None:
    assert parse_moment(text) == meant


@pytest.mark.parametrize("text", ["soon", "8", "8 parsecs", ""])
def test_deadline_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec, match="deadline"):
        parse_moment(text)


def test_dollars_stay_exact() -> None:
    assert parse_usd("0.10") == Decimal("0.10")
    assert parse_usd(25) == Decimal(25)
    with pytest.raises(InvalidSpec, match="budget_usd"):
        parse_usd("a lot")
    with pytest.raises(InvalidSpec, match="budget_usd"):
        parse_usd("nan")


def test_retention_may_have_numbers_that_a_template_rendered() -> None:
    rendered = {"last": "3", "every_steps": "1000", "best": 2, "metric": "accuracy", "mode": "max"}
    meant = Retention(last=3, every_steps=1000, best=2, metric="accuracy", mode="max")
    assert parse_retention(rendered) == meant
    assert parse_retention(meant) is meant
    assert parse_retention(None) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"lats": 3}, "unknown keys lats; there are last, every_steps"),
        ({"last": "three"}, "last"),
        ({"last": 0}, "1 or more"),
        ({"mode": "best"}, "mode"),
        ("{'last': 3}", "give a mapping"),
        ({1: 2}, "unknown keys 1"),
    ],
)
def test_retention_that_means_nothing_is_refused(value: object, said: str) -> None:
    with pytest.raises(InvalidSpec, match=said):
        parse_retention(value)
