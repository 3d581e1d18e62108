"""What every command shares: the storage option, errors as one line, JSON and durations."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from typer.core import TyperGroup

from spotfirst.errors import InvalidSpec, SpotfirstError, UnknownRun
from spotfirst.run import Run, list_runs
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow.cli.terminal import PlainConsole, plain_json
from spotfirst_airflow.reading import Unreadable

__all__ = [
    "BAD_INPUT",
    "FAILED",
    "ErrorsAsLines",
    "JsonOption",
    "RunArgument",
    "StorageOption",
    "duration",
    "existing_run",
    "find_storage",
    "moment",
    "print_json",
    "progress",
    "run_with_checkpoints",
    "size",
    "stderr",
    "stdout",
    "tell_broken",
]

FAILED = 1
BAD_INPUT = 2

StorageOption = Annotated[
    str,
    typer.Option(
        "--storage",
        "-s",
        envvar="SPOTFIRST_STORAGE",
        help="Where runs are kept: s3://BUCKET/PREFIX or a local folder.",
        metavar="URL",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's id (`spotfirst runs`).")]


def stdout() -> Console:
    """Made when it is used, so that it writes to where standard output is then."""
    return _console(stderr=False)


def stderr() -> Console:
    """Made when it is used, so that it writes to where standard error is then."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = PlainConsole(stderr=stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 200  # a file or a pipe has no edge to wrap at
    return console


class ErrorsAsLines(TyperGroup):
    """Turns what Spotfirst raises into one red line: code 2 for bad input, 1 for the rest."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except SpotfirstError as error:
            message = " ".join(str(error).split()) or type(error).__name__
            stderr().print(f"error: {message}", style="red", markup=False, soft_wrap=True)
            code = BAD_INPUT if isinstance(error, InvalidSpec) else FAILED
            raise typer.Exit(code) from error


def find_storage(url: str, *, is_checked: bool = True) -> Storage:
    """The storage of ``--storage`` or ``$SPOTFIRST_STORAGE``. Raises :class:`InvalidSpec`.

    With ``is_checked``, also for a file, which would read like an empty storage.
    """
    if not url.strip():
        msg = (
            "no storage: give --storage s3://BUCKET/PREFIX (or a folder), or set SPOTFIRST_STORAGE"
        )
        raise InvalidSpec(msg)
    # Instances have another working directory, so a folder is passed on with its whole path.
    storage = open_storage(url if "://" in url else str(Path(url).expanduser().absolute()))
    if is_checked and storage.on_disk:
        path = Path(storage.url.partition("://")[2] or storage.url)
        if path.exists() and not path.is_dir():
            msg = f"storage {storage.url} is a file; give a folder"
            raise InvalidSpec(msg)
    return storage


def tell_broken(broken: Iterable[Unreadable]) -> None:
    """Name the runs that could not be read, a line each, on standard error."""
    for each in broken:
        text = " ".join(str(each).split())
        stderr().print(text, style="red", markup=False, soft_wrap=True)


def existing_run(storage_url: str, run_id: str) -> Run:
    """A run that is there. Raises :class:`UnknownRun`."""
    run = Run(find_storage(storage_url), run_id)
    try:
        run.original_spec()
    except UnknownRun:
        there = list_runs(run.root)
        near = [name for name in there if run_id in name] or get_close_matches(run_id, there)
        if near:
            msg = (
                f"there is no run {run_id!r} in {run.root.url}; did you mean {', '.join(near[:5])}?"
            )
            raise UnknownRun(msg) from None
        raise
    return run


def run_with_checkpoints(storage_url: str, run_id: str) -> Run:
    """A run, or what a script that trained on its own has saved. Raises :class:`UnknownRun`."""
    run = Run(find_storage(storage_url), run_id)
    return run if run.storage.list("checkpoints") else existing_run(storage_url, run_id)


def print_json(value: Any) -> None:
    """To standard output: indented for people, one document for scripts."""
    data = msgspec.json.encode(value, enc_hook=str)
    typer.echo(plain_json(msgspec.json.format(data, indent=2).decode()))


@contextlib.contextmanager
def progress(
    what: str, *, total: int | None = None
) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar on standard error, where that is a terminal; tell it the bytes in all, and those done."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = stderr()
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=total)
        yield (
            lambda total: bar.update(task, total=total),
            lambda done: bar.advance(task, done),
        )


def duration(value: timedelta | float) -> str:
    """``45.2 s``, ``12 min``, ``3 h 20 min``, ``2 d 4 h``."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else float(value)
    sign, seconds = ("-", -seconds) if seconds < 0 else ("", seconds)
    if seconds < 10:
        return f"{sign}{seconds:.1f} s"
    if seconds < 120:
        return f"{sign}{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{sign}{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{sign}{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{sign}{days} d {hours} h"


def moment(value: datetime | None) -> str:
    """A time of day with its date, in UTC, for people."""
    return f"{value:%Y-%m-%d %H:%M:%S}" if value else "-"


def size(count: int) -> str:
    """Bytes for people, in powers of ten."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"
