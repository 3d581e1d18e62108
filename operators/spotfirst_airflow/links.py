"""The button on a task instance that leads to its run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk.types import TaskInstanceKey

__all__ = ["UI_PREFIX", "SpotRunLink", "run_address", "run_page"]

UI_PREFIX = "/spotfirst"
"""Where the plugin mounts its pages on Airflow's API server."""


class SpotRunLink(BaseOperatorLink):
    """On the operators, and registered by the plugin as well, which computes it live.

    So it is there from the task's first second on; for an operator of your own that derives from
    ours, which the plugin does not know, once the task has been deferred or is done.
    """

    name = "Spotfirst run"

    def get_link(self, operator: Any, *, ti_key: TaskInstanceKey) -> str:  # noqa: ARG002
        """The page of the run that this task instance has, or will have."""
        return run_page(ti_key.dag_id, ti_key.run_id, ti_key.task_id, ti_key.map_index)


def run_page(dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str:
    """The page's path below the web server, with the prefix that Airflow itself is served under."""
    from airflow.configuration import conf

    base = urlsplit(conf.get("api", "base_url", fallback="/")).path.rstrip("/")
    parts = "/".join(
        quote(part, safe="") for part in ("dags", dag_id, "runs", run_id, "tasks", task_id)
    )
    return f"{base}{UI_PREFIX}/{parts}/{map_index}"


def run_address(dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str:
    """The page's whole URL, as far as ``[api] base_url`` says where the web server is."""
    from airflow.configuration import conf

    base = urlsplit(conf.get("api", "base_url", fallback="/"))
    path = run_page(dag_id, run_id, task_id, map_index)
    return f"{base.scheme}://{base.netloc}{path}" if base.netloc else path
