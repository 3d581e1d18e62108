"""The main job, watched from a terminal: a DAG that trains through interruptions, on this machine.

`python -m devstack.demo` starts an S3 server and Airflow, triggers the DAG `train_on_spot`, and
shows its run while instances are taken back with and without notice. Beside it, the same training
runs without any interruption: at the end, the weights of both must be the same, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from devstack.airflow import AirflowStandalone
from devstack.airflow_client import PATIENCE_S
from devstack.processes import DevstackError, wait_until_interrupted
from devstack.s3 import S3Server
from spotfirst.errors import SpotfirstError
from spotfirst.run import Run
from spotfirst.state import Phase, RunState
from spotfirst.storage import open_storage
from spotfirst_airflow.cli.display import Display
from spotfirst_airflow.cli.summary import print_summary
from spotfirst_airflow.cli.watching import Glance, Watcher
from spotfirst_airflow.fleets.base import load_fleet
from spotfirst_airflow.following import Follower
from spotfirst_airflow.results import weights_digest
from spotfirst_airflow.submission import Request, attach, base_run_id, storage_environment

if TYPE_CHECKING:
    from devstack.airflow_client import AirflowClient
    from spotfirst.storage import Storage

_PROJECT = Path(__file__).resolve().parent.parent
_DAG_ID = "train_on_spot"
_TASK_ID = "train"
_SEED = 1
_STEPS = 300
"""At a quarter of a second each, a little longer than the market's script takes."""
_INTERRUPTED = 130


class Reference:
    """The same training without interruptions, in the background of this process."""

    def __init__(self, storage: Storage, *, steps: int) -> None:
        self._storage = storage
        self._request = Request(
            command=(
                # It must not take the cores from the run that people watch.
                *("nice", "-n", "10"),
                *("python", "train.py", "--steps", str(steps), "--seed", str(_SEED)),
                *("--pace-s", "0"),  # it changes the time of a step, and nothing else
            ),
            code=str(_PROJECT / "dags" / "training" / "gpt"),
            policy="on_demand",
            instance_types=("g6.xlarge",),
            fleet_options={"market": {"kind": "calm"}},
            checkpoint_period_s=10.0,
            max_life_s=1800.0,
            deadline=timedelta(minutes=30),
        )
        self._ended = threading.Event()
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._work, name="reference", daemon=True)
        self.run: Run | None = None
        self.state: RunState | None = None
        self.error = ""

    def start(self) -> None:
        """Begin to train."""
        self._thread.start()

    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def leave(self) -> None:
        """Look after it no more."""
        self._left.set()
        if self._thread.ident is not None:
            self._thread.join(10)

    def _work(self) -> None:
        try:
            run = attach(
                self._storage,
                "uninterrupted",
                self._request,
                owner="demo",
                environment=storage_environment(),
            )
            self.run = run
            silent = logging.getLogger("devstack.demo.reference")
            silent.setLevel(logging.CRITICAL)  # the terminal is taken
            follower = Follower(lambda: (run, storage_environment()), log=silent, show_output=False)
            while (wait_s := follower.look()) is not None and not self._left.wait(wait_s):
                pass
            self.state = follower.state
        except Exception as error:  # noqa: BLE001 - shown where the result would be
            self.error = f"{type(error).__name__}: {error}"
        finally:
            self._ended.set()


def main() -> None:
    """Run the demo; exit code 1 when the run fails, or its weights are not the reference's."""
    parser = argparse.ArgumentParser(prog="python -m devstack.demo", description=__doc__)
    parser.add_argument("--exit", action="store_true", help="end when the training is done")
    parser.add_argument("--steps", type=int, default=_STEPS, help="steps to train (%(default)s)")
    parser.add_argument("--home", type=Path, default=Path(".local/demo"), help="%(default)s")
    parser.add_argument("--port", type=int, default=None, help="of Airflow; default: a free one")
    options = parser.parse_args()
    console = Console(highlight=False)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    code = _INTERRUPTED
    try:
        code = _play(console, options)
    except KeyboardInterrupt:
        console.print("interrupted")
    except (DevstackError, SpotfirstError, OSError) as error:
        console.print(Text(f"the demo failed: {error}", style="bold red"), soft_wrap=True)
        code = 1
    sys.exit(code)


def _play(console: Console, options: argparse.Namespace) -> int:
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        home = stack.enter_context(_own_home(options.home))
        # First in, last out: whatever happens, nothing of the demo stays behind.
        stack.callback(console.print, Text("everything that the demo started has ended"))
        stack.callback(_end_instances, home)
        display = stack.enter_context(Display(console))
        display.stage("starting an S3 server")
        server = stack.enter_context(S3Server(home / "s3"))
        url = f"{server.url}/runs"
        os.environ.update(server.environment())
        os.environ["SPOTFIRST_STORAGE"] = url
        os.environ["SPOTFIRST_LOCAL_FLEET"] = str(home / "fleet")
        storage = open_storage(url)
        display.say(f"S3 is ready: {url} at {server.endpoint_url}", "dim")
        reference = Reference(storage, steps=options.steps)
        stack.callback(reference.leave)
        reference.start()
        display.stage("starting Airflow; meanwhile the same training runs without interruptions")
        dags = _PROJECT / "dags"
        # It inherits the storage and its keys from this process.
        airflow = AirflowStandalone(home / "airflow", dags, {}, port=options.port)
        stack.enter_context(_stopping(airflow, display))
        display.say(f"Airflow is ready: {airflow.url} (no password; this machine only)", "bold")
        run_id = _trigger(airflow.client(), display, steps=options.steps)
        run = Run(storage, base_run_id(_DAG_ID, run_id, _TASK_ID))
        display.say(f"{airflow.url}/dags/{_DAG_ID}/runs/{run_id}/tasks/{_TASK_ID}", "dim")
        _await_run(run, airflow.client(), display, run_id)
        glance = _watch(run, display, airflow)
        display.stage("Airflow finishes the task")
        dag_state = airflow.client().wait_for_run(_DAG_ID, run_id)
        with _paused(display):
            print_summary(run, glance.state, console, digest=False)
        same = _compare(run, reference, display)
        took_s = time.monotonic() - began
        display.say(f"\nthe demo took {took_s:.0f} s; in Airflow the DAG run is: {dag_state}")
        if not options.exit:
            with _paused(display):
                _invite(console, airflow, run)
                wait_until_interrupted(airflow.check)
        is_well = same and glance.state.phase is Phase.SUCCEEDED and dag_state == "success"
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # from here on it ends by itself, and soon
        display.stage("stopping everything")
        return 0 if is_well else 1


# -- the stages ---------------------------------------------------------------------------------


def _trigger(client: AirflowClient, display: Display, *, steps: int) -> str:
    display.stage("Airflow reads the DAG files")
    client.wait_for_dag(_DAG_ID)
    run_id = client.trigger(_DAG_ID, conf={"steps": steps, "seed": _SEED})
    display.say(f"DAG {_DAG_ID} is triggered: {run_id}")
    return run_id


def _await_run(run: Run, client: AirflowClient, display: Display, run_id: str) -> None:
    """Until the task has written the run's spec. Raises with the task's log if it fails."""
    display.stage("Airflow schedules the task")
    give_up = time.monotonic() + PATIENCE_S
    state: str | None = None
    while not run.control.exists("journal/00000001.json"):
        with contextlib.suppress(DevstackError):  # busy; the next answer will do
            state = client.task_state(_DAG_ID, run_id, _TASK_ID)
        if state in {"failed", "upstream_failed", "up_for_retry"} or time.monotonic() > give_up:
            log = client.logs(_DAG_ID, run_id, _TASK_ID)[-3000:]
            raise DevstackError(f"task {_TASK_ID} is {state}, without a run; its log:\n{log}")
        time.sleep(0.3)


def _watch(run: Run, display: Display, airflow: AirflowStandalone) -> Glance:
    """Show the run until it is over. Airflow looks after it; this only reads its files."""
    watcher = Watcher(run)
    while True:
        airflow.check()
        glance = watcher.look()
        display.show(glance)
        if glance.is_over:
            return glance
        time.sleep(0.3)


def _compare(run: Run, reference: Reference, display: Display) -> bool:
    """Whether the final weights are those of the training without interruptions."""
    give_up = time.monotonic() + PATIENCE_S
    while not reference.is_over() and time.monotonic() < give_up:
        display.stage("waiting for the training without interruptions")
        time.sleep(0.2)
    display.stage("reading the weights")
    ours = weights_digest(run)
    theirs = weights_digest(reference.run) if reference.run and reference.is_over() else None
    if theirs is None:
        why = reference.error or (
            reference.state.failure.message
            if reference.state and reference.state.failure
            else "it was not done in time"
        )
        display.say(f"✗ there are no weights to compare with: {why}", "bold red")
        return False
    display.say("")
    display.say(f"weights after the interruptions  SHA-256 {ours}")
    display.say(f"weights without interruptions    SHA-256 {theirs}")
    if ours == theirs:
        display.say("✓ the same, bit for bit", "bold green")
        return True
    display.say("✗ the weights differ", "bold red")
    return False


def _invite(console: Console, airflow: AirflowStandalone, run: Run) -> None:
    settings = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    settings |= {k: os.environ[k] for k in ("SPOTFIRST_STORAGE", "SPOTFIRST_LOCAL_FLEET")}
    path = airflow.home.parent / "environment"
    with contextlib.ExitStack() as stack:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)  # it holds keys
        file = stack.enter_context(os.fdopen(handle, "w"))
        file.writelines(f"export {name}='{value}'\n" for name, value in sorted(settings.items()))
    console.print(Text(f"\nAirflow stays up: {airflow.url}   Ctrl-C ends everything.", "bold"))
    console.print("Look at the run from another shell:", markup=False)
    console.print(f"  . {path}; .venv/bin/spotfirst show {run.run_id} --events", soft_wrap=True)


# -- cleaning up --------------------------------------------------------------------------------


@contextlib.contextmanager
def _own_home(home: Path) -> Iterator[Path]:
    """An empty folder that no other demo uses at the same time."""
    home = home.absolute()
    home.parent.mkdir(parents=True, exist_ok=True)
    with home.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DevstackError(f"a demo is running in {home}; end it, or choose --home") from None
        _end_instances(home)  # of a demo that was killed
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        yield home


@contextlib.contextmanager
def _stopping(airflow: AirflowStandalone, display: Display) -> Iterator[None]:
    airflow.start()
    try:
        yield
    finally:
        display.stage("stopping Airflow")
        airflow.stop(grace_s=1)


def _end_instances(home: Path) -> None:
    if not (home / "fleet").exists():
        return
    fleet = load_fleet("local", {"root": str(home / "fleet")}, environment={})
    for _ in range(3):  # what launched while we looked is found the next time
        owned = fleet.owned()
        if not owned:
            return
        fleet.terminate([instance.token for instance in owned])


@contextlib.contextmanager
def _paused(display: Display) -> Iterator[None]:
    """Take the progress line away while something else is printed."""
    display.__exit__(None, None, None)
    try:
        yield
    finally:
        display.__enter__()


if __name__ == "__main__":
    main()
