"""The Checkpointer: three lines in a training loop, and the run survives any interruption.

::

    checkpointer = Checkpointer(model=model, optimizer=optimizer, scheduler=scheduler)
    for step in checkpointer.steps(total_steps):
        loss = train_one_step(step)
        checkpointer.report(loss=loss)

Everything happens at step boundaries, on the training thread: there the state is copied, and
there the loop is left when the agent asks for it. Hashing and writing run beside the training.

Of several ranks (torchrun) each has a Checkpointer. They restore, checkpoint and leave at the same
steps, as rank 0 says (:mod:`spotfirst.distributed.group`), and all write at the same time.
"""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch  # noqa: TID253 - the Checkpointer is the part of Spotfirst that needs it
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: TID253

from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.checkpoints.claiming import wait_for_claim
from spotfirst.checkpoints.fitting import fitting_trees
from spotfirst.checkpoints.gathering import MOST_STEPS, Gathering
from spotfirst.checkpoints.last import decide
from spotfirst.checkpoints.loading import StateReader, differences, misfit
from spotfirst.checkpoints.local import local_tier, usable_commit
from spotfirst.checkpoints.manifest import Made, StateManifest, read_manifest
from spotfirst.checkpoints.memory import Arena
from spotfirst.checkpoints.optimizers import Refit, Start
from spotfirst.checkpoints.packs import Location, known_arrays
from spotfirst.checkpoints.prefetching import Prefetch
from spotfirst.checkpoints.ranks import Team, rank_trees
from spotfirst.checkpoints.restoring import Restored, load_newest
from spotfirst.checkpoints.retention import Retention
from spotfirst.checkpoints.rng import (
    as_stateful,
    cuda_in_use,
    reseed_rng,
    restore_rng,
    rng_state,
)
from spotfirst.checkpoints.saving import Saved, Saver, Tier
from spotfirst.checkpoints.schedule import Schedule
from spotfirst.checkpoints.snapshot import Planner, Snapshot, settled_until_step
from spotfirst.checkpoints.statetree import Leaf, flatten, walk_leaves
from spotfirst.checkpoints.tensors import TensorCollector
from spotfirst.checkpoints.trainable import Trainable
from spotfirst.checkpoints.weights import weights_sha256
from spotfirst.checkpoints.wrappers import (
    load_module,
    loads_itself,
    module_state,
    own_tree,
    unwrapped,
)
from spotfirst.context import TrainerContext
from spotfirst.distributed.group import MEETING_S, Group, Say, find_group, rank_here
from spotfirst.errors import (
    ClaimLost,
    CorruptObject,
    InvalidSpec,
    ObjectMissing,
    SpotfirstError,
    StateMismatch,
)
from spotfirst.leaving import Drained, Superseded
from spotfirst.patience import Sleep, patiently
from spotfirst.reporting import ProgressReporter
from spotfirst.run import Run
from spotfirst.steptimes import StepWatch
from spotfirst.storage import Storage
from spotfirst.wire import Clock, utc_now

if TYPE_CHECKING:
    from spotfirst.distributed.collecting import Collected

__all__ = ["Checkpointer", "Drained", "Superseded", "weights_sha256"]

_log = logging.getLogger(__name__)

_MEMORY_SHARE = 0.8
"""Of the memory that is left, what the copy of a state may take."""

_TRAINED_ON = "the script trained on after its last step"


class Checkpointer:
    """Saves and restores ``objects``, the random number generators and the step.

    ``objects`` have ``state_dict`` and ``load_state_dict`` (module, optimizer, scheduler, sampler,
    gradient scaler, …) or are generators (:class:`torch.Generator`, :class:`random.Random`, NumPy).
    Build them as for a fresh start, with the seeds set before; restoring overwrites them.

    ``period_s`` is the time from one checkpoint to the next, 0 for every step. Left out, or
    ``"auto"``, it follows from what a checkpoint costs and how often the pool is interrupted, so
    that a kill loses at most ``SPOTFIRST_CHECKPOINT_PERIOD_S`` (or 300) of training; see
    :mod:`spotfirst.checkpoints.period`. ``retention`` says which checkpoints stay. ``storage`` is for training on one's own,
    outside of a run: a folder or URL that keeps the checkpoints. Without it, and outside of a run,
    training runs without checkpoints.

    ``lazy`` copies parameters and optimizer state during the next forward and backward pass, which
    costs no time; see :mod:`spotfirst.checkpoints.snapshot`. Switch it off for a script that
    changes parameters through ``.data`` elsewhere than after ``optimizer.step()``.
    ``memory_bytes`` is what the copy may take; by default, all of the state, if that is there.
    ``local`` is a folder on a fast local disk (or ``SPOTFIRST_LOCAL_CHECKPOINTS``): each checkpoint
    goes there first, so that a process that is started again on this machine reads it from there
    (of a single process only).
    ``compress`` is for storages slower than some tens of MB/s; ``"auto"`` measures whether it pays.
    ``strict=False`` restores what fits of a checkpoint of other objects, and names in a warning
    what it skipped: that begins anew. Otherwise such a checkpoint is refused.
    ``context``, ``clock``, ``monotonic`` and ``sleep`` are for tests.
    """

    def __init__(
        self,
        *,
        period_s: float | Literal["auto"] | None = None,
        total_steps: int | None = None,
        storage: str | None = None,
        retention: Retention | None = None,
        lazy: bool = True,
        memory_bytes: int | None = None,
        local: str | None = None,
        compress: bool | Literal["auto"] = False,
        strict: bool = True,
        context: TrainerContext | None = None,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Sleep = time.sleep,
        **objects: Any,
    ) -> None:
        self._objects = {name: as_stateful(unwrapped(value)) for name, value in objects.items()}
        unfit = [name for name, value in self._objects.items() if value is None]
        if unfit or not objects:
            kinds = ", ".join(f"{name} ({type(objects[name]).__qualname__})" for name in unfit)
            what = f"without state_dict() and load_state_dict(): {kinds}" if unfit else "no object"
            msg = f"Checkpointer: {what}; pass what training changes, such as model=model"
            raise InvalidSpec(msg)
        self._loaders = loaders = [v for v in self._objects.values() if hasattr(v, "when_asked")]
        for loader in loaders:
            loader.beside(lambda: loaders)
        self._over: int | None = None
        self._with_one_batch = 0
        self._gathers = False
        self._gathering = Gathering(self._all_torch_parts)
        self._clock, self._monotonic, self._sleep = clock, monotonic, sleep
        self._context = context if context is not None else TrainerContext.find(storage)
        channel = self._context.channel if self._context and rank_here() == 0 else None
        self._channel = channel
        self._reporter = ProgressReporter(channel, clock=clock, monotonic=monotonic)
        self._reporter.tell(total_steps=total_steps)
        self._watch = StepWatch()
        self._schedule = Schedule(period_s, self._reporter, monotonic=monotonic)
        self._retention = retention
        self._lazy = lazy
        self._memory_bytes = memory_bytes
        self._local = local
        self._strict = strict
        self._skipped: list[str] = []
        self._compress = compress
        self._arena = Arena()
        self._planner = Planner()
        self._has_room = False
        self._saver: Saver | None = None
        self._step: int | None = None
        self._left: Drained | Superseded | None = None
        self._group: Group | None = None
        self._start: Start | None = None
        self._trainable: Trainable | None = None
        self._refit: Refit | None = None

    # -- the loop ---------------------------------------------------------------------------

    def steps(self, total_steps: int) -> Iterator[int]:
        """The steps that are left, after restoring: ``range(first, total_steps)``.

        What follows a step's body happens as in :meth:`step`; after the last one, its checkpoint
        is complete. May be used again, for more steps. After a ``break`` out of the loop call
        :meth:`save` when those steps are to be kept.
        """
        self._reporter.tell(total_steps=total_steps)
        first = self.restore()
        for step in range(first, total_steps):
            yield step
            self.step(step + 1)
        self.close()

    def expect(self, total_steps: int) -> None:
        """Say how many steps there are in all, where that is known only after :meth:`restore`."""
        self._reporter.tell(total_steps=total_steps)

    def report(self, **metrics: Any) -> None:
        """Metrics of the current step: numbers, or tensors of one element."""
        self._reporter.measure(metrics)

    def warn(self, message: str) -> None:
        """Show a warning in the run and in the log, once."""
        self._reporter.warn(message)

    # -- the same, in the open --------------------------------------------------------------

    def restore(self) -> int:
        """Wait until the previous attempt has let go, load the newest checkpoint; the next step.

        A second call does nothing. Raises :class:`StateMismatch` when the checkpoint is of other
        objects, :class:`CorruptObject` when there are checkpoints and none is whole,
        :class:`Superseded` when a newer attempt was faster, and :class:`Drained` when the agent
        asks to stop before it began.
        """
        if self._step is not None:
            return self._step
        if self._context is None:
            self._step = 0
            self._reporter.stamp("restored", phase="training", start_step=0, step=0)
            return 0
        self._group = find_group(monotonic=self._monotonic)
        if self._group is not None and not self._group.leads:
            self._channel = None
            self._reporter.mute()
        generators = rng_state()
        self._start = Start(self._objects)
        self._trainable = Trainable(self._objects)
        layout = self._layout()  # refuses now what no checkpoint could hold
        run = self._context.run
        chain = run.chain()
        self._reporter.stamp("standby", phase="standby")
        resume_from = None
        retention = self._retention
        if self._context.attempt is not None:
            spec = patiently(run.spec, what="read the run's spec", sleep=self._sleep)
            resume_from = spec.resume_from
            retention = retention or spec.retention
            if spec.checkpoint_mode != "trainer":
                msg = (
                    f"run {run.run_id} has checkpoint_mode={spec.checkpoint_mode!r}: the agent "
                    "saves the files of $SPOTFIRST_CHECKPOINT_DIR. Ask for 'trainer' to use a "
                    "Checkpointer"
                )
                raise InvalidSpec(msg)
        alone = self._group is None or self._group.size == 1
        prefetch = Prefetch(run) if alone and self._local is None else None
        claim = self._together(lambda: self._claim(run, chain, prefetch))
        self._see(chain, claim)
        attempt = chain.holder or 0
        self._reporter.stamp("claimed")
        tier = Tier(
            run.packs(), chain, attempt, claim, retention=retention or Retention(),
            pinned=run.pinned,
        )  # fmt: skip
        # Rank 0 could not see what the others have written to the disks of other machines.
        local = local_tier(run, attempt, claim, self._local) if alone else None
        restored = self._load_local(local, tier, layout) if local else None
        if restored is None:
            restored = patiently(
                lambda: load_newest(
                    run, chain, lambda packs, commit: self._read(packs, commit, layout, prefetch),
                    content="state", resume_from=resume_from, warn=self._reporter.warn,
                ),
                what="read the checkpoint", sleep=self._sleep, warn=self._reporter.warn,
            )  # fmt: skip
            # What was skipped was not read, so nobody knows whether it is whole.
            tier.known = {} if self._skipped else _known(restored)
        self._saver = Saver(
            [local, tier] if local else [tier], on_saved=self._on_saved, warn=self._reporter.warn,
            compress=self._compress, team=self._group, monotonic=self._monotonic, sleep=self._sleep,
        )  # fmt: skip
        _before_optimizer_steps(self._saver, self._gathering)
        step = self._apply(restored)
        if restored is None:
            # The S3 client's imports draw from Python's global one (rich names its styles so).
            restore_rng(generators)
        self._schedule.start()
        self._gathering.begin()
        self._step = step
        self._reporter.stamp("restored", phase="training", start_step=step, step=step)
        self._together(lambda: self._leave_early(step))
        return step

    def _claim(self, run: Run, chain: CheckpointChain, prefetch: Prefetch | None) -> int:
        """Claim the chain when its holder has let go; the number of the claim."""
        assert self._context is not None
        attempt, channel = self._context.attempt, self._channel
        if attempt is None:
            attempt = (patiently(chain.refresh, what="read the run").holder or 0) + 1
            patiently(lambda: chain.claim(attempt), what="claim the run")
            return chain.claims[-1]
        if prefetch is not None:
            prefetch.start()
        try:
            claimed = wait_for_claim(
                run, chain, attempt, leave=lambda: channel is not None and bool(channel.drain()),
                is_ready=lambda: prefetch is None or prefetch.ready,
                clock=self._clock, monotonic=self._monotonic, sleep=self._sleep,
            )  # fmt: skip
        except ClaimLost as error:
            raise self._superseded(error) from error
        finally:
            if prefetch is not None:
                prefetch.stop()
        if not claimed:
            raise self._drained(0)
        return chain.claims[-1]

    def _see(self, chain: CheckpointChain, claim: int) -> None:
        """Read what rank 0 has read when it claimed; what may be newer is not for us."""
        while claim not in chain.claims:
            patiently(chain.refresh, what="read the run", sleep=self._sleep)
        chain.commits = [(seq, commit) for seq, commit in chain.commits if seq < claim]

    def _leave_early(self, step: int) -> int:
        if self._channel is not None and self._channel.drain() is not None:
            assert self._saver is not None
            self._saver.release()
            raise self._drained(step)
        return 0

    def step(self, done: int, **metrics: Any) -> None:
        """Say that ``done`` steps are finished, from 0 on; call it after every step.

        Here a checkpoint is begun when its time has come, and here the loop is left: raises
        :class:`Drained` when the agent asks for it, after a last checkpoint of this very step,
        and :class:`Superseded` when a newer attempt has taken over. When the step's batch is of a
        ``ResumableLoader``, all that happens when the loop asks for the next batch; and when
        gradients are gathered over several steps, at the one that ends with ``optimizer.step()``.
        """
        if self._step is None:
            msg = "call restore() before the first step(); steps() does it by itself"
            raise InvalidSpec(msg)
        if self._left is not None:  # a bare `except:` has swallowed it
            raise self._left
        self._step = done
        self.report(**metrics)
        self._tell_step(done)
        total = self._reporter.progress.total_steps
        if total is not None and done > total:
            # Usually a loop that was restored at its last step, and asks only after a step.
            self._reporter.warn(
                f"{_TRAINED_ON}: step {done} of {total}; test for the end before a step",
                key=_TRAINED_ON,
            )
        if self._saver is None:
            return
        # A ResumableLoader knows when it is asked for the next batch whether its loop goes on.
        self._over = done
        read = [loader for loader in self._loaders if loader.stepped()]
        self._with_one_batch = 0 if read else self._with_one_batch + 1
        is_held = any(loader.holds_a_batch for loader in self._loaders)
        if read or (is_held and self._with_one_batch <= MOST_STEPS):
            for loader in self._loaders:
                loader.when_asked(self._step_over, read)
        else:
            self._step_over()

    def _step_over(self) -> None:
        done, self._over = self._over, None
        if done is None or self._saver is None:
            return
        self._schedule.boundary(self._saver)
        if not self._has_room:
            self._make_room()
        self._saver.stepped()
        self._gathers = self._gathering.is_open()
        if self._group is None or self._group.is_due(done):
            self._together(lambda: self._boundary(done))

    def _boundary(self, done: int) -> int:
        """Checkpoint or leave, if it is time."""
        assert self._saver is not None
        try:
            self._saver.check()
            if done == self._reporter.progress.total_steps:
                return 0  # close() follows: it saves, and then there is nothing to hand over
            if self._gathers:
                return 0
            drain = self._channel.drain() if self._channel is not None else None
            if drain is not None:
                self._drain(done, drain.by)
        except ClaimLost as error:
            raise self._superseded(error) from error
        if self._schedule.is_due(self._saver):
            self._save(wait=False)
        return 0

    def save(self, *, wait: bool = True) -> bool:
        """Checkpoint the step last finished, now; whether a save was begun (or was not needed).

        With ``wait``, it is complete on return, and what went wrong is raised. Without, nothing
        happens while another save is running. Of several ranks, all call it at the same step.
        """
        if self._saver is None or self._step is None:
            return False
        return bool(self._together(lambda: self._save(wait=wait)))

    def _save(self, *, wait: bool) -> bool:
        saver, step = self._saver, self._step
        assert saver is not None
        assert step is not None
        if saver.busy and not wait:
            return False
        try:
            if not wait:
                saver.check()
                started = self._monotonic()
                self._begin(saver, step)
                self._schedule.begun(step, saver, since_s=started)
                return True
            saver.finish()
            if saver.newest_step != step:
                self._begin(saver, step, waits=True)
                error = saver.finish()
                if error is not None:
                    raise error
        except ClaimLost as error:
            raise self._superseded(error) from error
        finally:
            if wait:
                self._schedule.waited(saver)
        return True

    @property
    def last_saved(self) -> Saved | None:
        """The newest checkpoint that this process completed, and what it took; not a restored one."""
        return self._saver.last if self._saver is not None else None

    def close(self) -> None:
        """Complete the checkpoint of the step last finished, and tell the agent the last word."""
        if self._left is None:
            self.save(wait=True)
            self._reporter.tell(step=self._step, metrics=self._reporter.metrics())

    # -- several ranks ----------------------------------------------------------------------

    def _together(self, action: Callable[[], int]) -> int:
        """The result of ``action``, which rank 0 does while the others do what it says."""
        group = self._group
        if group is None:
            return action()
        if not group.leads:
            return self._follow(group)
        try:
            result = action()
        except Drained as leaving:
            group.say(Say.DRAINED, leaving.step)
            raise
        except Superseded as leaving:
            group.say(Say.SUPERSEDED, leaving.holder)
            raise
        except Exception:
            group.say(Say.FAILED)
            raise
        if self._step is not None:
            group.met(self._step, min(MEETING_S, self._schedule.period.period_s))
        group.say(Say.DONE, result)
        return result

    def _follow(self, group: Group) -> int:
        saver = self._saver
        while True:
            order = group.hear()
            if order.say == Say.DONE:
                return order.value
            if order.say == Say.DRAINED:
                raise self._drained(order.value)
            if order.say == Say.SUPERSEDED:
                msg = f"attempt {order.value} has claimed the chain"
                raise self._superseded(ClaimLost(msg, holder=order.value))
            if order.say == Say.FAILED or saver is None or self._step is None:
                msg = "rank 0 has failed; its log says why"
                raise SpotfirstError(msg)
            saver.finish()  # it may be handing in its part still
            saver.start(self._snapshot(self._step), order.value)

    def _begin(self, saver: Saver, step: int, *, waits: bool = False) -> None:
        """Begin a save, on all ranks. ``waits``: the state stays as it is until it is stored."""
        if self._group is not None:
            self._group.say(Say.SAVE, saver.next_number)
        saver.start(self._snapshot(step, in_place=waits and saver.stores_in_place))

    # -- leaving ----------------------------------------------------------------------------

    def _drain(self, step: int, by: datetime | None) -> None:
        """Leave, after a last checkpoint if it can be stored ``by`` then."""
        assert self._saver is not None
        self._reporter.stamp(
            "last_step", phase="draining", step=step, metrics=self._reporter.metrics(),
            step_times=self._watch.times(),
        )  # fmt: skip
        try:
            self._save_last(self._saver, step, by)
        except ClaimLost:
            raise
        except Exception as error:  # noqa: BLE001 - the previous checkpoint stays the newest
            self._given_up(self._saver, step, str(error))
        self._saver.release()
        raise self._drained(step)

    def _save_last(self, saver: Saver, step: int, by: datetime | None) -> None:
        saver.in_a_hurry = by is not None
        while True:
            running = self._schedule.running(saver)
            if running is None and saver.newest_step == step:
                return
            left_s = None if by is None else (by - self._clock()).total_seconds()
            decision = decide(left_s, estimate=self._schedule.estimate, running=running)
            _log.info("asked to stop after step %d: %s", step, decision.reason)
            leaving = (*self._reporter.progress.leaving, decision.reason)
            self._reporter.tell(leaving=leaving)
            if decision.action == "take":
                self._begin(saver, step, waits=True)
            error = saver.finish(decision.patience_s)
            self._schedule.stored(saver.last)
            if decision.action != "finish" or isinstance(error, TimeoutError):
                break  # else it is decided again, from what that save took
        if saver.newest_step != step:
            why = decision.reason if decision.action == "stop" or error is None else str(error)
            self._given_up(saver, step, why)

    def _given_up(self, saver: Saver, step: int, why: str) -> None:
        first = saver.newest_step
        if first is None:
            first = self._reporter.progress.start_step or 0
        lost = f"steps {first + 1} to {step} are" if step > first + 1 else f"step {step} is"
        self._reporter.warn(
            f"the last checkpoint, of step {step}, could not be saved, and {lost} given up: {why}"
        )

    def _drained(self, step: int) -> Drained:
        self._left = Drained(step)
        self._reporter.stamp("drained", phase="draining", released=True)
        return self._left

    def _superseded(self, error: ClaimLost) -> Superseded:
        self._left = Superseded(error.holder)
        self._reporter.warn(f"attempt {error.holder} has taken over; this one stops")
        self._reporter.tell(phase="draining", released=True)
        return self._left

    # -- saving -----------------------------------------------------------------------------

    def _snapshot(self, step: int, *, in_place: bool = False) -> Snapshot:
        assert self._saver is not None
        started = self._monotonic()
        self._lazy = self._lazy and not self._saver.was_torn
        if cuda_in_use():
            torch.cuda.synchronize()  # side streams too have to be done with this step
        objects: dict[str, Any] = {}
        rng = part = None
        if self._group is not None:
            mine = self._collect_of_rank(self._group, step)
            leaves, part = mine.mine, mine.part
        else:
            objects, rng, leaves = self._collect()
        return Snapshot(
            step=step, objects=objects, ranked={}, rng=rng, leaves=leaves,
            plan=self._planner.plan(
                leaves, self._settled if self._lazy else frozenset, in_place=in_place
            ),
            metrics=self._reporter.metrics(), taken_at=started, arena=self._arena,
            memory_bytes=self._memory_bytes, part=part,
            made=self._made(),
            changes_in_s=self._saver.changes_in_s, monotonic=self._monotonic,
        )  # fmt: skip

    def _make_room(self) -> None:
        """After the first step the state has its final size: get memory for its copy."""
        self._has_room = True
        if self._group is not None:
            leaves = self._collect_of_rank(self._group, 0).mine
        else:
            _, _, leaves = self._collect()
        plan = self._planner.plan(leaves, self._settled if self._lazy else frozenset)
        if self._memory_bytes is None:
            available = psutil.virtual_memory().available
            if plan.copied_bytes > _MEMORY_SHARE * available:
                self._memory_bytes = int(_MEMORY_SHARE * available) // 2
        if self._memory_bytes is None or plan.copied_bytes <= self._memory_bytes:
            assert self._saver is not None
            ready = plan.ready_bytes if self._saver.may_keep_up else plan.copied_bytes
            self._arena.prepare(plan.copied_bytes, ready_bytes=ready, pinned=plan.on_gpu)

    def _settled(self) -> frozenset[int]:
        return settled_until_step(self._all_torch_parts())

    def _all_torch_parts(self) -> Iterator[Any]:
        return itertools.chain(*map(_torch_parts, self._objects.values()))

    def _layout(self) -> tuple[dict[str, Any], list[Leaf]]:
        """The trees of all objects, and the leaves that those of the modules are over."""
        if self._group is not None:
            mine = self._collect_of_rank(self._group, 0)
            return mine.objects, mine.leaves
        objects, _, leaves = self._collect()
        return objects, leaves

    def _collect_of_rank(self, group: Group, step: int) -> Collected:
        from spotfirst.distributed.collecting import collect  # it takes a second to import

        parts = {name: _torch_parts(value) for name, value in self._objects.items()}
        common = {
            name: value[0]
            for name, value in parts.items()
            if value and isinstance(value[0], (torch.nn.Module, torch.optim.Optimizer))
        }
        states = {name: _state_of(value) for name, value in self._objects.items()}
        made = self._made() if group.leads else {}
        return collect(states, rng_state(), common, step=step, team=group, made=made)

    def _made(self) -> dict[str, Made]:
        if self._start is None or self._trainable is None:
            return {}
        return {**self._start.made(), **self._trainable.changed()}

    def _collect(self) -> tuple[dict[str, Any], Any, list[Leaf]]:
        # All states are alive until the last is taken: tied tensors are known by their address.
        states = {name: _state_of(value) for name, value in self._objects.items()}
        generators = rng_state()
        collector = TensorCollector()
        objects = {name: flatten(state, collector, name) for name, state in states.items()}
        return objects, flatten(generators, collector, "rng"), collector.leaves

    def _on_saved(self, saved: Saved) -> None:
        self._reporter.tell(
            checkpoint_seq=saved.seq, checkpoint_step=saved.step, checkpoint_s=saved.took_s
        )

    def _tell_step(self, done: int) -> None:
        self._reporter.step_done = done
        self._watch.lap(done, self._monotonic())
        if self._reporter.progress.timings.first_step is None:
            self._reporter.stamp(
                "first_step", "last_step", step=done, metrics=self._reporter.metrics()
            )
        elif done == self._reporter.progress.total_steps or self._reporter.due:
            self._reporter.stamp(
                "last_step", step=done, metrics=self._reporter.metrics(),
                step_times=self._watch.times(),
            )  # fmt: skip

    # -- restoring --------------------------------------------------------------------------

    def _read(
        self,
        packs: Storage,
        commit: Commit,
        layout: tuple[dict[str, Any], list[Leaf]],
        prefetch: Prefetch | None = None,
    ) -> tuple[dict[str, Any], Any, StateManifest]:
        """The states and generators of a checkpoint, whole and fitting, on all ranks or on none."""
        if self._group is None:
            return self._read_state(packs, commit, layout, prefetch)
        return self._group.agree(
            lambda: patiently(
                lambda: self._read_state(packs, commit, layout),
                what="read the checkpoint", sleep=self._sleep, warn=self._reporter.warn,
            )
        )  # fmt: skip

    def _read_state(
        self,
        packs: Storage,
        commit: Commit,
        layout: tuple[dict[str, Any], list[Leaf]],
        prefetch: Prefetch | None = None,
    ) -> tuple[dict[str, Any], Any, StateManifest]:
        """What fits goes to the memory of the modules as it is read."""
        manifest = read_manifest(packs, commit.manifest, commit.digest)
        if not isinstance(manifest, StateManifest):
            msg = f"the checkpoint of step {commit.step} holds files, not a training state"
            raise StateMismatch(msg)
        modules = {n: v for n, v in self._objects.items() if isinstance(v, torch.nn.Module)}
        rank, size = (self._group.rank, self._group.size) if self._group else (0, 1)
        trees = {
            name: own_tree(tree, layout[0].get(name)) if name in modules else tree
            for name, tree in rank_trees(manifest, rank, size).items()
        }
        problems = differences(
            manifest, trees, layout[0], layout[1], modules.keys(),
            decided=lambda name, path: self._strict and loads_itself(modules[name], path),
        )  # fmt: skip
        assert self._start is not None
        refit = self._refit = Refit(
            self._start, manifest.made, trees, manifest.arrays, modules.keys()
        )
        trees = refit.arrange(trees)
        problems = sorted([*problems, *refit.problems])
        if problems and self._strict:
            raise misfit(commit.step, problems)
        self._skipped = problems
        if problems:
            trees = fitting_trees(manifest, trees, layout[0], layout[1], modules.keys())
        reader = StateReader(packs, manifest, prefetch)
        for name, tree in trees.items():
            targets = _tensors(modules[name]) if name in modules else {}
            reader.plan(tree, targets, self._regions(self._objects[name], tree, manifest))
        generators = manifest.ranks[rank % len(manifest.ranks)].rng if manifest.ranks else None
        reader.plan(generators)
        reader.fetch()
        states = {name: reader.value(tree) for name, tree in trees.items()}
        return states, reader.value(generators), manifest

    def _regions(self, value: Any, tree: Any, manifest: StateManifest) -> dict[str, Any]:
        if self._group is None:
            return {}
        from spotfirst.distributed.collecting import regions_of

        return dict(regions_of(value, tree, manifest))

    def _load_local(
        self, local: Tier, tier: Tier, layout: tuple[dict[str, Any], list[Leaf]]
    ) -> Restored[tuple[dict[str, Any], Any, StateManifest]] | None:
        """What lies on the local disk, when it is the run's newest state and whole."""
        commit = usable_commit(local.chain, tier.chain)
        if commit is None:
            return None
        try:
            value = self._read(local.packs, commit, layout)
        except (CorruptObject, ObjectMissing, StateMismatch) as error:
            self._reporter.warn(f"the checkpoint on the local disk cannot be used: {error}")
            return None
        newest = tier.chain.newest()
        seq = newest[0] if newest is not None and newest[1].step == commit.step else None
        local.known = {} if self._skipped else _known(Restored(value, commit, 1))
        return Restored(value, commit, seq)

    def _apply(self, restored: Restored[tuple[dict[str, Any], Any, StateManifest]] | None) -> int:
        assert self._saver is not None
        if restored is None:
            return 0
        assert self._refit is not None
        assert self._start is not None
        states, generators, manifest = restored.value
        for name, state in states.items():
            try:
                self._load(name, self._refit.renew(name, state))
            except Exception as error:
                msg = (
                    f"{name}.load_state_dict() refused the checkpoint of step "
                    f"{restored.commit.step}: {type(error).__name__}: {error}"
                )
                if self._strict:
                    raise StateMismatch(msg) from error
                self._skipped.append(msg)
        self._refit.settle()
        self._start.adopt(manifest.made)
        if self._trainable is not None:
            self._trainable.restore(manifest.made)
        for message in [*self._refit.notes, *restore_rng(generators)]:
            self._reporter.warn(message)
        step = restored.commit.step
        if self._skipped:
            shown = "".join(f"\n  - {problem}" for problem in self._skipped)
            self._reporter.warn(f"not all of the checkpoint of step {step} was restored:{shown}")
        self._adapt(manifest, generators, step)
        if restored.seq is not None:
            self._saver.newest_step = step
            self._reporter.tell(
                now=False, checkpoint_seq=restored.seq, checkpoint_step=step,
                restored_seq=restored.seq,
            )  # fmt: skip
        return step

    def _load(self, name: str, state: Any) -> None:
        value = self._objects[name]
        if isinstance(value, torch.nn.Module):
            load_module(value, state, strict=self._strict)
        else:
            value.load_state_dict(state)

    def _adapt(self, manifest: StateManifest, generators: Any, step: int) -> None:
        """Say what is another when the checkpoint is of another number of ranks."""
        stored = len(manifest.ranks)
        team = self._group or Team(0, 1)
        if stored in {0, team.size}:
            return
        reseed_rng(generators, f"{step} {team.rank} {team.size}")
        self._reporter.warn(
            f"the checkpoint is of {stored} ranks, and here are {team.size}: the random number "
            "generators are seeded anew, from it, and each rank has the samplers and other objects "
            f"of rank r % {stored}. Training goes on, and not as it would have with {stored}"
        )


def _state_of(value: Any) -> Any:
    return module_state(value) if isinstance(value, torch.nn.Module) else value.state_dict()


def _torch_parts(value: Any) -> list[Any]:
    """The modules and optimizers that an object stands for, as an integration says; or itself."""
    parts = getattr(value, "torch_parts", None)
    return [value] if parts is None else list(parts())


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's own plain tensors, by the names of :func:`walk_leaves`."""
    collector = _PlainTensors()
    tree = flatten(module_state(module), collector)
    return {
        name: collector.leaves[index].value
        for name, tag, index in walk_leaves(tree)
        if tag == "tensor" and index not in collector.skipped
    }


class _PlainTensors(TensorCollector):
    """Passes over sharded ones, which are told by their method, without importing their type."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: set[int] = set()

    def take(self, value: Any, path: object) -> dict[str, int] | None:
        if not hasattr(value, "to_local"):
            return super().take(value, path)
        self.skipped.add(len(self.leaves))
        return self._keep("tensor", Leaf("uint8", (), value))


def _known(restored: Restored[tuple[Any, Any, StateManifest]] | None) -> dict[str, Location]:
    """What the next checkpoint need not write: the chunks of the one that we restored."""
    if restored is None or restored.seq is None:
        return {}
    manifest = restored.value[2]
    return known_arrays(manifest.packs, manifest.arrays)


def _before_optimizer_steps(saver: Saver, gathering: Gathering) -> None:
    """Let every ``optimizer.step()`` of this process wait for what is still being copied.

    torch keeps the hook, so it must not keep the Checkpointer: one that is dropped frees its
    memory, and the model's.
    """
    saver_there, gathering_there = weakref.ref(saver), weakref.ref(gathering)

    def wait(*_: Any) -> None:
        saver, gathering = saver_there(), gathering_there()
        if saver is not None and gathering is not None:
            gathering.optimizer_steps()
            saver.wait_copied()

    handle = register_optimizer_step_pre_hook(wait)
    weakref.finalize(saver, handle.remove)
