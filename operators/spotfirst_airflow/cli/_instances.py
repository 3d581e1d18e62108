"""``spotfirst stop`` and ``spotfirst reap``: end what should not run any more."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from spotfirst.wire import utc_now
from spotfirst_airflow import reaping
from spotfirst_airflow.cli._common import (
    FAILED,
    JsonOption,
    RunArgument,
    StorageOption,
    duration,
    existing_run,
    find_storage,
    print_json,
    stderr,
    stdout,
)
from spotfirst_airflow.cli._specfile import parse_fleet_options
from spotfirst_airflow.cli.display import Display
from spotfirst_airflow.cli.watching import Watcher
from spotfirst_airflow.fleets.base import load_fleet
from spotfirst_airflow.reaping import Reaped
from spotfirst_airflow.submission import open_controller, request_stop, storage_environment

__all__ = ["reap", "stop"]


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
    fleet: Annotated[str, typer.Option(help="Whose instances: ec2 or local.")] = "local",
    fleet_option: Annotated[
        list[str] | None,
        typer.Option("--fleet-option", help="NAME=VALUE, such as region=eu-west-1; repeat."),
    ] = None,
    grace: Annotated[
        float, typer.Option(help="Spare what is nobody's for less than this, in seconds.", min=0)
    ] = 60.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would end.")] = False,
    json: JsonOption = False,
) -> None:
    """End instances that no live run owns: left behind when everything else was killed.

    An instance is spared when its run is active and its attempt is open, when nobody has owned it
    for less than the grace time, when it is kept for debugging, and when its run is not in this
    storage. In Airflow, SpotReaperOperator does the same.

    Examples:

        spotfirst reap --dry-run

        spotfirst reap --fleet ec2 --fleet-option region=eu-west-1
    """
    place = find_storage(storage)
    source = load_fleet(
        fleet,
        parse_fleet_options(fleet_option or []),
        environment=storage_environment(),
    )
    done = reaping.reap(source, place, grace_s=grace, dry_run=dry_run)
    if json:
        print_json(done.verdicts)
    else:
        _print(done)
    if done.left:
        stderr().print(f"{len(done.left)} are still there; run reap again", style="red")
        raise typer.Exit(FAILED)


def _print(done: Reaped) -> None:
    console = stdout()
    if not done.verdicts:
        console.print("no instances are running")
    else:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("instance", "run", "age", "$/h", "verdict", "why"):
            table.add_column(name)
        word = "would end" if done.dry_run else "ended"
        for verdict in done.verdicts:
            style, text = ("red", word) if verdict.orphan else ("green", "spared")
            table.add_row(
                verdict.instance.instance_id,
                Text(verdict.run_id or "?"),
                duration(utc_now() - verdict.instance.started_at),
                f"{verdict.instance.price_usd_h:.4f}",
                Text(text, style=style),
                Text(verdict.why),
            )
        console.print(table)
    if done.tidied:
        console.print(
            f"{done.tidied} other things that only served runs that are over were removed"
        )
    if done.untidy:
        stderr().print(f"other things were left: {done.untidy}", style="yellow", markup=False)
