"""``spotfirst checkpoint ls``, ``verify`` and ``gc``: what a run has kept, and whether it is whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.checkpoints.retention import best_first, garbage
from spotfirst.checkpoints.verifying import Verdict, verify
from spotfirst.run import Run
from spotfirst_airflow.cli._checkpointfiles import export, import_
from spotfirst_airflow.cli._common import (
    FAILED,
    ErrorsAsLines,
    JsonOption,
    RunArgument,
    StorageOption,
    moment,
    print_json,
    progress,
    run_with_checkpoints,
    size,
    stdout,
)
from spotfirst_airflow.cli._compare import diff
from spotfirst_airflow.selection import retention_of, select, split

__all__ = ["app"]

app = typer.Typer(
    cls=ErrorsAsLines,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="List, check, compare, export and import checkpoints.",
)
app.command("export")(export)
app.command("import")(import_)
app.command("diff")(diff)


@app.command("ls")
def ls(
    run_id: RunArgument,
    *,
    storage: StorageOption = "",
    every: Annotated[
        bool, typer.Option("--all", "-a", help="Also those that are no longer kept.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """List the checkpoints of a run, the newest first.

    *Best* is by the metric of the run's retention. *Pinned* ones stay because other runs start
    from them.

    Example:

        spotfirst checkpoint ls night-1
    """
    run = run_with_checkpoints(storage, run_id)
    chain, pins = run.chain().refresh(), run.pins()
    best = best_first(chain.commits, retention_of(run, chain))[:1]
    commits = sorted([*chain.commits, *chain.pruned.items()], reverse=True, key=lambda c: c[0])
    rows = [_row(seq, commit, chain, pins, best) for seq, commit in commits]
    shown = [row for row in rows if every or row["kept"] or row["pinned_by"]]
    if json:
        print_json(shown)
        return
    console = stdout()
    if not rows:
        console.print("no checkpoints yet")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("seq", "step", "saved (UTC)", "attempt", "size", "new", "metrics", ""):
        right = name in {"seq", "step", "attempt", "size", "new"}
        table.add_column(name, justify="right" if right else "left")
    for row in shown:
        table.add_row(
            str(row["seq"]), str(row["step"]), moment(row["at"]), str(row["attempt"]),
            size(row["size_bytes"]), size(row["new_bytes"]),
            Text(", ".join(f"{k} {v:.4g}" for k, v in sorted(row["metrics"].items()))), _marks(row),
            style="" if row["kept"] else "dim",
        )  # fmt: skip
    console.print(table)
    if left := len(rows) - len(shown):
        console.print(f"{left} more are no longer kept (--all lists them)", style="dim")


@app.command("verify")
def verify_(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]", help="RUN is its newest one; also RUN@best and RUN@seq:NUMBER."
        ),
    ],
    *,
    storage: StorageOption = "",
    every: Annotated[bool, typer.Option("--all", "-a", help="All that the run keeps.")] = False,
    json: JsonOption = False,
) -> None:
    """Read all bytes of a checkpoint and compare them with what was written.

    Names each object that is damaged or missing, and the checkpoints that this touches. Ends
    with code 1 when there is one.

    Examples:

        spotfirst checkpoint verify night-1@1200

        spotfirst checkpoint verify night-1 --all
    """
    run = run_with_checkpoints(storage, split(checkpoint)[0])
    if every:
        commits = _there(run)
    else:
        _, seq, commit = select(run.root, checkpoint, pinned=True)
        commits = [(seq, commit)]
    with progress("reading") as (on_total, on_bytes):
        verdict = verify(
            run.packs(), commits, still_kept=lambda: [seq for seq, _ in _there(run)],
            on_total=on_total, on_bytes=on_bytes,
        )  # fmt: skip
    steps = {seq: commit.step for seq, commit in commits}
    if json:
        print_json(_verdict(verdict, steps))
    else:
        _print_verdict(verdict, steps)
    if verdict.damage:
        raise typer.Exit(FAILED)


@app.command("gc")
def gc(
    run_id: RunArgument,
    *,
    storage: StorageOption = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    json: JsonOption = False,
) -> None:
    """Remove what no checkpoint needs any more: leftovers of writers that were killed.

    A training run does this by itself after each checkpoint; this is for what it could not finish.
    Nothing goes that a kept or pinned checkpoint needs, and nothing that is being written: it is
    safe beside a run that trains.

    Example:

        spotfirst checkpoint gc night-1 --dry-run
    """
    run = run_with_checkpoints(storage, run_id)
    chain = run.chain().refresh()  # before the pins are read
    packs = run.packs()
    found = garbage(packs, chain, run.pinned())
    if not dry_run:
        packs.delete_many([name for name, _ in found])
    total = sum(count for _, count in found)
    if json:
        print_json(
            {
                "removed": not dry_run,
                "size_bytes": total,
                "objects": [{"name": name, "size_bytes": count} for name, count in found],
            }
        )
        return
    console = stdout()
    if not chain.commits:
        console.print("no checkpoints yet, so everything that is there may still be needed")
        return
    if not found:
        console.print(f"nothing to remove: {len(chain.commits)} checkpoints need all that is there")
        return
    verb = "would remove" if dry_run else "removed"
    console.print(f"{verb} {len(found)} objects, {size(total)}; kept: {len(chain.commits)}")


def _there(run: Run) -> list[tuple[int, Commit]]:
    """The checkpoints that can be read: kept, or pinned."""
    chain = run.chain().refresh()
    pinned = run.pinned()
    return sorted(
        [*chain.commits, *((s, c) for s, c in chain.pruned.items() if s in pinned)],
        key=lambda entry: entry[0],
    )


def _row(
    seq: int, commit: Commit, chain: CheckpointChain, pins: dict[int, list[str]], best: list[int]
) -> dict[str, Any]:
    newest = chain.newest()
    return {
        "seq": seq,
        "step": commit.step,
        "at": commit.at,
        "attempt": commit.attempt,
        "content": commit.content,
        "size_bytes": commit.size_bytes,
        "new_bytes": commit.new_bytes,
        "metrics": commit.metrics,
        "kept": seq not in chain.pruned,
        "pinned_by": pins.get(seq, []),
        "newest": newest is not None and seq == newest[0],
        "best": seq in best,
    }


def _marks(row: dict[str, Any]) -> Text:
    words = [word for word in ("newest", "best") if row[word]]
    if row["pinned_by"]:
        words.append(f"pinned by {', '.join(row['pinned_by'])}")
    if not row["kept"]:
        words.append("pruned")
    return Text(", ".join(words))


def _verdict(verdict: Verdict, steps: dict[int, int]) -> dict[str, Any]:
    return {
        "whole": not verdict.damage,
        "checkpoints": [{"seq": seq, "step": step} for seq, step in steps.items()],
        "packs": verdict.packs,
        "size_bytes": verdict.size_bytes,
        "damage": [
            {
                **each._asdict(),
                "checkpoints": [{"seq": s, "step": steps[s]} for s in each.checkpoints],
            }
            for each in verdict.damage
        ],
    }


def _print_verdict(verdict: Verdict, steps: dict[int, int]) -> None:
    console = stdout()
    for each in verdict.damage:
        touched = ", ".join(f"step {steps[seq]} (seq {seq})" for seq in each.checkpoints)
        console.print(
            Text(
                f"{each.problem}: {each.name}, {each.chunks} chunks of {size(each.size_bytes)}; "
                f"touches {touched}",
                style="red",
            ),
            soft_wrap=True,
        )
    if not steps:
        console.print("no checkpoints yet")
        return
    hurt = {seq for each in verdict.damage for seq in each.checkpoints}
    read = f"{size(verdict.size_bytes)} in {verdict.packs} packs were read"
    count = "checkpoint" if verdict.checkpoints == 1 else "checkpoints"
    if hurt:
        console.print(f"{len(hurt)} of {verdict.checkpoints} {count} damaged; {read}")
        if whole := [step for seq, step in steps.items() if seq not in hurt]:
            console.print(f"the newest whole one is of step {whole[-1]}")
    else:
        console.print(f"{verdict.checkpoints} {count} whole; {read}")
