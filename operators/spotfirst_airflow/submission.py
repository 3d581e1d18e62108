"""From what a person asked for to a run that a controller can take over.

The operator and the command line come through here, so that both check the same things before
anything is launched, and mean the same by *retry*, *clear* and *replay*.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from spotfirst import code as training_code
from spotfirst import datasets
from spotfirst import events as e
from spotfirst.checkpoints.retention import Retention
from spotfirst.errors import InvalidSpec, UnknownRun
from spotfirst.run import Run, create_run
from spotfirst.spec import CodeRef, DatasetRef, ResumeFrom, RunSpec, is_run_id
from spotfirst.state import Phase, RunState
from spotfirst.storage import Storage
from spotfirst.wire import Clock, Record, utc_now
from spotfirst_airflow.arguments import check_text, check_time, suggestion
from spotfirst_airflow.budget import OnBudget
from spotfirst_airflow.controller import Controller, controller_name
from spotfirst_airflow.fleets.base import fleet_class, load_fleet
from spotfirst_airflow.lessons import learn
from spotfirst_airflow.policies import load_policy
from spotfirst_airflow.selection import kept_steps, select

__all__ = [
    "Prepares",
    "Request",
    "attach",
    "base_run_id",
    "check_new_id",
    "check_texts",
    "is_run_of",
    "mark_delivered",
    "newest_generation",
    "newest_run",
    "open_controller",
    "pinned_checkpoint",
    "request_stop",
    "resolve_checkpoint",
    "storage_environment",
]

_GENERATION = re.compile(r"(.+)\.g(\d+)", re.DOTALL)
_INTERPRETERS = {"python", "python3", "sh", "bash"}
_HASHED = re.compile(r"-[0-9a-f]{8}\Z")
_LONGEST_ID = 170
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@runtime_checkable
class Prepares(Protocol):
    """A fleet whose first launch would take long: it does that part before the run is made."""

    def prepare(self, storage: Storage) -> None:
        """Put there what instances need. Quick when it is there. Raises a ``SpotfirstError``."""


class Request(Record):
    """What a person asks for. ``None`` leaves a choice to the default.

    ``deadline`` is a point in time, or a duration from when the run is created (or continued).
    ``code`` is a folder or file on this machine; ``resume_from`` is ``"RUN@STEP"``,
    ``"RUN@latest"`` or ``"RUN@best"``; ``dataset`` is ``"NAME"``, ``"NAME@VERSION"`` or
    ``"NAME@latest"``.
    """

    command: tuple[str, ...] = ()
    code: str | None = None
    env: dict[str, str] = {}
    fleet: str = "local"
    fleet_options: dict[str, Any] = {}
    instance_types: tuple[str, ...] = ()
    policy: str = "spotfirst"
    policy_options: dict[str, Any] = {}
    deadline: datetime | timedelta | None = None
    budget_usd: Decimal | None = None
    on_budget: OnBudget = "stop"
    dataset: str | None = None
    dataset_since: str | None = None
    resume_from: str | None = None
    checkpoint_mode: Literal["trainer", "files"] = "trainer"
    checkpoint_period_s: float = 300.0
    retention: Retention | None = None
    script_retries: int = 0
    launches_per_hour: int = 30
    heartbeat_s: float | None = None
    notice_poll_s: float | None = None
    silence_s: float = 600.0
    max_life_s: float = 7 * 24 * 3600.0
    tags: dict[str, str] = {}
    training_time: timedelta | None = None


def attach(
    storage: Storage,
    base_id: str,
    request: Request,
    *,
    owner: str,
    environment: Mapping[str, str],
    is_same_task: Callable[[str], bool] = lambda delivered_to: False,  # noqa: ARG005
    clock: Clock = utc_now,
) -> Run:
    """The run that ``owner`` is to follow, made or continued as its history asks for.

    No run yet: everything is checked, the spec written. One that is active: taken over as it is.
    One that failed or was stopped: reopened, with the request as it reads now. One that
    succeeded: the same run again while its result has not been delivered, or when
    ``is_same_task(delivered_to)`` says that it was delivered to an earlier try of this very
    task; otherwise a new generation, ``{base_id}.g2`` and so on.

    Raises :class:`InvalidSpec` before anything is launched.
    """
    generation = newest_generation(storage, base_id)
    if generation == 0:
        check_new_id(base_id)
        return _submit(storage, base_id, request, owner=owner, environment=environment, clock=clock)
    run = Run(storage, _generation_id(base_id, generation))
    journal = run.journal(by=controller_name())
    state = journal.refresh()
    if state.phase is Phase.SUCCEEDED:
        if not state.delivered_to or is_same_task(state.delivered_to):
            return run
        if like := _GENERATION.fullmatch(base_id):
            msg = (
                f"run {base_id!r} has succeeded, and is generation {like[2]} of {like[1]!r}: ask "
                f"for {like[1]!r} to train once more, or replay this one"
            )
            raise InvalidSpec(msg)
        following = _generation_id(base_id, generation + 1)
        return _submit(
            storage, following, request, owner=owner, environment=environment, clock=clock
        )
    if state.seq == 0 or state.phase is Phase.ACTIVE:
        return _take_over(run, owner=owner, clock=clock)
    if (newest := run.chain().refresh().newest()) is not None:
        _check_content(newest[1].content, request.checkpoint_mode)
    # It starts from where it did, which it has pinned, whatever became of that since.
    anywhere = msgspec.structs.replace(request, resume_from=None)
    spec = _plan(storage, run.run_id, anywhere, environment=environment, now=clock())
    kept = msgspec.structs.replace(spec, resume_from=run.original_spec().resume_from)
    amendment = run.amend(kept)

    def reopen(state: RunState) -> e.Event | None:
        if state.phase is Phase.ACTIVE:
            return e.Attached(at=clock(), owner=owner) if state.owner != owner else None
        return e.Reopened(at=clock(), owner=owner, amendment=amendment)

    journal.decide(reopen)
    return run


def request_stop(
    run: Run,
    *,
    reason: str,
    owner: str | None = None,
    cause: Literal["user", "budget", "deadline"] = "user",
    clock: Clock = utc_now,
) -> bool:
    """Ask for a checkpointed stop; whether the run will stop (or is final already).

    With ``owner``, only while it still owns the run: a kill that arrives late must not hit the
    one who has taken over.
    """

    def choose(state: RunState) -> e.Event | None:
        mine = owner is None or state.owner == owner
        if state.seq == 0 or state.phase is not Phase.ACTIVE or not mine:
            return None
        return e.StopRequested(at=clock(), reason=reason, cause=cause)

    state = run.journal(by=controller_name()).decide(choose)
    return state.phase is not Phase.ACTIVE


def mark_delivered(run: Run, owner: str, *, clock: Clock = utc_now) -> None:
    """Note that ``owner`` has the result, so that asking again means running anew."""

    def choose(state: RunState) -> e.Event | None:
        if state.phase is not Phase.SUCCEEDED or state.delivered_to == owner:
            return None
        return e.Delivered(at=clock(), owner=owner)

    run.journal(by=controller_name()).decide(choose)


def open_controller(
    run: Run, *, environment: Mapping[str, str], clock: Clock = utc_now, by: str = ""
) -> Controller:
    """A controller for what the run's spec says; ``environment`` reaches local instances."""
    spec = run.spec()
    fleet = load_fleet(spec.fleet, spec.fleet_options, environment=environment)
    policy = load_policy(spec.policy, spec.policy_options)
    return Controller(run, fleet, policy, clock=clock, by=by)


def base_run_id(dag_id: str, run_id: str, task_id: str, map_index: int = -1) -> str:
    """The id of a task's run: the same for every try of it, readable, and no other task's.

    What cannot stand in a run id is replaced; a short digest then keeps two tasks apart whose
    ids would read the same.
    """
    parts = [dag_id, run_id, task_id] + ([str(map_index)] if map_index >= 0 else [])
    exact = "--".join(parts)
    readable = "--".join(_UNSAFE.sub("-", part).strip("-.") for part in parts)
    if (
        readable == exact
        and is_run_id(exact)
        and exact.count("--") == len(parts) - 1
        and len(exact) <= _LONGEST_ID
        and not _GENERATION.fullmatch(exact)  # a task that is called "train.g2"
        and not _HASHED.search(exact)  # nor may one be called like the digest of another
    ):
        return exact
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
    # An id begins with a letter or digit; one whose parts have none keeps the digest only.
    start = readable[:_LONGEST_ID].lstrip("-._") or "task"
    return f"{start}-{digest}"


def is_run_of(base_id: str, run_id: str) -> bool:
    """Whether ``run_id`` is a generation of the run ``base_id``: itself, ``.g2`` and so on."""
    return run_id == base_id or run_id in {
        _generation_id(base_id, int(found[2]))
        for found in [_GENERATION.fullmatch(run_id)]
        if found is not None and len(found[2]) < 9 and int(found[2]) > 1
    }


def check_new_id(run_id: str) -> None:
    """Raise :class:`InvalidSpec` for an id that ends like a later generation of another run."""
    if like := _GENERATION.fullmatch(run_id):
        msg = (
            f"run id {run_id!r} ends like a later generation of run {like[1]!r}; choose one "
            "without '.g…' at its end"
        )
        raise InvalidSpec(msg)


def newest_generation(storage: Storage, base_id: str) -> int:
    """How many generations of a run there are; 0 when there is none."""
    generation = 0
    while _exists(storage, _generation_id(base_id, generation + 1)):
        generation += 1
    return generation


def newest_run(storage: Storage, base_id: str) -> Run | None:
    """The newest generation of a run; ``None`` when there is none."""
    generation = newest_generation(storage, base_id)
    return Run(storage, _generation_id(base_id, generation)) if generation else None


def _exists(storage: Storage, run_id: str) -> bool:
    return is_run_id(run_id) and Run(storage, run_id).exists()


def _generation_id(base_id: str, generation: int) -> str:
    return base_id if generation == 1 else f"{base_id}.g{generation}"


def _submit(
    storage: Storage,
    run_id: str,
    request: Request,
    *,
    owner: str,
    environment: Mapping[str, str],
    clock: Clock,
) -> Run:
    now, until, training = clock(), request.deadline, request.training_time
    left = until - now if isinstance(until, datetime) else timedelta(0)
    is_ahead = left > timedelta(0)  # one that has passed is refused as such
    if training is not None and request.resume_from is None and is_ahead:
        check_time(training, left)
    spec = _plan(storage, run_id, request, environment=environment, now=now)
    try:
        with pinned_checkpoint(storage, spec.resume_from, by=run_id):
            run = create_run(storage, spec)
    except InvalidSpec:
        if not _exists(storage, run_id):
            raise
        run = Run(storage, run_id)  # a racing try of the same task was first; its spec counts
    return _take_over(run, owner=owner, clock=clock)


def _take_over(run: Run, *, owner: str, clock: Clock) -> Run:
    """Own an active run; also finish what a submitter that died had begun."""
    journal = run.journal(by=controller_name())

    def choose(state: RunState) -> e.Event | None:
        if state.seq == 0:
            return e.Created(at=clock())
        return e.Attached(at=clock(), owner=owner) if state.owner != owner else None

    journal.decide(choose)
    journal.decide(choose)
    return run


def _plan(
    storage: Storage,
    run_id: str,
    request: Request,
    *,
    environment: Mapping[str, str],
    now: datetime,
) -> RunSpec:
    """The spec of a request, once everything that can be checked beforehand has been."""
    check_texts(request)
    kind = fleet_class(request.fleet)
    load_policy(request.policy, request.policy_options)
    deadline = (
        now + request.deadline if isinstance(request.deadline, timedelta) else request.deadline
    )
    spec = RunSpec(
        run_id=run_id,
        created_at=now,
        command=request.command,
        env=dict(request.env),
        fleet=request.fleet,
        fleet_options=kind.settle(request.fleet_options, now=now),
        instance_types=request.instance_types,
        policy=request.policy,
        policy_options=request.policy_options,
        deadline=deadline,
        budget_usd=request.budget_usd,
        on_budget=request.on_budget,
        checkpoint_period_s=request.checkpoint_period_s,
        checkpoint_mode=request.checkpoint_mode,
        retention=request.retention or Retention(),
        script_retries=request.script_retries,
        launches_per_hour=request.launches_per_hour,
        heartbeat_s=request.heartbeat_s or kind.heartbeat_s,
        notice_poll_s=request.notice_poll_s or kind.notice_poll_s,
        silence_s=request.silence_s,
        max_life_s=request.max_life_s,
        tags=request.tags,
        training_time_s=request.training_time.total_seconds() if request.training_time else None,
        lessons=learn(storage, run_id, request.tags.get("model_id", "")),
    )
    spec.check()
    fleet = load_fleet(spec.fleet, spec.fleet_options, environment=environment)
    fleet.check(spec)
    storage.probe()
    if isinstance(fleet, Prepares):
        fleet.prepare(storage)
    with _naming("resume_from", request.resume_from):
        resume_from = _resume_from(storage, request)
    with _naming("dataset", request.dataset):
        dataset = _resolve_dataset(storage, request)
    _check_script(request)
    with _naming("code", request.code):
        code = _publish_code(storage, request.code)
    return msgspec.structs.replace(spec, resume_from=resume_from, dataset=dataset, code=code)


@contextmanager
def _naming(name: str, value: object) -> Iterator[None]:
    """Put the argument's name and value before what is wrong with it."""
    try:
        yield
    except InvalidSpec as error:
        if name in str(error).partition(" ")[0]:
            raise
        msg = f"{name} {value!r}: {error}"
        raise type(error)(msg) from error


def _resume_from(storage: Storage, request: Request) -> ResumeFrom | None:
    if not request.resume_from:
        return None
    found = resolve_checkpoint(storage, request.resume_from)
    content = dict(Run(storage, found.run_id).chain().refresh().commits)[found.seq].content
    _check_content(content, request.checkpoint_mode)
    return found


def _check_content(content: str, mode: str) -> None:
    """Raise :class:`InvalidSpec` when checkpoints of the other mode are to be gone on from."""
    theirs = "files" if content == "files" else "trainer"
    if mode != theirs:
        msg = (
            f"checkpoint_mode is {mode!r}, and the checkpoint to go on from was made with "
            f"{theirs!r}; give checkpoint_mode={theirs!r}"
        )
        raise InvalidSpec(msg)


def _publish_code(storage: Storage, source: str | None) -> CodeRef | None:
    return None if source is None else training_code.publish(storage, Path(source).expanduser())


def _check_script(request: Request) -> None:
    """Raise :class:`InvalidSpec` for a script that the code does not have: nothing else is there."""
    if request.code is None or len(request.command) < 2:
        return
    program, script = request.command[:2]
    is_script = script.endswith((".py", ".sh")) and script[0] not in "/-~$"
    if PurePosixPath(program).name not in _INTERPRETERS or not is_script:
        return
    code = Path(request.code).expanduser()
    is_there = (
        (code / script).exists() if code.is_dir() else PurePosixPath(script).name == code.name
    )
    if code.exists() and not is_there:
        names = [p.relative_to(code).as_posix() for p in code.glob(f"*{script[-3:]}")]
        msg = (
            f"command {list(request.command)!r}: the code {str(code)!r} has no {script!r}"
            f"{suggestion([script], names)}; give the path of a file in it"
        )
        raise InvalidSpec(msg)


def _resolve_dataset(storage: Storage, request: Request) -> DatasetRef | None:
    if request.dataset is None:
        if request.dataset_since is not None:
            msg = f"dataset_since={request.dataset_since!r} needs a dataset beside it"
            raise InvalidSpec(msg)
        return None
    found = datasets.resolve(storage, request.dataset)
    if request.dataset_since is None:
        return found
    text = request.dataset_since
    since = datasets.resolve(storage, text if "@" in text else f"{found.name}@{text}")
    if since.name != found.name:
        msg = f"dataset_since={text!r} is another dataset than {request.dataset!r}"
        raise InvalidSpec(msg)
    return msgspec.structs.replace(found, since=since.version, since_manifest=since.manifest)


def resolve_checkpoint(storage: Storage, text: str) -> ResumeFrom:
    """``"RUN@STEP"``, ``"RUN@latest"`` or ``"RUN@best"`` as the chain entry that it means now.

    Raises :class:`InvalidSpec`, and :class:`UnknownRun` for a run or step that is not there.
    """
    if "@" not in text:
        msg = f'{text!r} must read "RUN@STEP", "RUN@latest" or "RUN@best"; `spotfirst runs` lists runs'
        raise InvalidSpec(msg)
    run, seq, commit = select(storage, text)
    return ResumeFrom(run_id=run.run_id, step=commit.step, seq=seq, digest=commit.digest)


@contextmanager
def pinned_checkpoint(storage: Storage, source: ResumeFrom | None, *, by: str) -> Iterator[None]:
    """Keep the checkpoint that the run ``by`` starts from; its spec is written inside.

    The parent goes on pruning meanwhile: whoever pins looks at its chain afterwards. Raises
    :class:`UnknownRun` when the checkpoint is pruned by then. Where a run is refused, nothing
    stays pinned.
    """
    if source is None:
        yield
        return
    parent = Run(storage, source.run_id)
    pin = parent.pin(source.seq, by=by)
    try:
        chain = parent.chain().refresh()
        if source.seq not in dict(chain.commits):
            msg = (
                f"the checkpoint of run {source.run_id!r} at step {source.step} was pruned just "
                f"now; kept are the steps {kept_steps(chain)}"
            )
            raise UnknownRun(msg)
        yield
    except InvalidSpec:  # after anything else, the spec may be there
        parent.unpin(pin)
        raise


def check_texts(request: Request) -> None:
    """Refuse what must not stand in a spec, which is plain text to all who read the storage.

    Raises :class:`InvalidSpec` for a name that is Spotfirst's own, and for a secret.
    """
    for name in ("env", "command", "tags", "fleet_options", "policy_options"):
        check_text(name, getattr(request, name))


def storage_environment() -> dict[str, str]:
    """What this process's environment tells instances about reaching the storage."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
