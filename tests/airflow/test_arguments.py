"""Arguments are taken for what they evidently mean, or refused with name, value and example."""

from __future__ import annotations

import math
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from airflow.sdk import DAG, task
from airflow.sdk.exceptions import AirflowFailException
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst.checkpoints.retention import Retention
from spotfirst.errors import InvalidSpec
from spotfirst_airflow.arguments import ARGUMENTS, parse, to_request
from spotfirst_airflow.operators import InvalidArgument, SpotTrainingOperator
from spotfirst_airflow.policies import load_policy
from spotfirst_airflow.reaper import SpotReaperOperator

COMMAND = ["python", "train.py"]
NAIVE = datetime(2030, 1, 31, 18)  # noqa: DTZ001

WRONG: list[tuple[str, Any]] = [
    ("command", "python train.py"), ("command", []), ("command", ["python", ""]),
    ("command", ["python", None]), ("command", {"python"}), ("command", b"python"),
    ("command", ["python", ["train.py"]]), ("command", 3), ("command", ["a\0b"]),
    ("code", 3), ("code", ""), ("code", ["./training"]),
    ("storage", "runs"), ("storage", 3), ("storage", " "),
    ("storage", "s3://"), ("storage", "s3://b/a//b"), ("storage", "gs://b/a"),
    ("storage", "file://runs"), ("storage", "https://s3.amazonaws.com/b"),
    ("fleet", "ec3"), ("fleet", 2), ("fleet", ""),
    ("fleet_options", "{'time_scale': 2}"), ("fleet_options", [1]), ("fleet_options", {1: 2}),
    ("instance_types", 3), ("instance_types", [""]), ("instance_types", ""),
    ("instance_types", [None]), ("instance_types", {"g6.xlarge": 1}),
    ("policy", 3), ("policy", "spotfrist"), ("policy", dict), ("policy", ""),
    ("policy_options", 3), ("policy_options", {"no_such": 1}), ("policy_options", "losses=1"),
    ("deadline", 8), ("deadline", 8.5), ("deadline", True), ("deadline", "8"),
    ("deadline", "soon"), ("deadline", "8 parsecs"), ("deadline", ""), ("deadline", "-8h"),
    ("deadline", NAIVE), ("deadline", "2030-01-31T18:00:00"), ("deadline", "2030-01-31"),
    ("deadline", date(2030, 1, 31)), ("deadline", timedelta(0)), ("deadline", timedelta(hours=-1)),
    ("deadline", "99999999999d"), ("deadline", timedelta.max), ("deadline", [8]),
    ("deadline", datetime.max.replace(tzinfo=timezone.utc)), ("deadline", "9999-12-31T00:00:00Z"),
    ("budget_usd", 0), ("budget_usd", -5), ("budget_usd", math.nan), ("budget_usd", math.inf),
    ("budget_usd", "nan"), ("budget_usd", "a lot"), ("budget_usd", "1E+6000"),
    ("budget_usd", True), ("budget_usd", [5]), ("budget_usd", "12,50"), ("budget_usd", ""),
    ("on_budget", "halt"), ("on_budget", "STOP"), ("on_budget", True), ("on_budget", ["stop"]),
    ("dataset", ""), ("dataset", 3), ("dataset", ["corpus"]),
    ("resume_from", "night-1"), ("resume_from", 1200), ("resume_from", "a@b@c"),
    ("resume_from", "none"), ("resume_from", ""),
    ("checkpoint_mode", "file"), ("checkpoint_mode", None.__class__), ("checkpoint_mode", 1),
    ("checkpoint_period", 300), ("checkpoint_period", "5 minutes"), ("checkpoint_period", "0s"),
    ("checkpoint_period", {"minutes": 5}),
    ("retention", "newest"), ("retention", {"lats": 3}), ("retention", {"last": "three"}),
    ("retention", {"last": 0}), ("retention", {"mode": "best"}), ("retention", {1: 2}),
    ("script_retries", "many"), ("script_retries", -1), ("script_retries", 2.5),
    ("script_retries", True), ("script_retries", math.nan), ("script_retries", [1]),
    ("launches_per_hour", "thirty"), ("launches_per_hour", 0), ("launches_per_hour", 10**9),
    ("training_time", 8), ("training_time", "never"), ("training_time", "0h"),
    ("max_life", 86400), ("max_life", "a week"), ("max_life", timedelta(0)),
    ("env", ["A=1"]), ("env", "A=1"), ("env", {"A": None}), ("env", {"A": {"b": 1}}),
    ("env", {"A": "x" * 200_000}), ("env", {"A": "\ud800"}), ("command", ["x" * 200_000]),
    ("code", "s3://bucket/code"), ("instance_types", "['g6.xlarge']"),
    ("env", {"A=B": "1"}), ("env", {"": "1"}), ("env", {1: "1"}), ("env", {"A": "a\0b"}),
    ("tags", ["a"]), ("tags", {"model": "x"}), ("tags", {"team": None}), ("tags", {"team": ""}),
    ("tags", "team=a"),
    ("export", "model.safetensors"), ("export", 3), ("export", "s3://bucket/weights.pt"),
    ("export", "gs://bucket/model.safetensors"), ("export", "s3://bucket/a//b/model.safetensors"),
    ("export", "s3://model.safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_literal_is_refused_with_name_value_and_example_when_the_dag_is_parsed(
    name: str, value: Any
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        SpotTrainingOperator(task_id="t", **{"command": COMMAND, name: value})
    text = str(refused.value)
    assert text.startswith(f"{name} {value!r}"[:100])
    assert len(text) < 1000


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_value_is_refused_alike_in_a_spec_file(name: str, value: Any) -> None:
    if name in {"storage", "export"}:
        pytest.skip("not part of a request")
    values: dict[str, Any] = {"command": COMMAND, name: value}
    if name == "policy_options":
        values["policy"] = "fallback"
    with pytest.raises(InvalidSpec, match=f"^{name} "):
        to_request(values)


MEANT: list[tuple[str, Any, Any]] = [
    ("command", ("python", 3, 0.5, Path("/data"), True), ("python", "3", "0.5", "/data", "true")),
    ("command", '["python", "train.py"]', ("python", "train.py")),
    ("instance_types", "g6.xlarge", ("g6.xlarge",)),
    ("instance_types", "g6.xlarge, g5.xlarge", ("g6.xlarge", "g5.xlarge")),
    ("instance_types", '["g6.xlarge"]', ("g6.xlarge",)),
    ("fleet_options", '{"time_scale": 2}', {"time_scale": 2}),
    ("deadline", "8h", timedelta(hours=8)),
    ("deadline", " 90 m ", timedelta(minutes=90)),
    ("deadline", "1.5d", timedelta(days=1.5)),
    ("deadline", "1h30m", timedelta(minutes=90)),
    ("deadline", "2030-01-31T18:00:00Z", datetime(2030, 1, 31, 18, tzinfo=timezone.utc)),
    ("budget_usd", "0.10", Decimal("0.10")),
    ("budget_usd", 0.1, Decimal("0.1")),
    ("budget_usd", 25, Decimal(25)),
    ("checkpoint_period", "5m", timedelta(minutes=5)),
    ("max_life", "2h", timedelta(hours=2)),
    ("script_retries", "2", 2),
    ("script_retries", 2.0, 2),
    ("script_retries", np.int64(2), 2),
    ("budget_usd", np.float32(0.5), Decimal("0.5")),
    ("env", {"LR": np.float32(0.5)}, {"LR": "0.5"}),
    ("dataset_since", 3, "3"),
    ("env", {"LR": 0.1, "N": 3, "DEBUG": True, "EMPTY": ""},
     {"LR": "0.1", "N": "3", "DEBUG": "true", "EMPTY": ""}),
    ("tags", {"team": 7}, {"team": "7"}),
    ("retention", {"last": "3", "mode": "max", "metric": "acc", "best": 2},
     Retention(last=3, mode="max", metric="acc", best=2)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "meant"), MEANT)
def test_value_with_an_evident_meaning_is_taken(name: str, value: Any, meant: Any) -> None:
    assert parse(name, value) == meant


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(ARGUMENTS)),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
        | st.decimals() | st.datetimes() | st.dates() | st.timedeltas() | st.complex_numbers(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner)
        | st.sets(st.integers()) | st.tuples(inner),
        max_leaves=8,
    ),
)  # fmt: skip
def test_any_value_at_all_is_taken_or_refused_by_name(name: str, value: Any) -> None:
    said = ""
    try:
        parse(name, value)
    except InvalidSpec as error:
        said = str(error)
    assert not said or said.startswith(f"{name} ")


def test_a_list_that_a_template_made_text_of_comes_with_the_way_to_write_it() -> None:
    with pytest.raises(InvalidSpec, match=r"\| tojson"):
        parse("instance_types", "['g6.xlarge', 'g5.xlarge']")
    with pytest.raises(InvalidSpec, match=r"\| tojson"):
        parse("fleet_options", "{'time_scale': 2}")


def test_every_argument_of_the_operator_has_a_row_in_the_table() -> None:
    assert set(SpotTrainingOperator.ARGUMENTS) <= set(ARGUMENTS)
    assert set(SpotTrainingOperator.ARGUMENTS) <= set(SpotTrainingOperator.template_fields)


@pytest.mark.parametrize("name", sorted(set(SpotTrainingOperator.ARGUMENTS)))
def test_template_is_left_alone_when_the_dag_is_parsed(name: str) -> None:
    SpotTrainingOperator(task_id="t", **{"command": COMMAND, name: "{{ params.x }}"})


def test_literal_beside_a_template_is_checked() -> None:
    with pytest.raises(InvalidArgument, match="variable B"):
        SpotTrainingOperator(task_id="t", command=COMMAND, env={"A": "{{ ds }}", "B": None})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("env", {"HF_TOKEN": "hf_" + "a" * 34}, "env 'HF_TOKEN' looks like a secret"),
        ("env", {"A": "{{ ds }}", "DB_PASSWORD": "x1"}, "env 'DB_PASSWORD' looks like a secret"),
        ("env", {"SPOTFIRST_RUN": "1"}, "env 'SPOTFIRST_RUN' is Spotfirst's own"),
        ("tags", {"team": "ghp_" + "a" * 36}, "tags 'team' looks like a secret"),
    ],
)
def test_a_literal_that_may_not_stand_in_a_spec_is_refused_when_the_dag_is_parsed(
    name: str, value: Any, said: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"^{said}"):
        SpotTrainingOperator(task_id="t", **{"command": COMMAND, name: value})


def test_a_word_that_a_template_will_stand_between_is_no_secret() -> None:
    SpotTrainingOperator(task_id="t", command=[*COMMAND, "--token", "{{ params.x }}", "abc1"])
    with pytest.raises(InvalidArgument, match=r"^command looks like a secret"):
        SpotTrainingOperator(task_id="t", command=[*COMMAND, "--token", "abc1"])


def test_output_of_another_task_is_left_alone_when_the_dag_is_parsed() -> None:
    with DAG("d", schedule=None):

        @task
        def plan() -> Any: ...

        out: Any = plan()
        SpotTrainingOperator(
            task_id="t", command=out, deadline=out, env={"A": out}, instance_types=[out]
        )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"training_time": "8h", "deadline": "6h"}, "training_time"),
        ({"max_life": "1s"}, "before its first checkpoint"),
        ({"max_life": "1h", "checkpoint_period": "1h"}, "before its first checkpoint"),
        ({"on_budget": "alert"}, "budget_usd is missing"),
        ({"dataset_since": 3}, "dataset is missing"),
        ({"policy": load_policy("fallback", {}), "policy_options": {"losses": 1}}, "policy"),
        ({"fleet": "local", "fleet_options": {"tiem_scale": 2}}, "fleet_options .*tiem_scale"),
        ({"export": "/tmp/folder"}, "export .*safetensors"),
        ({"export": "/tmp/model.safetensors", "checkpoint_mode": "files"}, "export .*folder"),
    ],
)
def test_contradiction_is_refused_when_the_dag_is_parsed(
    arguments: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidArgument, match=said):
        SpotTrainingOperator(task_id="t", command=COMMAND, **arguments)


def test_what_a_template_decides_contradicts_nothing_yet() -> None:
    SpotTrainingOperator(
        task_id="t", command=COMMAND, training_time="8h", deadline="{{ params.x }}",
        on_budget="alert", budget_usd="{{ params.y }}",
    )  # fmt: skip


def test_work_that_goes_on_from_a_checkpoint_may_be_shorter_than_all_of_it() -> None:
    to_request(
        {"command": COMMAND, "training_time": "8h", "deadline": "1h", "resume_from": "a@latest"}
    )


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("comand", "command"),
        ("dead_line", "deadline"),
        ("instance_type", "instance_types"),
        ("envs", "env"),
        ("budget", "budget_usd"),
    ],
)
def test_misspelt_argument_is_refused_with_the_one_that_was_meant(wrong: str, meant: str) -> None:
    with pytest.raises(InvalidArgument, match=f"{wrong} .*did you mean {meant}"):
        SpotTrainingOperator(task_id="t", **{wrong: "x"})


def test_an_operator_without_a_command_is_refused_when_the_dag_is_parsed() -> None:
    with pytest.raises(InvalidArgument, match="command is missing"):
        SpotTrainingOperator(task_id="t")


def test_misspelt_values_come_with_a_suggestion() -> None:
    with pytest.raises(InvalidSpec, match="did you mean files"):
        parse("checkpoint_mode", "file")
    with pytest.raises(InvalidSpec, match="did you mean model_id"):
        parse("tags", {"model-id": "x"})
    with pytest.raises(InvalidSpec, match="did you mean instance_types"):
        to_request({"command": COMMAND, "instance_type": "x"})


def test_the_decorator_is_checked_when_the_dag_is_parsed() -> None:
    with DAG("d", schedule=None):

        @task.spot_training(deadline=8)  # type: ignore[attr-defined]
        def train() -> list[str]:
            return COMMAND

        with pytest.raises(InvalidArgument, match="deadline 8: "):
            train()


def test_what_a_decorated_function_returns_is_refused_without_retries() -> None:
    with DAG("d", schedule=None) as dag:

        @task.spot_training  # type: ignore[attr-defined]
        def train() -> dict[str, Any]:
            return {"command": COMMAND, "dead_line": "8h"}

        train()
    operator: Any = dag.get_task("train")
    with pytest.raises(AirflowFailException, match="did you mean deadline"):
        operator._take(operator.python_callable())


def test_a_wrong_argument_of_a_mapped_task_is_not_retried() -> None:
    with DAG("d", schedule=None):
        mapped = SpotTrainingOperator.partial(task_id="t", command=COMMAND).expand(deadline=[8])
    with pytest.raises(AirflowFailException, match="deadline 8: "):
        mapped.unmap({"deadline": 8})


def test_a_wrong_argument_that_all_mapped_tasks_share_is_an_import_error() -> None:
    with DAG("d", schedule=None), pytest.raises(InvalidArgument, match="deadline 8: "):
        SpotTrainingOperator.partial(task_id="t", command=COMMAND, deadline=8)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("grace", 5), ("grace", "soon"), ("fleet_options", "region=x"), ("storage", "runs"),
        ("fleet", "ec3"), ("dry_run", "no"),
    ],
)  # fmt: skip
def test_arguments_of_the_reaper_are_checked_when_the_dag_is_parsed(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"^{name} "):
        SpotReaperOperator(task_id="r", **{name: value})
    SpotReaperOperator(task_id="r", grace="10m", fleet_options={"time_scale": 2}, fleet="local")


def test_the_link_is_on_an_operator_of_your_own_as_well() -> None:
    from spotfirst_ui.plugin import SpotfirstPlugin

    class Mine(SpotTrainingOperator):
        """Derived by a user."""

    task = Mine(task_id="t", command=COMMAND)
    assert [link.name for link in task.operator_extra_links] == ["Spotfirst run"]
    [live] = SpotfirstPlugin.operator_extra_links
    assert SpotTrainingOperator in live.operators
