"""``spotfirst datasets``: versions of data, from a shell."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from spotfirst import datasets
from spotfirst.errors import UnknownDataset
from spotfirst_airflow.cli._common import (
    ErrorsAsLines,
    JsonOption,
    StorageOption,
    find_storage,
    moment,
    print_json,
    size,
    stdout,
)

__all__ = ["app"]

app = typer.Typer(
    cls=ErrorsAsLines,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Commit, list and compare versions of datasets.",
)


@app.command("commit")
def commit(
    name: Annotated[str, typer.Argument(help="The dataset's name.")],
    source: Annotated[str, typer.Argument(help="A folder, or an fsspec URL prefix.")],
    *,
    storage: StorageOption = "",
    message: Annotated[str, typer.Option("--message", "-m", help="What is new.")] = "",
    json: JsonOption = False,
) -> None:
    """Make the files of a folder the newest version. Only bytes that are new are sent.

    Example:

        spotfirst datasets commit corpus ./corpus -m "adds November"
    """
    made = datasets.commit(find_storage(storage), name, source, message)
    if json:
        print_json(made)
        return
    stdout().print(
        Text(f"{name}@{made.version}: {made.files} files, {size(made.bytes)}"), soft_wrap=True
    )


@app.command("ls")
def ls(
    name: Annotated[str, typer.Argument(help="A dataset; all of them when left out.")] = "",
    *,
    storage: StorageOption = "",
    json: JsonOption = False,
) -> None:
    """List datasets, or the versions of one.

    Example:

        spotfirst datasets ls corpus
    """
    place = find_storage(storage)
    names = [name] if name else place.list("datasets")
    found = {each: datasets.versions(place, each) for each in names}
    if name and not found[name]:
        msg = f"there is no dataset {name!r} in {place.url}"
        raise UnknownDataset(msg)
    if json:
        print_json(found)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("dataset", "files", "size", "committed (UTC)", "message"):
        table.add_column(column, justify="right" if column in {"files", "size"} else "left")
    for each, versions in found.items():
        for version in reversed(versions if name else versions[-1:]):
            table.add_row(
                Text(f"{each}@{version.version}"), str(version.files), size(version.bytes),
                moment(version.created_at), Text(version.message),
            )  # fmt: skip
    stdout().print(table)


@app.command("diff")
def diff(
    old: Annotated[str, typer.Argument(help="NAME@VERSION.")],
    new: Annotated[str, typer.Argument(help="NAME@VERSION, or NAME@latest.")],
    *,
    storage: StorageOption = "",
    json: JsonOption = False,
) -> None:
    """Show which files differ between two versions.

    Example:

        spotfirst datasets diff corpus@1 corpus@latest
    """
    found = datasets.diff(find_storage(storage), old, new)
    if json:
        print_json(found._asdict())
        return
    console = stdout()
    for sign, keys, style in (
        ("+", found.added, "green"),
        ("-", found.removed, "red"),
        ("~", found.changed, "yellow"),
    ):
        for key in keys:
            console.print(Text(f"{sign} {key}", style=style), soft_wrap=True)
    console.print(
        f"{len(found.added)} added, {len(found.removed)} removed, {len(found.changed)} changed: "
        f"{size(found.bytes)} to move"
    )
