"""``spotfirst checkpoint diff``: what changed between two checkpoints."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from spotfirst.checkpoints.comparing import Difference, Side, compare, compare_files
from spotfirst.checkpoints.manifest import FilesManifest, StateManifest, read_manifest
from spotfirst.errors import StateMismatch
from spotfirst_airflow.cli._common import (
    JsonOption,
    StorageOption,
    find_storage,
    print_json,
    progress,
    run_with_checkpoints,
    size,
    stdout,
)
from spotfirst_airflow.selection import Selected, select, split

__all__ = ["diff"]

_SIGNS = {
    "same": ("=", "dim"),
    "changed": ("~", "yellow"),
    "form": ("!", "red"),
    "value": ("~", "yellow"),
    "only_left": ("-", "red"),
    "only_right": ("+", "green"),
}
_WORDS = {
    "same": "same",
    "changed": "changed",
    "form": "of another shape or type",
    "value": "other values",
    "only_left": "only in the first",
    "only_right": "only in the second",
}


def diff(
    first: Annotated[str, typer.Argument(metavar="RUN@STEP", help="The one.")],
    second: Annotated[str, typer.Argument(metavar="RUN@STEP", help="The other.")],
    *,
    storage: StorageOption = "",
    every: Annotated[bool, typer.Option("--all", "-a", help="Also what is the same.")] = False,
    rank: Annotated[
        int, typer.Option(help="Of what each rank has of its own, that of this one.", min=0)
    ] = 0,
    json: JsonOption = False,
) -> None:
    """Show how two checkpoints differ, array by array; also those of two runs.

    Of an array that changed, the share of its bytes that did, and the largest difference of two
    elements. What has equal digests is not read.

    Example:

        spotfirst checkpoint diff night-1@1000 night-1@1200
    """
    sides = [_select(storage, text) for text in (first, second)]
    left, right = (
        read_manifest(side.run.packs(), side.commit.manifest, side.commit.digest) for side in sides
    )
    if isinstance(left, StateManifest) and isinstance(right, StateManifest):
        with progress("reading") as (on_total, on_bytes):
            found = compare(
                Side(sides[0].run.packs(), left), Side(sides[1].run.packs(), right), rank=rank,
                on_total=on_total, on_bytes=on_bytes,
            )  # fmt: skip
    elif isinstance(left, FilesManifest) and isinstance(right, FilesManifest):
        found = compare_files(left, right)
    else:
        msg = f"{first} and {second}: one holds files, the other a training state"
        raise StateMismatch(msg)
    if json:
        rows = [each._asdict() for each in found if every or each.kind != "same"]
        print_json({**_summary(found), "differences": rows})
        return
    _print(stdout(), found, every=every)


def _select(storage: str, text: str) -> Selected:
    run_with_checkpoints(storage, split(text)[0])
    return select(find_storage(storage), text, pinned=True)


def _summary(found: list[Difference]) -> dict[str, Any]:
    changed = [each.changed_bytes or 0 for each in found if each.kind == "changed"]
    return {
        **{kind: sum(each.kind == kind for each in found) for kind in _WORDS},
        "size_bytes": sum(each.size_bytes for each in found),
        "changed_bytes": sum(changed),
    }


def _print(console: Console, found: list[Difference], *, every: bool) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for justify in ("left", "left", "left", "right", "left"):
        table.add_column(justify=justify)
    for each in found:
        if each.kind == "same" and not every:
            continue
        sign, style = _SIGNS[each.kind]
        share, largest = _change(each)
        table.add_row(sign, Text(each.name), Text(_form(each)), share, largest, style=style)
    if table.row_count:
        console.print(table)
    summary = _summary(found)
    counts = ", ".join(
        f"{summary[kind]} {words}" for kind, words in _WORDS.items() if summary[kind]
    )
    console.print(
        f"{counts or 'both are empty'}; {size(summary['changed_bytes'])} of "
        f"{size(summary['size_bytes'])} changed"
    )


def _form(each: Difference) -> str:
    if each.kind in {"form", "value"}:
        return f"{each.left} → {each.right}"
    return each.right or each.left


def _change(each: Difference) -> tuple[str, str]:
    if each.kind != "changed" or each.changed_bytes is None or not each.size_bytes:
        return "", ""
    share = f"{100 * each.changed_bytes / each.size_bytes:.3g} % of {size(each.size_bytes)}"
    return share, "" if each.max_abs is None else f"by up to {each.max_abs:.3g}"
