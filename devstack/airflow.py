"""Airflow on this machine, one child process a component, so that a test can end one of them.

`python -m devstack.airflow` runs it in the foreground with an S3 server beside it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from devstack.airflow_client import PATIENCE_S, AirflowClient, wait_for
from devstack.processes import (
    Child,
    DevstackError,
    carrying,
    end,
    free_ports,
    wait_until_interrupted,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from typing_extensions import Self

COMPONENTS = ("api-server", "scheduler", "dag-processor", "triggerer")
_MARK = "DEVSTACK_AIRFLOW_HOME"
_PROJECT = Path(__file__).resolve().parent.parent
_MAX_RESTARTS = 5
_LOG = logging.getLogger(__name__)
_HEALTH_KEY = {"scheduler": "scheduler", "dag-processor": "dag_processor", "triggerer": "triggerer"}


class AirflowStandalone:
    """Airflow with SQLite and LocalExecutor, all in `home`.

    Args:
        home: what becomes AIRFLOW_HOME: database, logs, generated keys. Kept by `stop`.
        dags: the folder with the DAG files.
        environment: variables for every component, over the caller's and over the defaults here;
            `AIRFLOW__DATABASE__SQL_ALCHEMY_CONN` in it selects another database.
        components: what to run; `("standalone",)` runs Airflow's own all-in-one command, which
            also opens two log ports on every interface: for comparison, not for daily use.
        port: of the API server and the UI; a free one by default.
    """

    def __init__(
        self,
        home: Path,
        dags: Path,
        environment: Mapping[str, str] | None = None,
        *,
        components: tuple[str, ...] = COMPONENTS,
        port: int | None = None,
    ) -> None:
        self.home = home.absolute()
        self.dags = dags.absolute()
        self.components = components
        self.port = port if port is not None else free_ports(1)[0]
        self.children: dict[str, Child] = {}
        self._extra = dict(environment or {})
        self._identity = uuid.uuid4().hex
        self._is_up = False
        self._restarts = 0
        self._down: set[str] = set()  # components that were ended on purpose
        self._client: AirflowClient | None = None

    @property
    def url(self) -> str:
        """Where the UI is."""
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> AirflowClient:
        """Return the REST client; the same one each time."""
        if self._client is None:
            self._client = AirflowClient(self.url, before_request=self.check)
        return self._client

    def environment(self) -> dict[str, str]:
        """Return the whole environment of the components, for running `airflow` commands beside."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("AIRFLOW_")}
        scripts = str(Path(sys.executable).parent)
        return {
            **inherited,
            "PATH": os.pathsep.join([scripts, inherited.get("PATH", os.defpath)]),
            "AIRFLOW_HOME": str(self.home),
            _MARK: self._identity,
            "SPT_NOENV": "1",  # setproctitle would overwrite the environment that carries the mark
            **_settings(self.home, self.dags, self.port),
            **self._keys(),
            **self._extra,
        }

    def start(self, timeout_s: float = PATIENCE_S) -> Self:
        """Create the database if there is none, start the components, wait until all are healthy.

        Raises:
            DevstackError: a component ended or is not healthy in time; the message holds its log.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        (self.home / "airflow.cfg").touch()  # else each component writes 140 kB of defaults
        try:
            self._prepare_database()
            for component in self.components:
                self.start_component(component)
            self.wait_healthy(timeout_s)
        except BaseException:
            self.stop()
            raise
        self._is_up = True
        return self

    def start_component(self, name: str) -> Child:
        """Start one component (again). `triggerer-2` is a second triggerer, and so on."""
        current = self.children.get(name)
        if current is not None and current.is_running():
            raise DevstackError(f"{name} is running already, with pid {current.pid}")
        command = [sys.executable, "-m", "airflow", *_arguments(name, self.port)]
        log = self.home / "logs" / f"{name}.log"
        self.children[name] = Child(command, log=log, environment=self.environment(), cwd=self.home)
        self._down.discard(name)
        return self.children[name]

    def check(self) -> None:
        """Start components again that ended by themselves, as a service manager would.

        A scheduler ends when SQLite is locked for too long; no task would run any more. Call this
        in every loop that waits for Airflow. The client calls it before each request.

        Raises:
            DevstackError: one ended while Airflow started, or too often; the message holds its log.
        """
        for name, child in list(self.children.items()):
            if name in self._down or child.is_running():
                continue
            if not self._is_up or self._restarts >= _MAX_RESTARTS:
                raise DevstackError(f"Airflow's {name} ended by itself:\n{child.tail()}")
            self._restarts += 1
            _LOG.warning(
                "Airflow's %s ended by itself and is started again; its log: %s", name, child.log
            )
            self.start_component(name)

    def pid(self, name: str) -> int:
        """Return the process id of a component."""
        return self.children[name].pid

    def kill(self, name: str, *, tree: bool = True) -> None:
        """SIGKILL a component: with all its processes as a lost machine, or its main one alone.

        Processes that moved to a session of their own, as local instances do, live on if they are
        no descendants any more.
        """
        self._down.add(name)
        self.children[name].kill(tree=tree)

    def stop_component(self, name: str) -> None:
        """Stop a component with SIGTERM, as a rolling update does."""
        self._down.add(name)
        self.children[name].stop()

    def wait_healthy(self, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the API server answers and the components it watches are healthy."""
        wanted = {key for name, key in _HEALTH_KEY.items() if name in self.components}
        if "standalone" in self.components:
            wanted = set(_HEALTH_KEY.values())
        wanted.add("metadatabase")
        health: dict[str, str | None] = {}

        def healthy() -> bool:
            nonlocal health
            self.check()
            health = self.client().health()
            return all(health.get(key) == "healthy" for key in wanted)

        wait_for(healthy, timeout_s, lambda: f"Airflow to be healthy: {health}; {self._tails()}")

    def survivors(self) -> list[int]:
        """List pids of all that still runs with this Airflow's environment.

        This finds the instances of the local fleet too, though they left their session.
        """
        return [process.pid for process in carrying(_MARK, self._identity)]

    def stop(self, grace_s: float = 5) -> None:
        """Stop everything that was started here or by what was started here; keep `home`.

        The API server needs about 7 s to end by itself, so it is usually ended after `grace_s`.

        Raises:
            DevstackError: a process is still there.
        """
        self._is_up = False
        if self._client is not None:
            self._client.close()
            self._client = None
        running = [child for child in self.children.values() if child.is_running()]
        for child in running:
            child.process.terminate()
        deadline = time.monotonic() + grace_s
        for child in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.01, deadline - time.monotonic()))
        for child in self.children.values():
            child.stop(grace_s=0.1)
        end(carrying(_MARK, self._identity), grace_s=1)
        left = self.survivors()
        if left:
            raise DevstackError(f"processes {left} of the Airflow in {self.home} are still there")

    def __enter__(self) -> Self:
        """Start it."""
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop it."""
        self.stop()

    def _tails(self) -> str:
        return "\n".join(f"--- {name}\n{c.tail(10)}" for name, c in self.children.items())

    def _keys(self) -> dict[str, str]:
        """Return keys that all components share, generated once per home."""
        path = self.home / "keys.json"
        if not path.exists():
            self.home.mkdir(parents=True, exist_ok=True)
            keys = {
                "AIRFLOW__CORE__FERNET_KEY": base64.urlsafe_b64encode(os.urandom(32)).decode(),
                "AIRFLOW__API__SECRET_KEY": secrets.token_urlsafe(32),
                "AIRFLOW__API_AUTH__JWT_SECRET": secrets.token_urlsafe(64),
            }
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w") as file:
                json.dump(keys, file)
        return dict(json.loads(path.read_text()))

    def _prepare_database(self) -> None:
        """Create the database. An empty SQLite one takes 5 s, so a copy is kept for the next."""
        own = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN" not in self._extra
        database = self.home / "airflow.db"
        template = _PROJECT / ".local" / "cache" / f"airflow-{version('apache-airflow')}.db"
        if own and database.exists():
            return
        if own and template.exists():
            shutil.copyfile(template, database)
            return
        done = subprocess.run(
            [sys.executable, "-m", "airflow", "db", "migrate"],
            env=self.environment(),
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        if done.returncode:
            raise DevstackError(
                f"airflow db migrate failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            )
        if own:
            template.parent.mkdir(parents=True, exist_ok=True)
            partial = template.with_suffix(f".{self._identity}")
            shutil.copyfile(database, partial)
            partial.replace(template)


def _arguments(name: str, port: int) -> list[str]:
    """Return the arguments of `airflow` for a component's name; `triggerer-2` is a triggerer."""
    command = re.sub(r"-\d+$", "", name)
    if command == "api-server":
        return [command, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    if command in {"scheduler", "triggerer"}:
        # Logs are read from the same disk: no server for them, no port to share.
        return [command, "--skip-serve-logs"]
    if command in {"dag-processor", "standalone"}:
        return [command]
    raise DevstackError(f"no component {name!r}; there are {', '.join(COMPONENTS)} and standalone")


def _settings(home: Path, dags: Path, port: int) -> dict[str, str]:
    """Return Airflow's settings for one small machine and short waits."""
    url = f"http://127.0.0.1:{port}"
    log_port, trigger_log_port = free_ports(2)  # used by `standalone` only
    settings = {
        "CORE__DAGS_FOLDER": dags,
        "CORE__LOAD_EXAMPLES": False,
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": 4,
        "CORE__DAGS_ARE_PAUSED_AT_CREATION": False,
        "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": True,
        "CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "API__BASE_URL": url,
        "API__HOST": "127.0.0.1",
        "API__PORT": port,
        "API__WORKERS": 1,
        # SQLite has one writer. The default timeout is 5 s, after which the scheduler ends.
        "DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home / 'airflow.db'}?timeout=120",
        "LOGGING__BASE_LOG_FOLDER": home / "logs",
        "LOGGING__WORKER_LOG_SERVER_PORT": log_port,
        "LOGGING__TRIGGER_LOG_SERVER_PORT": trigger_log_port,
        # By default 5 s: a small machine that starts everything at once takes longer to answer.
        "WORKERS__EXECUTION_API_TIMEOUT": 60,
        "DAG_PROCESSOR__PARSING_PROCESSES": 1,
        "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": 5,
        "DAG_PROCESSOR__REFRESH_INTERVAL": 5,
        "DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": 1,
        "SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": 0.3,
        "SCHEDULER__TRIGGER_TIMEOUT_CHECK_INTERVAL": 5,
    }
    return {f"AIRFLOW__{name}": str(value) for name, value in settings.items()}


def main() -> None:
    """Run Airflow until Ctrl-C, with an S3 server unless told otherwise."""
    from devstack.s3 import S3Server

    parser = argparse.ArgumentParser(prog="python -m devstack.airflow", description=__doc__)
    parser.add_argument("--home", type=Path, default=Path(".local/airflow"))
    parser.add_argument("--dags", type=Path, default=_PROJECT / "dags")
    parser.add_argument("--port", type=int, default=None, help="default: a free one")
    parser.add_argument("--no-s3", action="store_true", help="start no S3 server")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        environment: dict[str, str] = {}
        if not options.no_s3:
            server = stack.enter_context(S3Server(Path(".local/s3")))
            environment = {**server.environment(), "SPOTFIRST_STORAGE": f"{server.url}/spotfirst"}
            print(f"S3 is ready: {server.url} at {server.endpoint_url}")
        airflow = AirflowStandalone(options.home, options.dags, environment, port=options.port)
        stack.enter_context(airflow)
        print(f"Airflow is ready: {airflow.url} (no password; this machine only). Ctrl-C stops it.")
        print(f"Logs: {airflow.home / 'logs'}", flush=True)
        wait_until_interrupted(airflow.check)


if __name__ == "__main__":
    main()
