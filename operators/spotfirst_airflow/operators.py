"""The operator that trains on spot instances as if they were never interrupted."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn

import msgspec
from airflow.sdk import BaseOperator
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowTaskTimeout,
)

from spotfirst.errors import FormatError, InvalidSpec, SpotfirstError, StateError
from spotfirst.run import Run
from spotfirst.wire import utc_now
from spotfirst_airflow.arguments import check_written, parse, suggestion, to_request
from spotfirst_airflow.hooks import SpotfirstHook
from spotfirst_airflow.links import SpotRunLink, run_address
from spotfirst_airflow.rendering import render_exactly
from spotfirst_airflow.taskrecord import (
    RUN_XCOM_KEY,
    TaskKey,
    TaskRecord,
    read_record,
    signed_record,
)
from spotfirst_airflow.waking import Bell

if TYPE_CHECKING:
    from airflow.sdk import Context

    from spotfirst.checkpoints.retention import Retention
    from spotfirst.state import RunState
    from spotfirst.storage import Storage
    from spotfirst_airflow.budget import OnBudget
    from spotfirst_airflow.following import Follower
    from spotfirst_airflow.policies import Policy
    from spotfirst_airflow.submission import Request

__all__ = ["RUN_XCOM_KEY", "InvalidArgument", "RendersExactly", "SpotTrainingOperator"]

_CLEAN_UP_S = 300.0
_KILL_S = 4.0
_LOG_TAIL = 15
_OVER_TIME = "execution_timeout"


class InvalidArgument(InvalidSpec, AirflowFailException):
    """An argument of a task is wrong. In a DAG file it is an import error; it is never retried."""


class RendersExactly:
    """A mixin of operators whose template fields are refused when a value behind them is missing.

    ``exact_fields`` are those fields; others are rendered as Airflow does.
    """

    exact_fields: ClassVar[Sequence[str]] = ()

    def _do_render_template_fields(
        self,
        parent: Any,
        template_fields: Iterable[str],
        context: Any,
        jinja_env: Any,
        seen_oids: set[int],
    ) -> None:
        """Airflow's hook for how fields are rendered, called for mapped tasks as well."""
        render: Any = super()._do_render_template_fields  # type: ignore[misc]
        for name in template_fields:
            is_exact = parent is self and name in self.exact_fields

            def rendered(env: Any, name: str = name) -> None:
                render(parent, (name,), context, env, seen_oids)

            try:
                render_exactly(rendered, jinja_env, name, parent, is_exact=is_exact)
            except InvalidSpec as error:
                raise InvalidArgument(str(error)) from error


class SpotTrainingOperator(RendersExactly, BaseOperator):
    """Trains on spot instances: by the deadline, within the budget, from the newest checkpoint.

    Arguments that are no templates are checked when the DAG file is parsed: a wrong one is an
    import error that names it. Templates are checked when they have been rendered; the task then
    fails without a retry.

    A retry or a clear comes back to the same run: it re-attaches to what is training, goes on
    from the newest checkpoint when the run had failed or been stopped, and trains anew only when
    the result had been delivered and the task was cleared. The return value describes the result:
    ``run_id``, ``checkpoint``, ``step``, ``metrics``, ``cost_usd`` and more; ``docs/airflow.md``
    lists its keys.

    Args:
        command: what to run on the instance, such as ``["python", "train.py"]``.
        code: a folder to pack and send, relative to the DAG file; ``None`` when the image has the
            code.
        storage: URL for the files of all runs; by default the connection's, or
            ``$SPOTFIRST_STORAGE``.
        fleet: where instances come from, such as ``"ec2"`` or ``"local"``; by default the
            connection's, or ``"local"``.
        fleet_options: what that fleet wants to know.
        instance_types: what may be launched; all that the fleet has when empty.
        policy: how spot and on demand are chosen: a name such as ``"spotfirst"`` or
            ``"fallback"``, ``"MODULE:CLASS"``, or a policy of your own as an object.
        policy_options: its settings; an object brings its own.
        deadline: when training has to be done: a duration from the first try on, or a moment.
            As a string: ``"8h"``, ``"90m"``, or ISO 8601.
        budget_usd: what the run may cost over all attempts. People are told at 70, 90 and 100 %.
        on_budget: ``"stop"``: it stops with a checkpoint before it costs more;
            ``"continue_cheaper"``: that, and from 90 % on it goes on without on demand, even if
            the deadline passes; ``"alert"``: people are told, and it goes on.
        dataset: ``"NAME@VERSION"`` or ``"NAME@latest"``.
        dataset_since: only what this version of the dataset lacked.
        resume_from: ``"RUN@STEP"``, ``"RUN@latest"`` or ``"RUN@best"``, a checkpoint to start
            from, which is then kept for this run; or ``"scratch"``, which is the same as
            ``None`` but can be rendered by a template.
        checkpoint_mode: ``"trainer"`` when the script uses ``spotfirst.Checkpointer``,
            ``"files"`` when it writes files into ``$SPOTFIRST_CHECKPOINT_DIR``.
        checkpoint_period: the most training time that a kill without notice can lose, such as
            ``"5m"``.
        retention: which checkpoints stay, a dict or a :class:`Retention`: ``{"last": 5,
            "every_steps": 1000, "best": 2, "metric": "loss"}`` keeps the newest 5, the first in
            each 1000 steps, and the 2 with the lowest loss. By default, the newest 5.
        script_retries: how often a script that fails is started again within one try.
        launches_per_hour: how many instances may be launched within any hour; then the run waits.
        training_time: how long it will train from the first step to the last, on one of these
            instances, if anybody knows: as a duration, or as a string such as ``"8h"``. It counts
            until steps, or earlier runs of the same model, tell more.
        max_life: when an instance ends itself, whatever else happens, such as ``"2d"``.
        env: variables for the script. They are stored in the run: no secrets. Numbers become
            text, ``True`` becomes ``true``.
        tags: what costs are summed by: ``model_id``, ``team``, ``env``, ``experiment_run``.
        export: where the worker puts what was trained, once it is: a URL or an absolute path. It
            ends in ``.safetensors`` and becomes the object ``model`` of the Checkpointer; in files
            mode it is a folder with the script's files.
        spotfirst_conn_id: the connection with storage and keys. The default one may be missing;
            then the environment of Airflow's processes is used.
        deferrable: wait in the triggerer; ``False`` waits in the worker.
    """

    ARGUMENTS = (
        "command", "code", "storage", "fleet", "fleet_options", "instance_types", "policy",
        "policy_options", "deadline", "budget_usd", "on_budget", "dataset", "dataset_since",
        "resume_from", "checkpoint_mode", "checkpoint_period", "retention", "script_retries",
        "launches_per_hour", "training_time", "max_life", "env", "tags",
        "export",
    )  # fmt: skip
    """What says what to train, and how."""

    template_fields: Sequence[str] = (*ARGUMENTS, "spotfirst_conn_id")
    exact_fields: ClassVar[Sequence[str]] = template_fields
    template_fields_renderers = {
        "command": "json",
        "env": "json",
        "fleet_options": "json",
        "policy_options": "json",
        "retention": "json",
        "tags": "json",
    }
    ui_color = "#d8f0e3"
    operator_extra_links = (SpotRunLink(),)
    grace = timedelta(minutes=30)
    """How long after its limits Airflow ends the trigger, should nobody have stopped the run."""

    def __init__(
        self,
        *,
        command: Sequence[str] | None = None,  # it is needed; here, a misspelt one is told first
        code: str | None = None,
        storage: str | None = None,
        fleet: str | None = None,
        fleet_options: Mapping[str, Any] | None = None,
        instance_types: Sequence[str] | str = (),
        policy: str | Policy = "spotfirst",
        policy_options: Mapping[str, Any] | None = None,
        deadline: timedelta | datetime | str | None = None,
        budget_usd: float | Decimal | str | None = None,
        on_budget: OnBudget = "stop",
        dataset: str | None = None,
        dataset_since: int | str | None = None,
        resume_from: str | None = None,
        checkpoint_mode: Literal["trainer", "files"] = "trainer",
        checkpoint_period: timedelta | str = timedelta(minutes=5),
        retention: Retention | Mapping[str, Any] | None = None,
        script_retries: int | str = 0,
        launches_per_hour: int | str = 30,
        training_time: timedelta | str | None = None,
        max_life: timedelta | str = timedelta(days=7),
        env: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        export: str | None = None,
        spotfirst_conn_id: str | None = SpotfirstHook.default_conn_name,
        deferrable: bool = True,
        **kwargs: Any,
    ) -> None:
        _refuse_misspelt(kwargs, self.ARGUMENTS)
        super().__init__(**kwargs)
        self.command = command
        self.code = code
        self.storage = storage
        self.fleet = fleet
        self.fleet_options = fleet_options
        self.instance_types = instance_types
        self.policy = policy
        self.policy_options = policy_options
        self.deadline = deadline
        self.budget_usd = budget_usd
        self.on_budget = on_budget
        self.dataset = dataset
        self.dataset_since = dataset_since
        self.resume_from = resume_from
        self.checkpoint_mode = checkpoint_mode
        self.checkpoint_period = checkpoint_period
        self.retention = retention
        self.script_retries = script_retries
        self.launches_per_hour = launches_per_hour
        self.training_time = training_time
        self.max_life = max_life
        self.env = env
        self.tags = tags
        self.export = export
        self.spotfirst_conn_id = spotfirst_conn_id
        self.deferrable = deferrable
        self._held: tuple[Run, SpotfirstHook, str] | None = None
        self._attaching: tuple[Storage, SpotfirstHook, str, str] | None = None
        self._killed = False
        self._check_arguments()

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """What all mapped tasks have in common; checked when the DAG is parsed, like the rest."""
        _refuse_misspelt(kwargs, cls.ARGUMENTS)
        try:
            check_written({name: kwargs[name] for name in cls.ARGUMENTS if name in kwargs})
        except InvalidSpec as error:
            raise InvalidArgument(str(error)) from None
        return super().partial(**kwargs)

    # -- what Airflow calls -----------------------------------------------------------------

    def execute(self, context: Context) -> dict[str, Any]:
        """Attach to the run of this task, then wait for its end."""
        from spotfirst_airflow.exports import check_target
        from spotfirst_airflow.submission import attach

        ti = context["ti"]
        owner = str(ti.id)
        page = run_address(
            ti.dag_id, ti.run_id, ti.task_id, -1 if ti.map_index is None else ti.map_index
        )
        self.log.info("Run page: %s", page)
        hook = SpotfirstHook.find(self.spotfirst_conn_id)
        try:
            if self.export is not None:
                check_target(parse("export", self.export), hook.open_storage)
            storage = hook.open_storage(parse("storage", self.storage))
            base_id = self._base_run_id(ti)
            self._attaching = (storage, hook, owner, base_id)
            run = attach(
                storage,
                base_id,
                self._request(hook),
                owner=owner,
                environment=hook.environment(),
                is_same_task=lambda delivered_to: self._is_retry_of(delivered_to, context),
            )
            state = _state(run)
        except (InvalidSpec, FormatError) as error:
            # The next try would be told the same.
            raise AirflowFailException(str(error)) from error
        except SpotfirstError as error:
            raise AirflowException(str(error)) from error
        self._held = (run, hook, owner)
        record = TaskRecord(run.run_id, storage.url, hook.conn_id)
        ti.xcom_push(RUN_XCOM_KEY, signed_record(record, TaskKey.of(ti), hook))
        self.log.info("Run %s in %s", run.run_id, storage.url)
        if state.is_final and not state.open_attempts:
            return self._finish(context, run)
        if self.deferrable:
            self._defer(run, hook, owner)
        self._wait_here(run, hook, owner)
        return self._finish(context, run)

    def execute_complete(
        self, context: Context, event: dict[str, Any], record: list[Any] | None = None
    ) -> dict[str, Any]:
        """Called when the run has ended, or when the triggerer cannot look after it.

        ``record`` is what :meth:`execute` left with Airflow, where no user can edit it.
        """
        own = TaskRecord(*record) if record else None
        if event.get("error"):
            why = f"the triggerer could not look after it: {event['error']}"
            return self._give_up(context, why, own)
        run, hook = self._reopen(context, own)
        if not _state(run).is_final:  # reopened by hand in the meantime
            self._defer(run, hook, str(context["ti"].id))
        return self._finish(context, run)

    def resume_execution(
        self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context
    ) -> Any:
        """Stop the run when its trigger timed out or failed: nobody looks after it any more."""
        if next_method == "__fail__":
            return self._give_up(context, str((next_kwargs or {}).get("error", "unknown error")))
        return super().resume_execution(next_method, next_kwargs, context)

    def on_kill(self) -> None:
        """The worker was told to end this task. Airflow grants about five seconds."""
        self._killed = True
        held = self._held or self._half_attached()
        if held is None:
            return
        run, hook, owner = held
        self.log.info("Asking run %s to stop", run.run_id)
        self._stop(run, hook, owner, reason="its task in Airflow was ended", patience_s=_KILL_S)

    def _half_attached(self) -> tuple[Run, SpotfirstHook, str] | None:
        """The run that this try may have taken over a moment before it was ended."""
        from spotfirst_airflow.submission import newest_run

        if self._attaching is None:
            return None
        storage, hook, owner, base_id = self._attaching
        try:
            run = newest_run(storage, base_id)
        except SpotfirstError as error:
            self.log.error("Run %s could not be stopped: %s", base_id, error)  # noqa: TRY400
            return None
        return None if run is None else (run, hook, owner)

    # -- the parts --------------------------------------------------------------------------

    def _base_run_id(self, ti: Any) -> str:
        from spotfirst_airflow.submission import base_run_id

        return base_run_id(ti.dag_id, ti.run_id, ti.task_id, ti.map_index)

    def _check_arguments(self) -> None:
        """Refuse literal arguments that are wrong; raises :class:`InvalidArgument`."""
        deferrable: Any = self.deferrable
        if not isinstance(deferrable, bool):
            msg = f"deferrable is {deferrable!r}; give True or False"
            raise InvalidArgument(msg)
        arguments = self._arguments()
        if arguments.get("command", ()) is None:
            msg = "command is missing; give a list of words, such as ['python', 'train.py']"
            raise InvalidArgument(msg)
        try:
            check_written(arguments)
        except InvalidSpec as error:
            raise InvalidArgument(str(error)) from None

    def _arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.ARGUMENTS}

    def _request(self, hook: SpotfirstHook) -> Request:
        values = self._arguments()
        values["fleet"] = self.fleet or hook.default_fleet
        request = to_request(values)
        folder = self._dag_folder()
        if request.code is None or folder is None:
            return request
        return msgspec.structs.replace(request, code=str(folder / Path(request.code).expanduser()))

    def _dag_folder(self) -> Path | None:
        """Where the DAG file is, on this machine; ``None`` for an operator without a DAG."""
        dag = self.get_dag()
        return Path(dag.fileloc).absolute().parent if dag is not None and dag.fileloc else None

    def _defer(self, run: Run, hook: SpotfirstHook, owner: str) -> NoReturn:
        from spotfirst_airflow.triggers import SpotRunTrigger

        now = utc_now()
        deadline = run.spec().deadline
        # The controller keeps the deadline; this is for the case that nobody runs a controller.
        limits = [max(deadline, now) + self.grace] if deadline else []
        if self.execution_timeout is not None:
            stop_at = now + self.execution_timeout
            limits.append(stop_at + self.grace)
        else:
            stop_at = None
        self.defer(
            trigger=SpotRunTrigger(
                storage=run.root.url,
                run_id=run.run_id,
                owner=owner,
                conn_id=hook.conn_id,
                stop_at=stop_at.isoformat() if stop_at else None,
                stop_reason=self._over_time(),
            ),
            method_name="execute_complete",
            kwargs={"record": [run.run_id, run.root.url, hook.conn_id]},
            timeout=min(limits) - now if limits else None,
        )

    def _wait_here(self, run: Run, hook: SpotfirstHook, owner: str) -> None:
        follower, bell = self._follower(run, hook, owner), Bell(run.run_id)
        try:
            while (wait_s := follower.look()) is not None:
                if self._killed:
                    msg = f"the task was ended; run {run.run_id} was asked to stop"
                    raise AirflowException(msg)
                bell.wait(wait_s)
        except AirflowTaskTimeout:
            # Nobody kills us after this one, so there is time to see the instances go.
            self._stop(run, hook, owner, reason=self._over_time(), patience_s=_CLEAN_UP_S)
            raise

    def _over_time(self) -> str:
        return f"{_OVER_TIME} of {self.execution_timeout} is over"

    def _follower(
        self, run: Run, hook: SpotfirstHook, owner: str, *, output: bool = True
    ) -> Follower:
        from spotfirst_airflow.following import Follower

        def open_run() -> tuple[Run, Mapping[str, str]]:
            fresh = SpotfirstHook(hook.conn_id)
            return Run(fresh.open_storage(run.root.url), run.run_id), fresh.environment()

        return Follower(open_run, log=self.log, owner=owner, show_output=output)

    def _reopen(self, context: Context, own: TaskRecord | None = None) -> tuple[Run, SpotfirstHook]:
        """The run that ``execute`` attached to.

        By ``own``, the record that came with the deferral. Airflow drops it when a trigger failed:
        then by the record in the XCom, if this task signed it, or else by the task's arguments.
        """
        from spotfirst_airflow.submission import newest_run

        ti = context["ti"]
        task = TaskKey.of(ti)
        if own is None:
            own = self._recorded(ti, task)
        if own is not None:
            hook = SpotfirstHook(own.conn_id)
            return Run(hook.open_storage(own.storage), own.run_id), hook
        hook = SpotfirstHook.find(self.spotfirst_conn_id)
        storage = hook.open_storage(self.storage)
        run = newest_run(storage, task.base_run_id)
        if run is None:
            msg = (
                f"there is no run {task.base_run_id!r} in {storage.url}, and it is not recorded "
                "where else this task's run is; clear the task to begin one"
            )
            raise AirflowException(msg)
        return run, hook

    def _recorded(self, ti: Any, task: TaskKey) -> TaskRecord | None:
        try:
            found = ti.xcom_pull(task_ids=ti.task_id, key=RUN_XCOM_KEY, map_indexes=ti.map_index)
        except Exception as error:  # noqa: BLE001 - Airflow's decoder on what people wrote
            found, record = error, None
        else:
            record = read_record(found, task)
        if found and record is None:
            self.log.warning("The XCom %r is not this task's own: not used", RUN_XCOM_KEY)
        return record

    def _finish(self, context: Context, run: Run) -> dict[str, Any]:
        """Deliver the result of a final run, or raise what it ended with."""
        from spotfirst_airflow.results import result
        from spotfirst_airflow.submission import mark_delivered

        state = _state(run)
        if state.result is None:
            _raise(run, state)
        exported = self._exported(run)
        delivered = result(run, state, now=utc_now(), exported=exported)
        events = context["outlet_events"]
        for outlet in self.outlets:
            events[outlet].extra.update(_extra(delivered))
        # Last: whoever dies before this line delivers again, whoever dies after it has delivered.
        mark_delivered(run, _delivery(context))
        return delivered

    def _exported(self, run: Run) -> str | None:
        from spotfirst_airflow.exports import export_result

        if self.export is None:
            return None
        hook = SpotfirstHook.find(self.spotfirst_conn_id)
        target = parse("export", self.export)
        try:
            place = export_result(run, target, open_url=hook.open_storage)
        except (InvalidSpec, FormatError, StateError) as error:
            raise AirflowFailException(str(error)) from error
        except SpotfirstError as error:
            # The training is done, and its result not delivered: a retry only exports again.
            raise AirflowException(str(error)) from error
        self.log.info("Exported to %s", place)
        return place

    def _is_retry_of(self, delivered_to: str, context: Context) -> bool:
        """Whether the result went to an earlier try of this task, and it was not cleared since.

        A retry leaves ``max_tries`` and the dag run's ``clear_number`` alone. A clear counts the
        dag run's clears up, whichever of its tasks were cleared, and sets ``max_tries`` to the
        tries so far plus the task's retries: after it, all of the retries are left.
        """
        now = _delivery(context)
        if now == delivered_to:
            return True
        ti = context["ti"]
        is_another_clear = now.startswith("max_tries=") and delivered_to.startswith("max_tries=")
        is_first = ti.max_tries - (ti.try_number - 1) >= (self.retries or 0)
        return (
            is_another_clear
            and now.split(";")[0] == delivered_to.split(";", maxsplit=1)[0]
            and not is_first
        )

    def _give_up(self, context: Context, why: str, own: TaskRecord | None = None) -> dict[str, Any]:
        """Stop the run, see its instances go, and fail; unless it has succeeded in the meantime."""
        run, hook = self._reopen(context, own)
        self._stop(run, hook, str(context["ti"].id), reason=why, patience_s=_CLEAN_UP_S)
        state = _state(run)
        if state.result is not None:
            return self._finish(context, run)
        left = [f"attempt {attempt.number}" for attempt in state.open_attempts]
        step = run.chain().refresh().newest()
        msg = (
            f"run {run.run_id} was stopped ({why}) "
            + (f"at checkpoint step {step[1].step}; " if step else "without a checkpoint; ")
            + (f"STILL RUNNING: {', '.join(left)}, see `spotfirst reap`; " if left else "")
            + "a retry, or clearing the task, goes on from there"
        )
        raise AirflowException(msg)

    def _stop(
        self, run: Run, hook: SpotfirstHook, owner: str, *, reason: str, patience_s: float
    ) -> None:
        """Request a stop if we own the run, and reconcile until it is done or patience ends."""
        from spotfirst_airflow.submission import request_stop

        try:
            if _state(run).is_final and not _state(run).open_attempts:
                return
            if not request_stop(run, reason=reason, owner=owner):
                self.log.info("Run %s goes on: another try has taken it over.", run.run_id)
                return
            follower = self._follower(run, hook, owner, output=False)
            until = time.monotonic() + patience_s
            while (wait_s := follower.look()) is not None and time.monotonic() < until:
                time.sleep(min(wait_s, max(0.0, until - time.monotonic())))
        except SpotfirstError as error:
            self.log.error("Run %s could not be stopped: %s", run.run_id, error)  # noqa: TRY400


def _delivery(context: Context) -> str:
    """To whom a result was delivered: the same for automatic retries, another after a clear."""
    ti = context["ti"]
    clears = getattr(context.get("dag_run"), "clear_number", None)
    if clears is None:  # a retry cannot be told from a clear, so each try is its own
        return f"try={ti.id}"
    return f"max_tries={ti.max_tries};clears={clears}"


def _refuse_misspelt(kwargs: Mapping[str, Any], known: Sequence[str]) -> None:
    """Name the argument that was probably meant; Airflow only names what it does not know."""
    own = inspect.signature(BaseOperator.__init__).parameters
    for name in kwargs:
        meant = "" if name in known or name in own else suggestion([name], known)
        if meant:
            msg = f"there is no argument {name}{meant}"
            raise InvalidArgument(msg)


def _state(run: Run) -> RunState:
    return run.journal().refresh()


def _raise(run: Run, state: RunState) -> NoReturn:
    """Fail the task with what the run ended with."""
    from spotfirst_airflow.costs import bill, usd
    from spotfirst_airflow.keeping import still_kept
    from spotfirst_airflow.news import script_error

    account = bill(state, now=utc_now())
    cost = f"It cost {usd(account.total_usd, simulated=account.is_simulated)} so far."
    if state.failure is None:
        reason = state.stop.reason if state.stop else "it was stopped"
        msg = f"run {run.run_id} has stopped: {reason}. {cost} Clear the task to continue it"
        if reason.startswith(_OVER_TIME):
            raise AirflowException(msg)  # as Airflow has it: a timeout may be retried
        # Somebody, or the budget, wanted it to stop: an automatic retry must not start it again.
        raise AirflowFailException(msg)
    tail = "".join(f"\n    {line}" for line in state.failure.log_tail[-_LOG_TAIL:])
    kept = still_kept(state, now=utc_now())
    # First the script's own error: many tools show no more than this line.
    own = script_error(state.failure.log_tail, state)
    msg = (f"{own}\n" if own else "") + (
        f"run {run.run_id} has failed: {state.failure.message}. {cost} {kept}".rstrip()
        + (f"\nThe last lines of its output:{tail}" if tail else "")
    )
    raise (AirflowException if state.failure.retryable else AirflowFailException)(msg)


def _extra(delivered: Mapping[str, Any]) -> dict[str, Any]:
    """What an asset's event says about the model that was made."""
    names = (
        "run_id", "storage", "checkpoint", "resume_from", "step", "metrics", "cost_usd", "exported",
    )  # fmt: skip
    return {name: delivered[name] for name in names} | {
        "weights_sha256": delivered["weights_sha256"]
    }
