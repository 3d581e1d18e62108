"""Once an hour, end the instances that no run owns any more."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from airflow.sdk import DAG

from spotfirst_airflow.reaper import SpotReaperOperator

with DAG(
    dag_id="reap_spot_instances",
    schedule="@hourly",
    start_date=datetime(2026, 1, 1, tzinfo=timezone.utc),
    catchup=False,
    max_active_runs=1,
    is_paused_upon_creation=True,  # it is for a cloud: switch it on where instances cost money
    default_args={"retries": 3, "retry_delay": timedelta(minutes=2)},
    tags=["spotfirst", "example"],
    doc_md="""
### Nothing runs that nobody wants

Runs end their own instances, and instances end themselves at their maximum life. Should both fail,
this finds what is left: it asks the fleet for every instance of Spotfirst's, then the runs that own
them, and ends those without an owner. The task's log says about each one why it stays or goes, and
its XCom counts them.

Fleet and storage are those of the connection `spotfirst_default`. One such task is needed for each
account and region (`fleet_options={"region": …}`) and each storage.
""",
) as dag:
    SpotReaperOperator(task_id="reap", grace=timedelta(minutes=10))
