"""``spotfirst runs``, ``show`` and ``logs``: look without touching anything."""

from __future__ import annotations

import contextlib
import shlex
import time
from datetime import datetime
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spotfirst.errors import FormatError
from spotfirst.heartbeat import Heartbeat
from spotfirst.run import Run, list_runs
from spotfirst.spec import RunSpec
from spotfirst.state import RunState
from spotfirst.wire import utc_now
from spotfirst_airflow.changeovers import changeovers, read_progress
from spotfirst_airflow.cli._common import (
    JsonOption,
    RunArgument,
    StorageOption,
    duration,
    existing_run,
    find_storage,
    moment,
    print_json,
    size,
    stderr,
    stdout,
    tell_broken,
)
from spotfirst_airflow.cli.summary import attempts_table, between_regions, describe_changeovers
from spotfirst_airflow.cli.terminal import indented, plain
from spotfirst_airflow.costs import bill, usd
from spotfirst_airflow.logs import LogFollower
from spotfirst_airflow.news import describe
from spotfirst_airflow.outlook import passed, past_limits
from spotfirst_airflow.reading import read_runs
from spotfirst_airflow.results import result

__all__ = ["logs", "runs", "show"]

_STYLES = {"succeeded": "green", "failed": "red", "stopped": "yellow", "stopping": "yellow"}


def runs(
    *,
    storage: StorageOption = "",
    prefix: Annotated[str, typer.Option(help="Only runs whose id begins like this.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-n", help="At most so many.", min=1)] = 50,
    json: JsonOption = False,
) -> None:
    """List runs, the newest first.

    Example:

        spotfirst runs --prefix train_on_spot
    """
    place = find_storage(storage)
    names = [name for name in list_runs(place) if name.startswith(prefix)]
    found, broken = read_runs(place, names, _row)
    found.sort(key=lambda row: row["created_at"], reverse=True)
    found = found[:limit]
    tell_broken(broken)
    if json:
        unreadable = [
            {"run_id": each.run_id, "phase": "unreadable", "url": each.url, "error": each.error}
            for each in broken
        ]
        print_json([*found, *unreadable])
        return
    console = stdout()
    if not found and not broken:
        console.print(f"no runs in {place.url}", markup=False)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "phase", "step", "attempts", "cost", "began (UTC)", "took"):
        table.add_column(
            name, justify="right" if name in {"step", "attempts", "cost", "took"} else "left"
        )
    for row in found:
        phase = Text(row["phase"], style=_STYLES.get(row["phase"], "cyan"))
        step = "-" if row["step"] is None else str(row["step"])
        table.add_row(
            Text(row["run_id"]), phase, step, str(row["attempts"]),
            usd(row["cost_usd"], simulated=row["is_simulated"]),
            moment(row["created_at"]), duration(row["took_s"]),
        )  # fmt: skip
    for each in broken:
        table.add_row(Text(each.run_id), Text("unreadable", style="red"), *["-"] * 5)
    console.print(table)
    for row in found:
        if row["passed"] and row["phase"] in {"active", "stopping"}:
            text = f"{row['run_id']} is past its {' and '.join(row['passed'])}"
            console.print(Text(f"{text}: see `spotfirst show`", style="bold red"))


def show(
    run_id: RunArgument,
    *,
    storage: StorageOption = "",
    events: Annotated[bool, typer.Option("--events", help="Everything that happened.")] = False,
    json: JsonOption = False,
) -> None:
    """Show all about one run: what was asked, its attempts, checkpoints and cost.

    Example:

        spotfirst show night-1 --events
    """
    run = existing_run(storage, run_id)
    spec = run.spec()
    journal = run.journal()
    state = journal.refresh()
    if json:
        print_json(_everything(run, spec, state, journal.events if events else None))
        return
    console = stdout()
    _print_head(console, run, spec, state)
    console.print()
    console.print(attempts_table(state))
    _print_checkpoints(console, run)
    account = bill(state, now=utc_now())
    console.print()
    crossed = f"{between_regions(account)}, " if account.egress_usd else ""
    simulated = account.is_simulated
    saved = f" ({account.saving_in_words})" if account.saving_in_words else ""
    console.print(
        f"cost {usd(account.total_usd, simulated=simulated)}, {crossed}on demand "
        f"{usd(account.known_on_demand_usd, simulated=simulated)}{saved}, "
        f"steps lost {'-' if account.lost_steps is None else account.lost_steps}"
    )
    if found := changeovers(state, read_progress(run, state)):
        console.print(f"changeovers {describe_changeovers(found)}", soft_wrap=True)
    for warning in state.warnings:
        console.print(Text(f"WARNING: {indented(warning)}", style="yellow"), soft_wrap=True)
    if events:
        console.print("\n[bold]events[/bold] (UTC)")
        for number, event in enumerate(journal.events, start=1):
            text = indented(describe(event, state) or type(event).__name__.lower())
            console.print(Text(f"{number:4d}  {event.at:%m-%d %H:%M:%S}  {text}"), soft_wrap=True)


def logs(
    run_id: RunArgument,
    *,
    storage: StorageOption = "",
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run is over.")
    ] = False,
    attempt: Annotated[int | None, typer.Option(help="Of this attempt only.", min=1)] = None,
) -> None:
    """Print what the training wrote, over all attempts.

    Example:

        spotfirst logs night-1 -f
    """
    run = existing_run(storage, run_id)
    journal = run.journal()
    output = LogFollower(run)
    while True:
        state = journal.refresh()
        is_over = not follow or (state.is_final and not state.open_attempts)
        lines = output.new_lines(len(state.attempts))
        is_over = is_over and not output.is_behind
        if is_over:
            lines += output.rest()
        for number, line in lines:
            if attempt in {None, number}:
                typer.echo(plain(line if attempt else f"[{number}] {line}"))
        if is_over:
            break
        if not output.is_behind:
            time.sleep(1.0)
    if attempt is not None and attempt > len(state.attempts):
        stderr().print(f"run {run_id} has {len(state.attempts)} attempts", style="yellow")


def _row(run: Run) -> dict[str, Any]:
    state, spec = run.journal().refresh(), run.spec()
    began = state.created_at or spec.created_at
    until = state.updated_at if state.is_final and state.updated_at else utc_now()
    account = bill(state, now=utc_now())
    return {
        "run_id": run.run_id,
        "phase": str(state.phase),
        "step": state.result.step if state.result else _newest_step(run, state),
        "attempts": len(state.attempts),
        "cost_usd": account.total_usd,
        "is_simulated": account.is_simulated,
        "created_at": began,
        "took_s": (until - began).total_seconds(),
        "tags": spec.tags,
        "passed": sorted(passed(spec, state, now=utc_now())),
    }


def _metrics(run: Run, state: RunState) -> str:
    """The last ones: of the result, of what trains now, or of the newest checkpoint."""
    beat = _newest_beat(run, state)
    if state.result is not None:
        found = state.result.metrics
    elif beat is not None and beat.progress.metrics:
        found = beat.progress.metrics
    else:
        found = {}
        with contextlib.suppress(FormatError):  # which the checkpoints below say
            newest = run.chain().refresh().newest()
            found = newest[1].metrics if newest else {}
    return ", ".join(f"{name} {value:.4g}" for name, value in sorted(found.items()))


def _newest_step(run: Run, state: RunState) -> int | None:
    beat = _newest_beat(run, state)
    if beat is not None and beat.progress.step is not None:
        return beat.progress.step
    return state.checkpoint_step


def _newest_beat(run: Run, state: RunState) -> Heartbeat | None:
    beats = [run.heartbeat(attempt.number) for attempt in state.open_attempts]
    training = [beat for beat in beats if beat and beat.progress.step is not None]
    return training[-1] if training else None


def _print_head(console: Console, run: Run, spec: RunSpec, state: RunState) -> None:
    phase = str(state.phase)
    head = Text.assemble((spec.run_id, "bold"), "  ", (phase, _STYLES.get(phase, "cyan")))
    console.print(head)
    code = (
        f"{spec.code.source or 'code'} ({spec.code.digest[:12]})" if spec.code else "in the image"
    )
    dataset = f"{spec.dataset.name}@{spec.dataset.version}" if spec.dataset else ""
    limits = ", ".join(
        text
        for text in (
            f"deadline {moment(spec.deadline)}" if spec.deadline else "",
            f"budget ${spec.budget_usd}" if spec.budget_usd is not None else "",
        )
        if text
    )
    parent = f"{spec.resume_from.run_id}@{spec.resume_from.step}" if spec.resume_from else ""
    for label, text in (
        ("command", shlex.join(spec.command)),
        ("env", " ".join(f"{k}={shlex.quote(v)}" for k, v in sorted(spec.env.items()))),
        ("code", code),
        ("dataset", dataset),
        ("from", parent),
        ("fleet", f"{spec.fleet}, {', '.join(spec.instance_types) or 'all types'}"),
        ("policy", spec.policy),
        ("limits", limits),
        ("tags", ", ".join(f"{k}={v}" for k, v in sorted(spec.tags.items()))),
        ("created", f"{moment(state.created_at)} UTC"),
        ("metrics", _metrics(run, state)),
        ("storage", run.url),
        ("failed", state.failure.message if state.failure else ""),
        ("stopped" if state.is_final else "stopping", state.stop.reason if state.stop else ""),
        *(("passed", text) for text in past_limits(spec, state, now=utc_now())),
        ("waiting", state.waiting.reason if state.waiting and not state.is_final else ""),
    ):
        if text:
            console.print(Text.assemble((f"  {label:<9}", "dim"), text), soft_wrap=True)


def _print_checkpoints(console: Console, run: Run) -> None:
    console.print()
    try:
        chain = run.chain().refresh()
    except FormatError as error:
        text = f"checkpoints cannot be read: {error}"
        console.print(Text(text, style="red"), soft_wrap=True)
        return
    commits = chain.commits
    if not commits:
        console.print("no checkpoints yet")
        return
    left_out = f", the newest 10 of {len(commits)}" if len(commits) > 10 else ""
    gone = f", {len(chain.pruned)} older ones no longer kept" if chain.pruned else ""
    console.print(f"[bold]checkpoints[/bold]{left_out}{gone}")
    for _, commit in commits[-10:]:
        console.print(
            f"  step {commit.step}  {commit.at:%H:%M:%S}  attempt {commit.attempt}  "
            f"{size(commit.size_bytes)}, of these {size(commit.new_bytes)} new"
        )


def _everything(
    run: Run, spec: RunSpec, state: RunState, events: list[Any] | None
) -> dict[str, Any]:
    now: datetime = utc_now()
    found: dict[str, Any] = {
        **result(run, state, now=now),
        "spec": spec,
        "state": state,
        "passed": passed(spec, state, now=now),
        "charges": bill(state, now=now, tags=spec.tags).charges,
        "changeovers": changeovers(state, read_progress(run, state)),
        "checkpoints": [
            {
                "seq": seq,
                "step": c.step,
                "attempt": c.attempt,
                "at": c.at,
                "size_bytes": c.size_bytes,
            }
            for seq, c in run.chain().refresh().commits
        ],
    }
    if events is not None:
        found["events"] = [msgspec.to_builtins(event) for event in events]
    return found
