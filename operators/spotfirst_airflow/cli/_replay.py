"""``spotfirst replay``: a new run from a checkpoint of an old one, with changes."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from spotfirst import code as training_code
from spotfirst.errors import InvalidSpec
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.wire import utc_now
from spotfirst_airflow.arguments import to_request
from spotfirst_airflow.cli._common import JsonOption, StorageOption, existing_run, find_storage
from spotfirst_airflow.cli._running import see_through
from spotfirst_airflow.cli._specfile import assign, parse_pairs
from spotfirst_airflow.cli.foreground import owner_name
from spotfirst_airflow.fleets.base import fleet_class, load_fleet
from spotfirst_airflow.policies import load_policy
from spotfirst_airflow.submission import (
    Request,
    attach,
    check_new_id,
    check_texts,
    pinned_checkpoint,
    resolve_checkpoint,
    storage_environment,
)

__all__ = ["replay"]

_KEPT = ("code", "dataset", "resume_from", "dataset_since")
"""What a replay takes over as it was resolved then, so that it is the same today."""


def replay(
    checkpoint: Annotated[
        str, typer.Argument(metavar="RUN@STEP", help="The checkpoint (or RUN@latest, RUN@best).")
    ],
    *,
    storage: StorageOption = "",
    run_id: Annotated[str, typer.Option("--run-id", help="The new run's id.")] = "",
    code: Annotated[str, typer.Option(help="Other training code than the old run's.")] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE: policy=on_demand, env.LR=0.1, …; repeat."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No output of training.")] = False,
    json: JsonOption = False,
) -> None:
    """Train again from any checkpoint of a run: same code and data, or with changes.

    Examples:

        spotfirst replay night-1@1200

        spotfirst replay night-1@latest --set env.LR=0.0001 --set policy=on_demand
    """
    place = find_storage(storage)
    source = resolve_checkpoint(place, checkpoint)
    old = existing_run(storage, source.run_id).spec()
    now = utc_now()
    new_id = run_id or f"{source.run_id[:150]}-replay-{now:%Y%m%d-%H%M%S}"
    check_new_id(new_id)
    request = _request(old, parse_pairs(set_ or [], "--set"))
    check_texts(request)
    kind = fleet_class(request.fleet)
    load_policy(request.policy, request.policy_options)
    packed = training_code.publish(place, Path(code).expanduser()) if code else old.code
    values: dict[str, Any] = {
        name: value
        for name, value in msgspec.structs.asdict(request).items()
        if name in RunSpec.__struct_fields__ and name not in _KEPT and value is not None
    }
    deadline = request.deadline
    if deadline is None and old.deadline is not None:
        deadline = old.deadline - old.created_at
    values["deadline"] = now + deadline if isinstance(deadline, timedelta) else deadline
    values["fleet_options"] = kind.settle(request.fleet_options, now=now)
    spec = RunSpec(
        run_id=new_id,
        created_at=now,
        code=packed,
        dataset=old.dataset,
        resume_from=source,
        **values,
    )
    spec.check()
    environment = storage_environment()
    load_fleet(spec.fleet, spec.fleet_options, environment=environment).check(spec)
    with pinned_checkpoint(place, source, by=new_id):
        create_run(place, spec)
    owner = owner_name()
    see_through(
        lambda: attach(place, new_id, request, owner=owner, environment=environment),
        owner=owner, quiet=quiet, json=json,
    )  # fmt: skip


def _request(old: RunSpec, changes: dict[str, str]) -> Request:
    """The old spec as a request, changed. Raises :class:`InvalidSpec`."""
    barred = sorted(set(_KEPT) & {name.partition(".")[0] for name in changes})
    if barred:
        msg = f"--set {barred[0]}: a replay keeps the old run's {barred[0]}"
        raise InvalidSpec(msg + ("; give other code with --code" if barred[0] == "code" else ""))
    values = {
        name: value
        for name, value in msgspec.to_builtins(old).items()
        if name in Request.__struct_fields__ and name not in {*_KEPT, "deadline"}
    }
    # A market that began then would be somewhere else by now; it begins anew.
    values["fleet_options"] = {k: v for k, v in old.fleet_options.items() if k != "epoch"}
    assign(values, changes)
    return to_request(values)
