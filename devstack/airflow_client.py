"""The few calls of Airflow's REST API that the demo and the tests make."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import httpx

from devstack.processes import DevstackError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PATIENCE_S = 900.0
"""It only ends what hangs: Airflow may share one core with ten other processes."""
TERMINAL = frozenset({"success", "failed", "skipped", "upstream_failed", "removed"})


class AirflowClient:
    """Airflow's REST API (v2), as an administrator.

    Every method raises `DevstackError` with Airflow's own words when it answers with an error.
    `before_request` is called before each request, and may raise.
    """

    def __init__(
        self,
        base_url: str,
        *,
        timeout_s: float = PATIENCE_S,
        before_request: Callable[[], None] = lambda: None,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._before_request = before_request
        # The environment may name a proxy, which has no business with 127.0.0.1.
        self.http = httpx.Client(base_url=self.base_url, timeout=timeout_s, trust_env=False)

    def health(self) -> dict[str, str | None]:
        """Return each component's status, e.g. `{"scheduler": "healthy"}`; empty without an answer."""
        try:
            answer = self.http.get("/api/v2/monitor/health")
            answer.raise_for_status()
        except httpx.HTTPError:
            return {}
        return {name: value.get("status") for name, value in answer.json().items() if value}

    def request(self, method: str, path: str, **options: Any) -> Any:
        """Call `/api/v2{path}` and return the decoded JSON.

        A refused connection, as while the API server restarts, is tried again for minutes; so are a
        question without an answer, and a call that was rolled back, as SQLite has one writer at a
        time.
        """
        deadline = time.monotonic() + PATIENCE_S
        answer = None
        while answer is None:
            self._before_request()
            try:
                if "Authorization" not in self.http.headers:
                    token = self.http.get("/auth/token").raise_for_status().json()["access_token"]
                    self.http.headers["Authorization"] = f"Bearer {token}"
                answer = self.http.request(method, f"/api/v2{path}", **options)
            except httpx.HTTPError as error:
                harmless = isinstance(error, httpx.ConnectError) or (
                    method == "GET" and isinstance(error, httpx.TransportError)
                )
                if not harmless or time.monotonic() > deadline:
                    raise DevstackError(
                        f"{method} {path}: no answer from Airflow: {error}"
                    ) from error
                time.sleep(0.3)
                continue
            if _was_rolled_back(answer) and time.monotonic() < deadline:
                answer = None
                time.sleep(0.5)
        if answer.is_error:
            raise DevstackError(
                f"{method} {path}: Airflow said {answer.status_code}: {answer.text}"
            )
        return answer.json() if answer.content else None

    def wait_for_dag(self, dag_id: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the DAG has been parsed, and see that it is not paused."""

        def parsed() -> bool:
            found = self.request("GET", "/dags", params={"dag_id_pattern": dag_id, "limit": 100})
            return any(dag["dag_id"] == dag_id for dag in found["dags"])

        wait_for(parsed, timeout_s, lambda: f"DAG {dag_id}; import errors: {self.import_errors()}")
        self.request("PATCH", f"/dags/{dag_id}", json={"is_paused": False})

    def import_errors(self) -> list[str]:
        """Return the errors met while parsing the DAG files."""
        found = self.request("GET", "/importErrors")["import_errors"]
        return [f"{error['filename']}: {error['stack_trace']}" for error in found]

    def trigger(
        self, dag_id: str, *, run_id: str | None = None, conf: dict[str, Any] | None = None
    ) -> str:
        """Start a run of the DAG; return its run id."""
        body: dict[str, Any] = {"logical_date": None, "conf": conf or {}}
        if run_id is not None:
            body["dag_run_id"] = run_id
        run = self.request("POST", f"/dags/{dag_id}/dagRuns", json=body)
        return str(run["dag_run_id"])

    def run_state(self, dag_id: str, run_id: str) -> str:
        """Return the state of a DAG run."""
        return str(self.request("GET", f"/dags/{dag_id}/dagRuns/{run_id}")["state"])

    def task(
        self, dag_id: str, run_id: str, task_id: str, *, map_index: int = -1
    ) -> dict[str, Any]:
        """Return a task instance as Airflow describes it."""
        path = self._task_path(dag_id, run_id, task_id, map_index)
        return dict(self.request("GET", path))

    def task_state(
        self, dag_id: str, run_id: str, task_id: str, *, map_index: int = -1
    ) -> str | None:
        """Return the state of a task instance; None before the scheduler saw it."""
        state = self.task(dag_id, run_id, task_id, map_index=map_index)["state"]
        return None if state is None else str(state)

    def wait_for_run(self, dag_id: str, run_id: str, timeout_s: float = PATIENCE_S) -> str:
        """Wait until a DAG run has ended; return its state."""
        state = ""

        def ended() -> bool:
            nonlocal state
            state = self.run_state(dag_id, run_id)
            return state in TERMINAL

        wait_for(ended, timeout_s, lambda: f"the end of {dag_id} {run_id}, now {state}")
        return state

    def wait_for_task(
        self,
        dag_id: str,
        run_id: str,
        task_id: str,
        states: Iterable[str] = TERMINAL,
        *,
        map_index: int = -1,
        timeout_s: float = PATIENCE_S,
    ) -> str:
        """Wait until a task instance is in one of `states`; return which."""
        wanted = frozenset(states)
        state: str | None = None

        def reached() -> bool:
            nonlocal state
            state = self.task_state(dag_id, run_id, task_id, map_index=map_index)
            return state in wanted

        wait_for(reached, timeout_s, lambda: f"{task_id} in {sorted(wanted)}, now {state}")
        return str(state)

    def clear(self, dag_id: str, run_id: str, task_ids: Iterable[str]) -> None:
        """Clear task instances, whatever their state, so that they run again."""
        body = {
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": list(task_ids),
            "only_failed": False,
            "reset_dag_runs": True,
        }
        self.request("POST", f"/dags/{dag_id}/clearTaskInstances", json=body)

    def set_task_state(
        self, dag_id: str, run_id: str, task_id: str, state: str, *, map_index: int = -1
    ) -> None:
        """Mark a task instance `success` or `failed`, as the button does."""
        path = self._task_path(dag_id, run_id, task_id, map_index)
        self.request("PATCH", path, json={"new_state": state})

    def set_run_state(self, dag_id: str, run_id: str, state: str) -> None:
        """Mark a DAG run `success`, `failed` or `queued`."""
        self.request("PATCH", f"/dags/{dag_id}/dagRuns/{run_id}", json={"state": state})

    def logs(
        self, dag_id: str, run_id: str, task_id: str, *, try_number: int = 1, map_index: int = -1
    ) -> str:
        """Return the log of one try, a message a line."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/logs/{try_number}"
        options = {"full_content": True, "map_index": map_index}
        content = self.request("GET", path, params=options)["content"]
        return "\n".join(str(line.get("event", line)) for line in content)

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str = "return_value") -> Any:
        """Return a value that a task pushed."""
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}"
        return self.request("GET", path, params={"deserialize": True})["value"]

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    @staticmethod
    def _task_path(dag_id: str, run_id: str, task_id: str, map_index: int) -> str:
        path = f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}"
        return path if map_index < 0 else f"{path}/{map_index}"


def wait_for(
    condition: Callable[[], bool], timeout_s: float, what: Callable[[], str], every_s: float = 0.2
) -> None:
    """Wait until a condition holds.

    Raises:
        DevstackError: it did not within `timeout_s`; the message contains `what()`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise DevstackError(f"waited {timeout_s:g} s in vain for {what()}")
        time.sleep(every_s)


def _was_rolled_back(answer: httpx.Response) -> bool:
    """Whether the database was busy, so that nothing of the call was applied."""
    return (
        answer.status_code == httpx.codes.INTERNAL_SERVER_ERROR and "Database error" in answer.text
    )
