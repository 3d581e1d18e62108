"""The commands, put together."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import Annotated

import typer

from spotfirst_airflow.cli import (
    _checkpoints,
    _costs,
    _datasets,
    _doctor,
    _instances,
    _looking,
    _market,
    _prices,
    _replay,
    _running,
    _simulate,
)
from spotfirst_airflow.cli._common import ErrorsAsLines
from spotfirst_airflow.cli.terminal import PlainFormatter

__all__ = ["app"]

app = typer.Typer(
    cls=ErrorsAsLines,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"spotfirst {version('spotfirst')}")
        raise typer.Exit


@app.callback()
def main(
    *,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show debug messages.")] = False,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """Train on spot GPUs as if they were never interrupted.

    A run lives as files in one storage: a local folder or an S3 prefix. Name it once, with
    `export SPOTFIRST_STORAGE=…`, or with `--storage` at every command.

    Begin with `spotfirst run --help`.
    """
    level = logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(level=level)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(PlainFormatter("%(levelname)s %(name)s: %(message)s"))
    for noisy in ("botocore", "aiobotocore", "asyncio", "s3fs", "urllib3", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


app.command("run")(_running.run)
app.command("runs")(_looking.runs)
app.command("show")(_looking.show)
app.command("logs")(_looking.logs)
app.command("cost")(_costs.cost)
app.command("replay")(_replay.replay)
app.command("simulate")(_simulate.simulate)
app.command("stop")(_instances.stop)
app.command("reap")(_instances.reap)
app.command("doctor")(_doctor.doctor)
app.add_typer(_checkpoints.app, name="checkpoint")
app.add_typer(_datasets.app, name="datasets")
app.add_typer(_prices.app, name="prices")
app.add_typer(_market.app, name="market")
