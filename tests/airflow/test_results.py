"""What a task hands on: a result with numbers, exported weights, weights read from a result."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import msgspec
import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException, TaskDeferred

from spotfirst import events as e
from spotfirst.errors import InvalidSpec, UntrustedObject
from spotfirst.market import Market, Pool
from spotfirst.run import Run
from spotfirst.signing import ControlKeys, generate_key
from spotfirst.state import Phase
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow import submission
from spotfirst_airflow.exports import check_target, export_result
from spotfirst_airflow.hooks import SpotfirstHook
from spotfirst_airflow.operators import SpotTrainingOperator
from spotfirst_airflow.results import result

POOL = Pool(instance_type="g6.xlarge", zone="local-a")


def context(number: int = 1, *, max_tries: int = 0, clears: int | None = 0) -> dict[str, Any]:
    """What Airflow gives to one try of a task."""
    xcoms: dict[str, Any] = {}
    ti = SimpleNamespace(
        id=f"try-{number}", dag_id="d", run_id="r", task_id="t", map_index=-1, try_number=number,
        max_tries=max_tries, xcom_push=lambda key, value: xcoms.update({key: value}),
        xcom_pull=lambda key, **_: xcoms.get(key),
    )  # fmt: skip
    found: dict[str, Any] = {"ti": ti, "outlet_events": {}}
    return found | ({} if clears is None else {"dag_run": SimpleNamespace(clear_number=clears)})


def attached(operator: SpotTrainingOperator, given: dict[str, Any], storage: Path) -> Run:
    """The run that the task attached to."""
    with pytest.raises(TaskDeferred) as deferred:
        operator.execute(given)  # type: ignore[arg-type]
    return Run(open_storage(str(storage)), deferred.value.trigger.run_id)  # type: ignore[attr-defined]


def operator_for(storage: Path, **arguments: Any) -> SpotTrainingOperator:
    words = {"command": ["python", "train.py"], "storage": str(storage), "fleet": "local"}
    return SpotTrainingOperator(task_id="t", **{**words, **arguments})


def trained(run: Run, *, succeeds: bool = True, source: str = "local fleet: calm market") -> None:
    """One attempt of an hour, as journalled."""
    at, journal = utc_now(), run.journal()
    journal.refresh()
    for event in (
        e.Launching(at=at, attempt=1, token="t", market=Market.SPOT, pool=POOL, reason=""),
        e.Launched(
            at=at, attempt=1, instance_id="i", started_at=at, price_usd_h=Decimal("0.25"),
            price_source=source, price_at=at, on_demand_usd_h=Decimal(1),
        ),
        e.Ended(
            at=at, attempt=1, cause="completed" if succeeds else "script_failed",
            exit_code=None if succeeds else 1, ended_at=at + timedelta(hours=1), start_step=0,
            step=5, training_s=3600.0,
        ),
        e.Succeeded(at=at, attempt=1, step=5, metrics={"loss": 0.5})
        if succeeds
        else e.Failed(at=at, message="the command exited with code 1", log_tail=TAIL),
    ):  # fmt: skip
        journal.append(event)


TAIL = (
    "Traceback (most recent call last):",
    '  File "train.py", line 3, in <module>',
    "    main()",
    "ValueError: the learning rate is negative",
)


def test_a_result_has_numbers_and_says_what_was_asked(tmp_path: Path) -> None:
    given = context()
    operator = operator_for(tmp_path, env={"LR": 0.1}, tags={"team": "search"})
    run = attached(operator, given, tmp_path)
    trained(run)
    found = operator.execute_complete(given, {})  # type: ignore[arg-type]
    assert json.loads(json.dumps(found)) == found
    assert found["cost_usd"] == 0.25
    assert found["on_demand_usd"] == 1.0
    assert found["saving_usd"] == 0.75
    assert found["saving_share"] == 0.75
    assert found["metrics"] == {"loss": 0.5}
    assert found["is_simulated"] is True
    assert found["command"] == ["python", "train.py"]
    assert found["env"] == {"LR": "0.1"}
    assert found["tags"] == {"team": "search"}
    assert found["instance_types"] == ["g6.xlarge"]
    assert found["duration_s"] >= 0


def test_every_key_of_a_result_is_documented(tmp_path: Path) -> None:
    run = attached(operator_for(tmp_path), context(), tmp_path)
    trained(run)
    page = (Path(__file__).parents[2] / "docs" / "airflow.md").read_text()
    for key in result(run, run.journal().refresh(), now=utc_now()):
        assert f"`{key}`" in page


def test_the_log_begins_with_the_address_of_the_runs_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attached(operator_for(tmp_path), context(), tmp_path)
    told = capsys.readouterr().out
    page = "/spotfirst/dags/d/runs/r/tasks/t/-1"
    assert 0 < told.index("Run page: ") < told.index(page) < told.index("Run d--r--t in")


def test_a_run_that_failed_has_saved_nothing(tmp_path: Path) -> None:
    run = attached(operator_for(tmp_path), context(), tmp_path)
    trained(run, succeeds=False)
    found = result(run, run.journal().refresh(), now=utc_now())
    assert found["saving_share"] is None
    assert found["saving_usd"] is None


def test_the_scripts_own_error_is_the_first_line_of_the_exception(tmp_path: Path) -> None:
    given = context()
    operator = operator_for(tmp_path)
    trained(attached(operator, given, tmp_path), succeeds=False)
    with pytest.raises(AirflowException) as failed:
        operator.execute_complete(given, {})  # type: ignore[arg-type]
    first, *rest = str(failed.value).splitlines()
    assert first == "ValueError: the learning rate is negative"
    assert "$0.2500 simulated" in rest[0]


# -- a clear, or a retry ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retries", "before", "after", "trains"),
    [
        # (try, max_tries, the dag run's clears) when the result was delivered, and then
        (2, (1, 2, 0), (2, 2, 0), False),  # a retry
        (2, (1, 2, 0), (2, 3, 1), True),  # cleared
        (1, (1, 2, 0), (2, 2, 1), True),  # cleared after retries was lowered from 2 to 1
        (0, (1, 2, 0), (2, 1, 1), True),  # from 2 to 0
        (5, (1, 2, 0), (2, 6, 1), True),  # raised
        (2, (1, 2, 0), (2, 2, 1), False),  # a retry, after another task was cleared
        (0, (1, 0, 0), (2, 1, 1), True),  # cleared without retries
        (2, (3, 4, 1), (4, 4, 1), False),  # a retry after a clear
        (1, (3, 4, 1), (4, 4, 2), True),  # cleared again, with fewer retries
    ],
)
def test_a_clear_trains_again_and_a_retry_delivers_again(
    tmp_path: Path,
    retries: int,
    before: tuple[int, int, int],
    after: tuple[int, int, int],
    trains: bool,
) -> None:
    first, second = (context(n, max_tries=m, clears=c) for n, m, c in (before, after))
    operator = operator_for(tmp_path, retries=retries)
    run = attached(operator, first, tmp_path)
    trained(run)
    operator.execute_complete(first, {})  # type: ignore[arg-type]
    if trains:
        assert attached(operator, second, tmp_path).run_id == f"{run.run_id}.g2"
    else:
        assert operator.execute(second)["run_id"] == run.run_id  # type: ignore[arg-type]


def test_a_metric_that_json_lacks_is_nothing(tmp_path: Path) -> None:
    run = attached(operator_for(tmp_path), context(), tmp_path)
    journal = run.journal()
    journal.refresh()
    done = e.Succeeded(at=utc_now(), attempt=1, step=1, metrics={"loss": 0.5})
    state = msgspec.structs.replace(
        journal.state,
        result=msgspec.structs.replace(done, metrics={"loss": float("nan"), "a": 1.0}),
    )
    found = result(run, state, now=utc_now())
    assert json.loads(json.dumps(found, allow_nan=False))["metrics"] == {"loss": None, "a": 1.0}


# -- what cannot be gone on from ----------------------------------------------------------------


def test_a_checkpoint_of_the_other_mode_is_refused_before_the_launch(tmp_path: Path) -> None:
    run = attached(operator_for(tmp_path), context(), tmp_path)
    with_checkpoint(run)
    operator = operator_for(tmp_path, resume_from=f"{run.run_id}@latest", checkpoint_mode="files")
    given = context()
    given["ti"].run_id = "another"
    with pytest.raises(AirflowFailException, match="checkpoint_mode is 'files'"):
        operator.execute(given)  # type: ignore[arg-type]


def test_a_checkpoint_that_is_not_there_is_refused_with_the_arguments_name(tmp_path: Path) -> None:
    operator = operator_for(tmp_path, resume_from="nothing@latest")
    with pytest.raises(AirflowFailException, match="resume_from 'nothing@latest'"):
        operator.execute(context())  # type: ignore[arg-type]


def test_code_that_is_not_there_is_refused_with_the_arguments_name(tmp_path: Path) -> None:
    operator = operator_for(tmp_path, code=str(tmp_path / "none"))
    with pytest.raises(AirflowFailException, match="code '"):
        operator.execute(context())  # type: ignore[arg-type]


# -- weights ------------------------------------------------------------------------------------


def with_checkpoint(run: Run) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    from tests.checkpointing.stored import Writer

    state = {
        "w": torch.arange(6.0).reshape(2, 3),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "n": torch.tensor(7),
    }
    Writer(run).save(5, model=state)
    return state


def test_weights_are_exported_before_the_result_is_delivered(tmp_path: Path) -> None:
    import safetensors.numpy

    target = tmp_path / "models" / "v1" / "model.safetensors"
    given = context()
    operator = operator_for(tmp_path / "store", export=str(target))
    run = attached(operator, given, tmp_path / "store")
    with_checkpoint(run)
    trained(run)
    found = operator.execute_complete(given, {})  # type: ignore[arg-type]
    assert found["exported"] == str(target)
    head = target.read_bytes()
    assert b'"w"' in head
    assert safetensors.numpy is not None


def test_an_export_that_cannot_be_written_fails_the_task_and_a_retry_writes_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "models").write_text("in the way")
    target = tmp_path / "models" / "model.safetensors"
    operator = operator_for(tmp_path / "store", export=str(target), retries=1)
    first, second = context(1, max_tries=1), context(2, max_tries=1)
    run = attached(operator, first, tmp_path / "store")
    with_checkpoint(run)
    trained(run)
    with pytest.raises(AirflowException) as failed:
        operator.execute_complete(first, {})  # type: ignore[arg-type]
    assert not isinstance(failed.value, AirflowFailException)
    (tmp_path / "models").unlink()
    found = operator.execute(second)  # type: ignore[arg-type]
    assert found["run_id"] == run.run_id
    assert target.is_file()


def test_a_place_that_nothing_can_be_exported_to_is_refused_before_the_launch(
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidSpec, match="gs://"):
        operator_for(tmp_path, export="gs://bucket/model.safetensors")
    for wrong in ("s3://model.safetensors", "/", "x"):
        with pytest.raises(InvalidSpec):
            check_target(wrong)


def test_weights_are_exported_to_s3(tmp_path: Path, s3_url: str) -> None:
    run = attached(operator_for(tmp_path), context(), tmp_path)
    with_checkpoint(run)
    place = export_result(run, f"{s3_url}/models/model.safetensors")
    assert place == f"{s3_url}/models/model.safetensors"
    assert open_storage(f"{s3_url}/models").size_bytes("model.safetensors") > 0


def test_weights_of_a_result_are_read_as_arrays(tmp_path: Path) -> None:
    run = attached(operator_for(tmp_path), context(), tmp_path)
    state = with_checkpoint(run)
    trained(run)
    told = result(run, run.journal().refresh(), now=utc_now())
    found = SpotfirstHook(None).load_weights(told, storage=str(tmp_path))
    assert set(found) == set(state)
    assert found["w"].tolist() == state["w"].tolist()
    assert found["half"].tolist() == [1.5, -2.0]
    assert found["n"].tolist() == 7


def test_a_result_does_not_choose_the_storage_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attached(operator_for(tmp_path / "theirs"), context(), tmp_path / "theirs")
    with_checkpoint(run)
    trained(run)
    told = result(run, run.journal().refresh(), now=utc_now())
    monkeypatch.setenv("SPOTFIRST_STORAGE", str(tmp_path / "ours"))
    with pytest.raises(InvalidSpec, match="theirs"):
        SpotfirstHook(None).load_weights(told)


def test_without_a_default_storage_only_runs_of_our_controllers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPOTFIRST_STORAGE", raising=False)
    run = attached(operator_for(tmp_path / "s"), context(), tmp_path / "s")
    state = with_checkpoint(run)
    trained(run)
    told = result(run, run.journal().refresh(), now=utc_now())
    found = SpotfirstHook(None).load_weights(told)
    assert found["w"].tolist() == state["w"].tolist()
    keys = ControlKeys(generate_key())
    monkeypatch.setattr(SpotfirstHook, "control_keys", lambda self: keys)
    with pytest.raises(UntrustedObject):
        SpotfirstHook(None).load_weights(told)


def test_exporting_and_reading_weights_needs_no_torch(tmp_path: Path) -> None:
    run = attached(operator_for(tmp_path), context(), tmp_path)
    with_checkpoint(run)
    trained(run)
    told = result(run, run.journal().refresh(), now=utc_now())
    program = (
        "import json, sys; sys.modules['torch'] = None\n"
        "from spotfirst.run import Run; from spotfirst.storage import open_storage\n"
        "from spotfirst_airflow.exports import export_result\n"
        "from spotfirst_airflow.hooks import SpotfirstHook\n"
        "told, folder = json.loads(sys.argv[1]), sys.argv[2]\n"
        "run = Run(open_storage(folder), told['run_id'])\n"
        "export_result(run, folder + '/model.safetensors')\n"
        "print(SpotfirstHook(None).load_weights(told, storage=folder)['w'].sum())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(told), str(tmp_path)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "15.0"
    assert (tmp_path / "model.safetensors").is_file()


def test_a_task_that_is_ended_while_it_attaches_stops_the_run_that_it_has_just_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = operator_for(tmp_path)
    attach = submission.attach

    def ended_in_it(*args: Any, **kwargs: Any) -> NoReturn:
        attach(*args, **kwargs)
        operator.on_kill()
        raise SystemExit

    monkeypatch.setattr(submission, "attach", ended_in_it)
    with pytest.raises(SystemExit):
        operator.execute(context())  # type: ignore[arg-type]
    base_id = submission.base_run_id("d", "r", "t")
    state = Run(open_storage(str(tmp_path)), base_id).journal().refresh()
    assert state.phase is Phase.STOPPED


def test_a_task_that_is_ended_before_it_attaches_leaves_the_run_to_its_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = attached(operator_for(tmp_path), context(1), tmp_path)
    operator = operator_for(tmp_path)

    def ended_in_it(*_: Any, **__: Any) -> NoReturn:
        operator.on_kill()
        raise SystemExit

    monkeypatch.setattr(submission, "attach", ended_in_it)
    with pytest.raises(SystemExit):
        operator.execute(context(2))  # type: ignore[arg-type]
    assert run.journal().refresh().phase is Phase.ACTIVE
