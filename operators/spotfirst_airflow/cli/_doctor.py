"""``spotfirst doctor``: what a run needs, looked at before anything is launched."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from msgspec.structs import asdict
from rich.table import Table
from rich.text import Text

from spotfirst_airflow.cli._common import (
    FAILED,
    JsonOption,
    StorageOption,
    find_storage,
    print_json,
    stderr,
    stdout,
)
from spotfirst_airflow.cli._specfile import parse_fleet_options
from spotfirst_airflow.fleets.base import fleet_class
from spotfirst_airflow.fleets.checks import Check, Step, check_storage, check_storage_clock
from spotfirst_airflow.submission import storage_environment

__all__ = ["doctor"]

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


def doctor(
    *,
    fleet: Annotated[str, typer.Option(help="Whose needs to look at: ec2 or local.")] = "ec2",
    fleet_option: Annotated[
        list[str] | None,
        typer.Option(
            "--fleet-option", help="NAME=VALUE, such as region=eu-west-1 or subnets=ID,ID; repeat."
        ),
    ] = None,
    storage: StorageOption = "",
    instance_types: Annotated[
        list[str] | None,
        typer.Option(
            "--instance-types", "--instance-type", help="Types that runs will name: A,B; repeat."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check whether runs can work here, and say how to repair what is wrong. Launches nothing.

    On EC2 it looks at credentials, each permission (by dry runs), quotas, subnets, instance types,
    image, instance profile, bucket, queue and the clock; in the regions of the fleet option elsewhere
    too. It ends with code 1 when something failed.

    Example:

        spotfirst doctor --fleet-option region=eu-west-1 --instance-types g6.xlarge,g5.xlarge
    """
    options = parse_fleet_options(fleet_option or [])
    types = [name.strip() for text in instance_types or [] for name in text.split(",")]
    steps = _steps(fleet, options, storage, [name for name in types if name])
    checks = _run(steps)
    if json:
        print_json([asdict(check) for check in checks])
    else:
        _print(checks)
    if any(check.verdict == "failed" for check in checks):
        raise typer.Exit(FAILED)


def _steps(fleet: str, options: dict[str, Any], storage: str, types: list[str]) -> list[Step]:
    if fleet == "ec2":
        from spotfirst_airflow.fleets.ec2.doctor import Ec2Doctor

        return Ec2Doctor(
            options,
            storage_url=storage.strip(),
            instance_types=types,
            environment=storage_environment(),
        ).steps()
    fleet_class(fleet)  # raises for one that is not there
    place = find_storage(storage)
    return [
        Step(name="storage", run=lambda: check_storage(place)),
        Step(name="clock", run=lambda: check_storage_clock(place)),
    ]


def _run(steps: list[Step]) -> list[Check]:
    """All of them, one after another; the one in progress is shown where that can be."""
    console = stderr()
    checks: list[Check] = []
    if not console.is_terminal:
        return [check for step in steps for check in step.run()]
    with console.status("") as status:
        for number, step in enumerate(steps, 1):
            status.update(f"{number}/{len(steps)}  {step.name}")
            checks += step.run()
    return checks


def _print(checks: list[Check]) -> None:
    console = stdout()
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("found", overflow="fold")
    for check in checks:
        found = Text(check.found)
        if check.fix:
            found.append(f"\n→ {check.fix}", style="cyan")
        table.add_row(check.name, Text(check.verdict, style=_STYLES[check.verdict]), found)
    console.print(table)
    counts = {verdict: sum(c.verdict == verdict for c in checks) for verdict in _STYLES}
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(Text(words, style="red" if counts["failed"] else ""))
