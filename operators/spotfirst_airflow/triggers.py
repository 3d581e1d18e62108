"""Waits for a run in the triggerer, and reconciles it meanwhile."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, TypeVar

from airflow.triggers.base import BaseTrigger, TriggerEvent

from spotfirst.errors import StorageDenied, StorageUnavailable
from spotfirst.run import Run
from spotfirst.wire import utc_now
from spotfirst_airflow.following import Follower
from spotfirst_airflow.hooks import SpotfirstHook
from spotfirst_airflow.submission import request_stop
from spotfirst_airflow.waking import Bell

__all__ = ["SpotRunTrigger"]

_T = TypeVar("_T")

# Looks wait for the network, not for a core. Kills have threads of their own: while a storage is
# away, every look of every run holds one for seconds, and a kill must not queue behind them.
_LOOKS = ThreadPoolExecutor(max_workers=16, thread_name_prefix="spotfirst-look")
_KILLS = ThreadPoolExecutor(max_workers=8, thread_name_prefix="spotfirst-kill")

_BACKGROUND: set[asyncio.Task[None]] = set()
"""Keeps a strong reference to kills, which outlive their cancelled trigger."""

_SETTLE_S = 10.0
"""The scheduler fails a task that runs again before it has seen the end of its deferring half
("finished with state success, but the task instance's state attribute is running"), which takes a
busy one some seconds. So a run that ends at once is told of no sooner than this."""
_TERMINAL = {"success", "failed", "skipped", "upstream_failed", "removed"}
_GONE = "gone"
_UNATTENDED = timedelta(minutes=10)
"""How long a run goes on whose cleared task nobody takes up again."""


class SpotRunTrigger(BaseTrigger):
    """Reconciles one run until it is final and every instance is gone, then fires once.

    Several triggers on one run, in one triggerer or in several, are harmless: they race for each
    event of its journal. Stopping a triggerer stops nothing else.

    Args:
        storage: URL of the storage that holds the run.
        run_id: the run.
        owner: the id of the task instance that attached to the run. A kill stops the run only
            while this is still its owner.
        conn_id: the Spotfirst connection; ``None`` for the triggerer's own environment.
        stop_at: when to stop the run, ISO 8601, whatever else happens.
        stop_reason: why, for people.
    """

    def __init__(
        self,
        *,
        storage: str,
        run_id: str,
        owner: str,
        conn_id: str | None = None,
        stop_at: str | None = None,
        stop_reason: str = "time is up",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storage = storage
        self.run_id = run_id
        self.owner = owner
        self.conn_id = conn_id
        self.stop_at = stop_at
        self.stop_reason = stop_reason

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """The class and its arguments. They are stored as plain JSON: nothing secret here."""
        return (
            "spotfirst_airflow.triggers.SpotRunTrigger",
            {
                "storage": self.storage,
                "run_id": self.run_id,
                "owner": self.owner,
                "conn_id": self.conn_id,
                "stop_at": self.stop_at,
                "stop_reason": self.stop_reason,
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look after the run; one event at its end, or when it cannot be looked after."""
        follower = self._follower(
            stop_at=datetime.fromisoformat(self.stop_at) if self.stop_at else None
        )
        error = ""
        settled = asyncio.get_running_loop().time() + _SETTLE_S
        try:
            await _see_through(follower, _LOOKS, Bell(self.run_id))
        except Exception as problem:
            # As an event, so that the task resumes, stops the run, and says why.
            self.log.exception("Cannot look after run %s any more", self.run_id)
            error = f"{type(problem).__name__}: {problem}"
        if self.task_instance is not None:  # there is no scheduler in DAG.test()
            await asyncio.sleep(settled - asyncio.get_running_loop().time())
        yield TriggerEvent({"run_id": self.run_id, "error": error})  # type: ignore[no-untyped-call]

    async def on_kill(self) -> None:
        """Called when the task was marked, cleared, or its trigger moved to another triggerer.

        Airflow cancels this coroutine about a second after its first ``await``, whatever its
        timeout says; so the work is done in a task of its own.
        """
        task = asyncio.create_task(self._after_kill())
        _BACKGROUND.add(task)
        task.add_done_callback(_BACKGROUND.discard)
        await asyncio.shield(task)

    # -- after a kill -----------------------------------------------------------------------

    async def _after_kill(self) -> None:
        try:
            if await self._is_to_stop():
                await self._stop()
        except Exception:
            self.log.exception(
                "Run %s may still have instances: see `spotfirst show %s`, and `spotfirst reap`",
                self.run_id, self.run_id,
            )  # fmt: skip

    async def _is_to_stop(self) -> bool:
        """Whether nobody wants the run any more. Looks after it until that is known.

        Marked: the task instance is in a terminal state. Cleared: it waits to be run again, and
        its next try takes the run over. Moved: it is still deferred, and we still own the run.
        """
        follower = self._follower(show_output=False)
        until = utc_now() + _UNATTENDED
        while True:
            state = await self._task_state()
            if state == _GONE or state in _TERMINAL:
                return True
            if not await self._patiently(self._is_owner):
                self.log.info("Run %s goes on: another try has taken it over.", self.run_id)
                return False
            if state == "deferred":
                self.log.info("Run %s goes on: another triggerer looks after it.", self.run_id)
                return False
            if utc_now() > until:
                self.log.warning("Nobody takes up run %s: its task is %s.", self.run_id, state)
                return True
            wait_s = await _in_thread(_KILLS, follower.look)
            if wait_s is None:
                return False
            await asyncio.sleep(max(1.0, wait_s))

    async def _task_state(self) -> str | None:
        """The state of our task instance; ``None`` just after a clear, "gone" when it is."""
        from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance

        ti = self.task_instance
        assert ti is not None
        get = RuntimeTaskInstance.get_task_states

        def ask() -> dict[str, Any]:
            return get(ti.dag_id, ti.map_index, task_ids=[ti.task_id], run_ids=[ti.run_id])

        found: dict[str, Any] = {}
        for pause_s in (1, 2, 4, 8, 15, 30, 0):
            try:
                found = await _in_thread(_KILLS, ask)
                break
            except Exception as error:
                if not pause_s:
                    raise
                self.log.warning("Airflow does not tell the state of the task: %s", error)
                await asyncio.sleep(pause_s)
        name = ti.task_id if ti.map_index < 0 else f"{ti.task_id}_{ti.map_index}"
        state = found.get(ti.run_id, {}).get(name, _GONE)
        return None if state is None else str(getattr(state, "value", state))

    async def _stop(self) -> None:
        """Stop the run unless another owner has it, and see its instances go."""
        reason = "its task in Airflow was marked or removed"
        ours = await self._patiently(
            lambda: request_stop(self._open()[0], reason=reason, owner=self.owner)
        )
        if not ours:
            self.log.info("Run %s goes on: another try has taken it over.", self.run_id)
            return
        follower = self._follower(show_output=False)
        await _see_through(follower, _KILLS, Bell(self.run_id))
        self.log.info("Run %s has stopped; every instance is gone.", self.run_id)

    async def _patiently(self, call: Callable[[], _T]) -> _T:
        """Call until the storage answers: giving up would leave instances behind."""
        while True:
            try:
                return await _in_thread(_KILLS, call)
            except (StorageUnavailable, StorageDenied) as error:
                self.log.warning("The storage of run %s does not answer: %s", self.run_id, error)
                await asyncio.sleep(5)

    def _is_owner(self) -> bool:
        return self._open()[0].journal().refresh().owner == self.owner

    # -- what threads do --------------------------------------------------------------------

    def _open(self) -> tuple[Run, Mapping[str, str]]:
        hook = SpotfirstHook(self.conn_id)
        return Run(hook.open_storage(self.storage), self.run_id), hook.environment()

    def _follower(self, *, stop_at: datetime | None = None, show_output: bool = True) -> Follower:
        return Follower(
            self._open, log=self.log, owner=self.owner, stop_at=stop_at,
            stop_reason=self.stop_reason, show_output=show_output,
        )  # fmt: skip


async def _see_through(follower: Follower, pool: ThreadPoolExecutor, bell: Bell) -> None:
    """Look until the run is over: at once when there is news of it, or else every few seconds."""
    while (wait_s := await _in_thread(pool, follower.look)) is not None:
        await bell.sleep(wait_s)


async def _in_thread(pool: ThreadPoolExecutor, call: Callable[[], _T]) -> _T:
    """Run a blocking call. Its log lines keep the trigger's context, and so reach the task log."""
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(pool, context.run, call)
