"""``spotfirst stop`` and ``spotfirst reap``: end what should not run any more."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from spotfirst.run import Run
from spotfirst.state import RunState
from spotfirst.storage import Storage
from spotfirst.wire import Record, utc_now
from spotfirst_airflow.cli._common import (
    FAILED,
    JsonOption,
    RunArgument,
    StorageOption,
    duration,
    existing_run,
    find_storage,
    print_json,
    stdout,
)
from spotfirst_airflow.cli._specfile import parse_pairs
from spotfirst_airflow.cli.display import Display
from spotfirst_airflow.cli.watching import Watcher
from spotfirst_airflow.fleets import Instance
from spotfirst_airflow.fleets.base import RUN_TAG, STORAGE_TAG, load_fleet
from spotfirst_airflow.submission import open_controller, request_stop, storage_environment

__all__ = ["reap", "stop"]


class _Verdict(Record):
    """What is known about one instance. ``orphan`` says that no live run owns it."""

    instance: Instance
    run_id: str
    why: str
    orphan: bool


def stop(
    run_id: RunArgument,
    *,
    storage: StorageOption = "",
    reason: Annotated[str, typer.Option(help="Why, for whoever looks later.")] = "stopped by hand",
    wait: Annotated[bool, typer.Option(help="Stay until every instance is gone.")] = True,
) -> None:
    """Stop a run with a checkpoint. It can go on later: `spotfirst run --run-id RUN`.

    Example:

        spotfirst stop night-1 --reason "the loss has diverged"
    """
    run = existing_run(storage, run_id)
    console = stdout()
    state = run.journal().refresh()
    if state.is_final and not state.open_attempts:
        console.print(f"run {run_id} is over already: {state.phase}", markup=False)
        return
    request_stop(run, reason=reason)
    if not wait:
        console.print(f"run {run_id} was asked to stop", markup=False)
        return
    controller = open_controller(run, environment=storage_environment())
    watcher = Watcher(run, output=False, from_now=True)
    with Display(console, quiet=True) as display:
        while True:
            step = controller.step()
            glance = watcher.look()
            display.show(glance)
            if step.done:
                break
            time.sleep(min(0.5, step.wait_s))
    saved = run.chain().refresh().newest()
    where = f"; its newest checkpoint is at step {saved[1].step}" if saved else ""
    console.print(f"run {run_id} {step.state.phase}{where}", markup=False)


def reap(
    *,
    storage: StorageOption = "",
    fleet: Annotated[str, typer.Option(help="Whose instances.")] = "local",
    fleet_option: Annotated[
        list[str] | None, typer.Option("--fleet-option", help="NAME=VALUE, such as root=/path.")
    ] = None,
    grace: Annotated[
        float, typer.Option(help="Spare instances younger than this, in seconds.", min=0)
    ] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would end.")] = False,
    json: JsonOption = False,
) -> None:
    """End instances that no live run owns: left behind when everything else was killed.

    An instance is spared when its run is active and its attempt is open, when it is younger than
    the grace time, and when its run is not in this storage.

    Example:

        spotfirst reap --dry-run
    """
    place = find_storage(storage)
    source = load_fleet(
        fleet,
        dict(parse_pairs(fleet_option or [], "--fleet-option")),
        environment=storage_environment(),
    )
    # The fleet first: a run that launches in between is then found in the journals.
    owned = source.owned()
    verdicts = _judge(owned, place, now=utc_now(), grace_s=grace)
    doomed = [verdict.instance.token for verdict in verdicts if verdict.orphan]
    if doomed and not dry_run:
        source.terminate(doomed)
    if json:
        print_json(verdicts)
    else:
        _print(verdicts, dry_run=dry_run)
    if doomed and not dry_run:
        left = {i.token for i in source.owned()} & set(doomed)
        if left:
            stdout().print(f"{len(left)} are still there; run reap again", style="red")
            raise typer.Exit(FAILED)


def _judge(
    owned: list[Instance], storage: Storage, *, now: datetime, grace_s: float
) -> list[_Verdict]:
    """What each instance's owner says about it. An instance tells its owner in its tags."""
    found = []
    states: dict[str, RunState] = {}
    for instance in owned:
        run_id = instance.tags.get(RUN_TAG, "")
        where = instance.tags.get(STORAGE_TAG, "")
        if _plain(where) != _plain(storage.url) or not run_id:
            why = f"its run is in {where or 'no storage that it names'}"
            found.append(_Verdict(instance=instance, run_id=run_id, why=why, orphan=False))
            continue
        if run_id not in states:
            states[run_id] = Run(storage, run_id).journal().refresh()
        why, orphan = _why(states[run_id], instance, now, grace_s)
        found.append(_Verdict(instance=instance, run_id=run_id, why=why, orphan=orphan))
    return found


def _plain(url: str) -> str:
    """A folder has two names: its path, and its file URL."""
    return url.removeprefix("file://").rstrip("/")


def _why(state: RunState, instance: Instance, now: datetime, grace_s: float) -> tuple[str, bool]:
    attempt = next((a for a in state.attempts if a.token == instance.token), None)
    if attempt is not None and attempt.is_open and not state.is_final:
        return f"attempt {attempt.number} of a run that is {state.phase}", False
    if attempt is None:
        what = "its run knows nothing of it"
    elif state.is_final:
        what = f"its run has {state.phase}"
    else:
        what = f"attempt {attempt.number} has ended"
    # Since when nobody wants it: its controller may be ending it this very moment.
    since = max(filter(None, (instance.started_at, state.updated_at)))
    if now - since < timedelta(seconds=grace_s):
        return f"{what}, only {duration(now - since)} ago", False
    return what, True


def _print(verdicts: list[_Verdict], *, dry_run: bool) -> None:
    console = stdout()
    if not verdicts:
        console.print("no instances are running")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("instance", "run", "age", "verdict", "why"):
        table.add_column(name)
    word = "would end" if dry_run else "ended"
    for verdict in verdicts:
        style, text = ("red", word) if verdict.orphan else ("green", "spared")
        table.add_row(
            verdict.instance.instance_id,
            Text(verdict.run_id or "?"),
            duration(utc_now() - verdict.instance.started_at),
            Text(text, style=style),
            verdict.why,
        )
    console.print(table)
