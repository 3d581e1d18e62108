"""``spotfirst doctor``: what a run needs, looked at before anything is launched."""

from __future__ import annotations

import os
import shlex
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from msgspec.structs import asdict
from rich.table import Table
from rich.text import Text

from spotfirst.errors import InvalidSpec
from spotfirst.spec import RunSpec
from spotfirst.storage import is_s3
from spotfirst.wire import utc_now
from spotfirst_airflow.arguments import parse, to_request
from spotfirst_airflow.cli._common import (
    FAILED,
    JsonOption,
    StorageOption,
    find_storage,
    print_json,
    stderr,
    stdout,
)
from spotfirst_airflow.cli._specfile import parse_fleet_options, read_spec_file
from spotfirst_airflow.fleets.base import fleet_class, load_fleet
from spotfirst_airflow.fleets.checks import Check, Step, check_storage, check_storage_clock
from spotfirst_airflow.submission import Request, storage_environment

__all__ = ["doctor"]

_STYLES = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


def doctor(
    spec: Annotated[
        Path | None,
        typer.Argument(metavar="[SPEC]", help="A spec file: what this run will use is looked at."),
    ] = None,
    *,
    fleet: Annotated[
        str, typer.Option(help="Whose needs to look at: ec2 or local; the spec's, or ec2.")
    ] = "",
    fleet_options: Annotated[
        str,
        typer.Option(
            "--fleet-options",
            help="All of them as JSON, or a file with it: the output FleetOptions of the stack.",
        ),
    ] = "",
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
    too. For the local fleet it looks at its options, its market and its folder. Without a spec and a
    fleet, it looks at EC2, or, when the storage is a folder, at the local fleet. It ends with code 1
    when something failed. Options win over the spec.

    Examples:

        spotfirst doctor spec.yaml

        spotfirst doctor --fleet-option region=eu-west-1 --instance-types g6.xlarge,g5.xlarge

        spotfirst doctor --fleet-options fleet.json --storage s3://BUCKET/spotfirst
    """
    values = read_spec_file(spec) if spec else {}
    request = to_request({"command": ["true"], **values})
    options = {
        **request.fleet_options,
        **_json_options(fleet_options),
        **parse_fleet_options(fleet_option or []),
    }
    named = [name.strip() for text in instance_types or [] for name in text.split(",")]
    types = [name for name in named if name] or list(request.instance_types)
    place = storage or str(values.get("storage") or "")
    is_here = bool(place) and not is_s3(place) and not options and not types
    fleet = fleet or (request.fleet if spec else "local" if is_here else "ec2")
    is_configured = bool(spec or options or os.environ.get("SPOTFIRST_LOCAL_FLEET"))
    steps = _steps(fleet, options, place, types, is_configured=is_configured)
    if spec is not None:
        steps.insert(0, Step(name="spec", run=lambda: [_check_spec(spec, request)]))
    checks = _run(steps)
    if json:
        print_json([asdict(check) for check in checks])
    else:
        _print(checks)
    if any(check.verdict == "failed" for check in checks):
        raise typer.Exit(FAILED)


def _json_options(text: str) -> dict[str, Any]:
    if not text:
        return {}
    if not text.lstrip().startswith("{"):
        path = Path(text).expanduser()
        try:
            text = path.read_text()
        except OSError as error:
            msg = f"--fleet-options {str(path)!r} cannot be read: {error.strerror or error}"
            raise InvalidSpec(msg) from error
    options: dict[str, Any] = parse("fleet_options", text)
    return options


def _check_spec(path: Path, request: Request) -> Check:
    """The spec was read already; its code has to be there as well."""
    code = request.code
    if code is not None and not Path(code).exists():
        found = f"its code {code!r} is not there"
        return Check(name="spec", verdict="failed", found=found, fix=f"mend code in {path}")
    return Check(name="spec", verdict="ok", found=f"{path}: {shlex.join(request.command)}")


def _check_local(options: dict[str, Any], types: list[str], *, is_configured: bool) -> list[Check]:
    """Options, market and types of the local fleet, and whether its folder can be written."""
    from spotfirst_airflow.fleets.local.options import LocalOptions

    try:
        folder = LocalOptions.of(options).folder
        spec = RunSpec(
            run_id="doctor", created_at=utc_now(), command=("true",), instance_types=tuple(types)
        )
        load_fleet("local", options, environment=storage_environment()).check(spec)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except InvalidSpec as error:
        fix = "mend fleet_options or instance_types"
        return [Check(name="fleet", verdict="failed", found=str(error), fix=fix)]
    except OSError as error:
        found = f"the folder of the local fleet cannot be written: {error}"
        fix = "let this user write there, or set SPOTFIRST_LOCAL_FLEET to another folder"
        return [Check(name="fleet", verdict="failed", found=found, fix=fix)]
    if not is_configured:
        return []
    found = f"local, in {folder}; what it costs is simulated"
    return [Check(name="fleet", verdict="ok", found=found)]


def _steps(
    fleet: str, options: dict[str, Any], storage: str, types: list[str], *, is_configured: bool
) -> list[Step]:
    if fleet == "ec2":
        from spotfirst_airflow.fleets.ec2.doctor import Ec2Doctor

        return Ec2Doctor(
            options,
            storage_url=storage.strip(),
            instance_types=types,
            environment=storage_environment(),
        ).steps()
    fleet_class(fleet)  # raises for one that is not there
    place = find_storage(storage, is_checked=False)
    steps = [
        Step(name="storage", run=lambda: check_storage(place)),
        Step(name="clock", run=lambda: check_storage_clock(place)),
    ]
    if fleet == "local":
        run = partial(_check_local, options, types, is_configured=is_configured)
        steps.append(Step(name="fleet", run=run))
    return steps


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
