"""SpotReaperOperator ends what nobody owns, and fails only when it could not look."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from jinja2.sandbox import SandboxedEnvironment

from spotfirst import events as e
from spotfirst.errors import FleetUnavailable, LaunchRejected
from spotfirst.market import Market, Pool
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage, open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.fleets import LaunchRequest
from spotfirst_airflow.fleets.local import LocalFleet
from spotfirst_airflow.provider import get_provider_info
from spotfirst_airflow.reaper import SpotReaperOperator

POOL = Pool(instance_type="g6.xlarge", zone="local-a")


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("SPOTFIRST_STORAGE", str(tmp_path / "storage"))
    monkeypatch.setenv("SPOTFIRST_LOCAL_FLEET", str(tmp_path / "fleet"))
    return open_storage(str(tmp_path / "storage"))


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[LocalFleet]:
    options = {"root": str(tmp_path / "fleet"), "agent_command": ["sleep", "300"]}
    fleet = LocalFleet(LocalFleet.settle(options, now=utc_now()), environment={})
    yield fleet
    fleet.terminate([instance.token for instance in fleet.owned()])


def launch(fleet: LocalFleet, storage: Storage, run_id: str, *, over: bool) -> None:
    """An instance with its run, which is active, or has failed an hour ago."""
    long_ago = utc_now() - timedelta(hours=1)
    spec = RunSpec(run_id=run_id, created_at=long_ago, command=("true",))
    journal = create_run(storage, spec).journal()
    journal.append(e.Created(at=long_ago))
    journal.append(
        e.Launching(
            at=long_ago, attempt=1, token=f"{run_id}-1", market=Market.SPOT, pool=POOL, reason="r"
        )
    )
    if over:
        journal.append(e.Failed(at=long_ago, message="gave up"))
    fleet.launch(
        LaunchRequest(
            token=f"{run_id}-1", run_id=run_id, attempt=1, market=Market.SPOT, pool=POOL,
            storage_url=storage.url, max_life_s=300.0,
        )
    )  # fmt: skip


def reap(**arguments: Any) -> dict[str, Any]:
    arguments.setdefault("grace", timedelta(0))
    operator = SpotReaperOperator(
        task_id="reap", fleet="local", spotfirst_conn_id=None, **arguments
    )
    return operator.execute({})


def test_it_ends_orphans_spares_the_living_and_counts_both(
    storage: Storage, fleet: LocalFleet, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(fleet, storage, "alive", over=False)
    launch(fleet, storage, "over", over=True)
    counts = reap()
    assert [instance.token for instance in fleet.owned()] == ["alive-1"]
    assert (counts["live"], counts["orphan"], counts["ended"], counts["left"]) == (1, 1, 1, 0)
    assert float(counts["saved_usd_h"]) > 0
    table = [line for line in capsys.readouterr().out.splitlines() if "has failed" in line]
    assert len(table) == 1
    assert "over" in table[0]
    assert "ended" in table[0]


def test_what_nobody_has_owned_for_a_moment_only_has_its_grace_time(
    storage: Storage, fleet: LocalFleet
) -> None:
    launch(fleet, storage, "over", over=True)
    counts = reap(grace=timedelta(minutes=5))  # it was launched just now
    assert (counts["recent"], counts["ended"]) == (1, 0)
    assert len(fleet.owned()) == 1


def test_a_dry_run_only_says_what_would_end(
    storage: Storage, fleet: LocalFleet, capsys: pytest.CaptureFixture[str]
) -> None:
    launch(fleet, storage, "over", over=True)
    counts = reap(dry_run=True)
    assert (counts["orphan"], counts["ended"]) == (1, 0)
    assert len(fleet.owned()) == 1
    assert "would end" in capsys.readouterr().out


def test_nothing_to_do_is_a_success(storage: Storage) -> None:
    assert reap()["orphan"] == 0


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (FleetUnavailable("throttled"), AirflowException),
        (LaunchRejected("ec2:DescribeInstances is not allowed"), AirflowFailException),
    ],
)
def test_it_fails_when_it_could_not_look(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    def owned(_fleet: LocalFleet) -> None:
        raise error

    monkeypatch.setattr(LocalFleet, "owned", owned)
    with pytest.raises(raised, match=str(error)) as caught:
        reap()
    assert caught.type is raised


def test_a_template_that_lost_its_value_reaps_nothing(storage: Storage, fleet: LocalFleet) -> None:
    for params in ({}, {"storage": None}, {"storage": ""}):
        operator = SpotReaperOperator(
            task_id="reap", storage="{{ params.storage }}", spotfirst_conn_id=None
        )
        with pytest.raises(AirflowFailException, match=r"params\.storage"):
            operator.render_template_fields({"params": params}, SandboxedEnvironment())


def test_airflow_is_told_where_the_operator_is() -> None:
    [listed] = get_provider_info()["operators"]
    assert SpotReaperOperator.__module__ in listed["python-modules"]


def test_the_example_runs_it_every_hour_once_it_is_switched_on() -> None:
    from dags.reap_spot_instances import dag

    assert dag.is_paused_upon_creation
    assert not dag.catchup
    [task] = dag.tasks
    assert isinstance(task, SpotReaperOperator)
    assert dag.schedule == "@hourly"
    assert isinstance(dag.start_date, datetime)
