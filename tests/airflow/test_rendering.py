"""What templates rendered to: a missing value is told from the text of a value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst.errors import InvalidSpec
from spotfirst_airflow.operators import InvalidArgument, SpotTrainingOperator
from spotfirst_airflow.reaper import SpotReaperOperator
from spotfirst_airflow.rendering import refuse_code

COMMAND = ["python", "train.py"]


def rendered(params: dict[str, Any], *, native: bool = False, **arguments: Any) -> Any:
    """The operator after Airflow rendered its template fields."""
    dag = DAG("d", schedule=None, render_template_as_native_obj=native)
    task = SpotTrainingOperator(task_id="t", dag=dag, **{"command": COMMAND, **arguments})
    task.render_template_fields({"params": params, "ti": None})  # type: ignore[typeddict-item]
    return task


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("params", [{}, {"x": None}, {"x": "  "}])
def test_template_that_lost_its_value_is_refused_by_name(
    params: dict[str, Any], native: bool
) -> None:
    with pytest.raises(InvalidArgument, match=r"resume_from .*params\.x"):
        rendered(params, native=native, resume_from="{{ params.x }}")


def test_a_lost_value_within_a_text_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"storage .*'s3://b/None/runs'"):
        rendered({"x": None}, storage="s3://b/{{ params.x }}/runs")


def test_lost_word_of_a_command_is_named_by_its_place() -> None:
    with pytest.raises(InvalidArgument, match=r"command\[2\]"):
        rendered({"steps": None}, command=[*COMMAND, "{{ params.steps }}"])


def test_lost_tag_is_named_by_its_key() -> None:
    with pytest.raises(InvalidArgument, match="'team'"):
        rendered({"x": None}, tags={"team": "{{ params.x }}"})


def test_a_lost_value_is_not_retried() -> None:
    with pytest.raises(AirflowFailException):
        rendered({}, budget_usd="{{ params.x }}")


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("word", ["none", "None", "null", "undefined", "NONE"])
def test_a_param_may_be_a_word_for_nothing(word: str, native: bool) -> None:
    task = rendered(
        {"x": word},
        native=native,
        command=[*COMMAND, "--scheduler", "{{ params.x }}"],
        env={"AUGMENT": "mode={{ params.x }}"},
        tags={"team": "{{ params.x }}"},
    )
    assert task.command[-1] == word
    assert task.env == {"AUGMENT": f"mode={word}"}
    assert task.tags == {"team": word}


@settings(max_examples=200, deadline=None)
@given(st.text().filter(lambda text: text.strip()))
def test_every_text_of_a_param_arrives_as_it_is(text: str) -> None:
    assert rendered({"x": text}, command=["echo", "{{ params.x }}"]).command == ["echo", text]


def test_a_default_of_the_template_is_a_value() -> None:
    task = rendered({"x": None}, command=["echo", "{{ params.x or 'none' }}"])
    assert task.command == ["echo", "none"]


def test_environment_variable_may_be_set_to_nothing() -> None:
    assert rendered({"x": ""}, env={"DEBUG": "{{ params.x }}"}).env == {"DEBUG": ""}


def test_a_template_that_cannot_be_rendered_is_named() -> None:
    with pytest.raises(InvalidArgument, match=r"deadline is '{{ params\.x\.y }}'"):
        rendered({}, deadline="{{ params.x.y }}")


def test_argument_that_was_left_out_may_be_empty() -> None:
    task = rendered({}, resume_from=None, env=None)
    assert task.resume_from is None
    assert task.env is None


def test_a_mapped_task_is_checked_as_well() -> None:
    with DAG("d", schedule=None):
        mapped = SpotTrainingOperator.partial(
            task_id="t", command=COMMAND, resume_from="{{ params.x }}"
        ).expand(env=[{"A": "1"}])
    task = mapped.unmap({"env": {"A": "1"}})
    with pytest.raises(InvalidArgument, match="resume_from"):
        task._do_render_template_fields(
            task, mapped.template_fields, {"params": {}}, mapped.get_template_env(), set()
        )


def test_the_reaper_is_checked_as_well() -> None:
    task = SpotReaperOperator(task_id="r", dag=DAG("d", schedule=None), storage="{{ params.x }}")
    with pytest.raises(AirflowFailException, match="storage"):
        task.render_template_fields({"params": {}})  # type: ignore[typeddict-item]


def test_a_relative_code_folder_is_that_beside_the_dag_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dags").mkdir()
    file = tmp_path / "dags" / "mine.py"
    source = (
        "from airflow.sdk import DAG\n"
        "from spotfirst_airflow.operators import SpotTrainingOperator\n"
        "with DAG('mine', schedule=None) as dag:\n"
        "    task = SpotTrainingOperator(task_id='t', command=['a'], code='./training', fleet='local')\n"
    )
    file.write_text(source)
    names: dict[str, Any] = {"__name__": "mine", "__file__": str(file)}
    exec(compile(source, str(file), "exec"), names)
    from spotfirst_airflow.hooks import SpotfirstHook

    request = names["task"]._request(SpotfirstHook(None))
    assert request.code == str(tmp_path / "dags" / "training")


@pytest.mark.parametrize(
    ("name", "written", "rendered", "is_refused"),
    [
        ("policy", "{{ params.policy }}", "fallback", False),
        ("policy", "{{ params.policy }}", "subprocess:Popen", True),
        ("policy", "ours.policies:Careful", "ours.policies:Careful", False),
        ("fleet_options", "{{ params.options }}", {"zones": ["a"]}, False),
        ("fleet_options", "{{ params.options }}", {"agent_command": ["sh"]}, True),
        ("fleet_options", {"agent_command": ["{{ params.x }}"]}, {"agent_command": ["sh"]}, True),
        ("fleet_options", {"agent_command": ["mine"]}, {"agent_command": ["mine"]}, False),
    ],
)
def test_a_template_does_not_choose_what_a_controller_executes(
    name: str, written: object, rendered: object, is_refused: bool
) -> None:
    """Whoever may set params may not set these, whatever the DAG's author has made a template."""
    if is_refused:
        with pytest.raises(InvalidSpec, match="into the DAG"):
            refuse_code(name, written, rendered)
    else:
        refuse_code(name, written, rendered)
