"""``spotfirst run``: train in the foreground, without Airflow."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from spotfirst import events as e
from spotfirst.errors import InvalidSpec
from spotfirst.run import Run
from spotfirst.spec import check_run_id
from spotfirst.state import Phase, RunState
from spotfirst.storage import Storage
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
from spotfirst_airflow.cli._specfile import assign, parse_pairs, read_spec_file
from spotfirst_airflow.cli.display import Display
from spotfirst_airflow.cli.foreground import Interrupts, follow, owner_name
from spotfirst_airflow.cli.summary import print_summary
from spotfirst_airflow.controller import controller_name
from spotfirst_airflow.costs import bill
from spotfirst_airflow.exports import check_target, export_result
from spotfirst_airflow.results import result
from spotfirst_airflow.submission import attach, newest_run, storage_environment

__all__ = ["run", "see_through"]

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def run(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC] [-- COMMAND…]",
            help="A spec file (.yaml, .toml, .json), or a command after `--`, or both.",
        ),
    ] = None,
    *,
    storage: StorageOption = "",
    run_id: Annotated[
        str, typer.Option("--run-id", help="The run's id. Again with the same id: go on.")
    ] = "",
    code: Annotated[str, typer.Option(help="Folder (or file) with the training code.")] = "",
    fleet: Annotated[str, typer.Option(help="Where instances come from.")] = "",
    instance_type: Annotated[
        list[str] | None, typer.Option(help="May be launched; repeat for several.")
    ] = None,
    policy: Annotated[
        str, typer.Option(help="spotfirst, fallback, spot_only, on_demand, …; or MODULE:CLASS.")
    ] = "",
    deadline: Annotated[str, typer.Option(help="`8h`, `90m`, or a moment in ISO 8601.")] = "",
    training_time: Annotated[
        str, typer.Option(help="How long it trains on one instance, if you know: `6h`.")
    ] = "",
    budget: Annotated[str, typer.Option(help="Dollars that the run may cost.")] = "",
    on_budget: Annotated[
        str,
        typer.Option(help="stop, continue_cheaper (no on demand from 90 % on) or alert."),
    ] = "",
    dataset: Annotated[str, typer.Option(help="NAME, NAME@VERSION or NAME@latest.")] = "",
    resume_from: Annotated[str, typer.Option(help="RUN@STEP, RUN@latest or RUN@best.")] = "",
    checkpoint_mode: Annotated[
        str, typer.Option(help="`trainer` (spotfirst.Checkpointer), or `files`.")
    ] = "",
    env: Annotated[
        list[str] | None, typer.Option("--env", "-e", help="NAME=VALUE for the script; repeat.")
    ] = None,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", help="model_id=…, team=…, env=…; repeat.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other key of the spec, KEY=VALUE (dots go deeper)."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No output of training.")] = False,
    json: JsonOption = False,
) -> None:
    """Train, through every interruption, and show it here.

    The keys of a spec file are `command` (a list), `code`, `env`, `fleet`, `fleet_options`,
    `instance_types`, `policy`, `policy_options`, `deadline`, `training_time`, `budget_usd`, `on_budget`, `dataset`,
    `dataset_since`, `resume_from`, `checkpoint_mode`, `checkpoint_period_s`, `retention`,
    `script_retries`, `launches_per_hour`, `heartbeat_s`, `notice_poll_s`, `silence_s`,
    `max_life_s`, `tags`, `storage` and `export`; `checkpoint_period` and `max_life` are durations,
    such as `5m`. Options win over it.

    `export` is where the trained weights go at the end: a `.safetensors` file, or in files mode a
    folder, as a URL or an absolute path.

    `retention` says which checkpoints stay: `{last: 5, every_steps: 1000, best: 2, metric: loss}`
    keeps the newest 5, the first in each 1000 steps, and the 2 with the lowest loss
    (`mode: max`: the highest).

    **Ctrl-C** once stops the run with a checkpoint; twice leaves it running. The same command
    with the same `--run-id` re-attaches to it, or goes on from its newest checkpoint.

    Examples:

        spotfirst run --storage runs --code ./training -- python train.py

        spotfirst run spec.yaml --deadline 8h --budget 25 --run-id night-1

        spotfirst run --run-id night-1
    """
    spec_path, command = _split(words or [])
    values: dict[str, Any] = read_spec_file(spec_path) if spec_path else {}
    options = {
        "code": code, "fleet": fleet, "policy": policy, "deadline": deadline,
        "training_time": training_time,
        "budget_usd": budget, "on_budget": on_budget, "dataset": dataset, "resume_from": resume_from,
        "checkpoint_mode": checkpoint_mode, "instance_types": instance_type, "command": command,
    }  # fmt: skip
    values |= {name: value for name, value in options.items() if value}
    if isinstance(values.get("code"), str):
        values["code"] = str(Path(values["code"]).expanduser().absolute())
    assign(values, {f"env.{k}": v for k, v in parse_pairs(env or [], "--env").items()})
    assign(values, {f"tags.{k}": v for k, v in parse_pairs(tag or [], "--tag").items()})
    assign(values, parse_pairs(set_ or [], "--set"))
    # Where the run is kept and where its result goes are no part of what it is asked to do.
    place = find_storage(storage or str(values.pop("storage", "") or ""))
    export = parse("export", values.pop("export", None))
    if export is not None:
        check_target(export)
    owner = owner_name()
    if not values:
        if not run_id:
            msg = "nothing to run: give a spec file, a command after '--', or --run-id of a run"
            raise InvalidSpec(msg)
        see_through(
            lambda: _take_up(place, run_id, owner),
            owner=owner, quiet=quiet, json=json, export=export,
        )  # fmt: skip
        return
    request = to_request(values)
    base_id = check_run_id(run_id) if run_id else _new_id(spec_path, values)
    see_through(
        lambda: attach(place, base_id, request, owner=owner, environment=storage_environment()),
        owner=owner, quiet=quiet, json=json, export=export,
    )  # fmt: skip


def see_through(
    take_over: Callable[[], Run],
    *,
    owner: str,
    quiet: bool,
    json: bool,
    export: str | None = None,
) -> None:
    """Take a run over, follow it to its end, and end with code 0 only for a success.

    The signals' handlers are there before the run is taken over. What the run trained is then
    exported to ``export``.
    """
    console = stderr() if json else stdout()
    interrupts = Interrupts()
    with interrupts.caught(), Display(console, quiet=quiet) as display:
        interrupts.attaching = True
        found = take_over()
        interrupts.attaching = False
        display.say(f"run {found.run_id} in {found.root.url}", "bold")
        if found.journal().refresh().phase is Phase.SUCCEEDED:
            display.say(
                "it has succeeded before, and nothing is started; to train again, give another --run-id"
            )
        glance = follow(found, display, interrupts, owner=owner, from_now=_is_old(found))
    if glance is None:
        console.print(
            f"Detached: the run goes on. To come back: spotfirst run --run-id {found.run_id} "
            f"--storage {found.root.url}\n"
            "Until then nobody replaces an instance that is lost.",
            markup=False,
            soft_wrap=True,
        )
        return
    exported = None
    if export is not None and glance.state.phase is Phase.SUCCEEDED:
        exported = export_result(found, export)
    if json:
        print_json(result(found, glance.state, now=utc_now(), exported=exported))
    else:
        print_summary(found, glance.state, console)
        if exported is not None:
            console.print(f"  exported to {exported}", markup=False, soft_wrap=True)
    if glance.state.phase is not Phase.SUCCEEDED:
        raise typer.Exit(FAILED)


def _split(words: list[str]) -> tuple[Path | None, list[str]]:
    """The spec file, if the first word is one, and the command."""
    if words and Path(words[0]).suffix.lower() in {".yaml", ".yml", ".toml", ".json"}:
        return Path(words[0]), words[1:]
    return None, words


def _new_id(spec_path: Path | None, values: dict[str, Any]) -> str:
    """A readable id that is new: what it is of, and when."""
    command = values.get("command") or ["run"]
    scripts = [Path(str(word)).stem for word in command if str(word).endswith(".py")]
    name = spec_path.stem if spec_path else scripts[0] if scripts else str(command[0])
    clean = _UNSAFE.sub("-", name).strip("-._") or "run"
    return f"{clean}-{utc_now():%Y%m%d-%H%M%S}"


def _take_up(storage: Storage, run_id: str, owner: str) -> Run:
    """The newest generation of a run as it is: taken over, or reopened with the spec it has.

    Raises :class:`InvalidSpec` for one that would stop again at once.
    """
    found = newest_run(storage, run_id) or Run(storage, run_id)
    spec, now = found.spec(), utc_now()
    state = found.journal().refresh()
    if state.phase in {Phase.FAILED, Phase.STOPPED}:
        late = spec.deadline is not None and now >= spec.deadline
        cap_usd = spec.budget_usd if spec.on_budget != "alert" else None
        if late or (cap_usd is not None and bill(state, now=now).total_usd >= cap_usd):
            limit = "deadline has passed" if late else f"budget of ${spec.budget_usd} is used up"
            msg = (
                f"run {run_id}: its {limit}; give what it runs again (spec file or command) with "
                f"another {'--deadline' if late else '--budget'}, and the same --run-id"
            )
            raise InvalidSpec(msg)

    def choose(state: RunState) -> e.Event | None:
        if state.seq == 0:
            return e.Created(at=utc_now())
        if state.phase in {Phase.SUCCEEDED, Phase.STOPPING} or state.owner == owner:
            return None
        if state.phase is Phase.ACTIVE:
            return e.Attached(at=utc_now(), owner=owner)
        return e.Reopened(at=utc_now(), owner=owner)

    journal = found.journal(by=controller_name())
    journal.decide(choose)
    journal.decide(choose)
    return found


def _is_old(run: Run) -> bool:
    """Whether something happened before: then only what is new is shown."""
    return bool(run.journal().refresh().attempts)
