"""The Checkpointer: three lines in a training loop, and the run survives any interruption.

::

    checkpointer = Checkpointer(model=model, optimizer=optimizer, scheduler=scheduler)
    for step in checkpointer.steps(total_steps):
        loss = train_one_step(step)
        checkpointer.report(loss=loss)

Everything happens at step boundaries, on the training thread: there the state is copied, and
there the loop is left when the agent asks for it. Hashing and writing run beside the training.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any, Literal

import torch  # noqa: TID253 - the Checkpointer is the part of Spotfirst that needs it
from torch.optim.optimizer import register_optimizer_step_pre_hook  # noqa: TID253

from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.claiming import wait_for_claim
from spotfirst.checkpoints.last import decide
from spotfirst.checkpoints.loading import StateReader, differences, stored_trees
from spotfirst.checkpoints.local import local_tier, usable_commit
from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.checkpoints.memory import Arena
from spotfirst.checkpoints.packs import Location, known_parts
from spotfirst.checkpoints.restoring import Restored, load_newest
from spotfirst.checkpoints.retention import Retention
from spotfirst.checkpoints.rng import as_stateful, cuda_in_use, restore_rng, rng_state
from spotfirst.checkpoints.saving import Saved, Saver, Tier
from spotfirst.checkpoints.schedule import Schedule
from spotfirst.checkpoints.snapshot import Snapshot, settled_until_step
from spotfirst.checkpoints.statetree import Leaf, flatten, walk_leaves
from spotfirst.checkpoints.tensors import TensorCollector
from spotfirst.checkpoints.weights import weights_sha256
from spotfirst.context import TrainerContext
from spotfirst.errors import ClaimLost, CorruptObject, InvalidSpec, ObjectMissing, StateMismatch
from spotfirst.leaving import Drained, Superseded
from spotfirst.patience import Sleep, patiently
from spotfirst.reporting import ProgressReporter
from spotfirst.storage import Storage
from spotfirst.wire import Clock, utc_now

__all__ = ["Checkpointer", "Drained", "Superseded", "weights_sha256"]

_log = logging.getLogger(__name__)


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
    goes there first, so that a process that is started again on this machine reads it from there.
    ``compress`` is for storages slower than some tens of MB/s; ``"auto"`` measures whether it pays.
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
        context: TrainerContext | None = None,
        clock: Clock = utc_now,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Sleep = time.sleep,
        **objects: Any,
    ) -> None:
        self._objects = {name: as_stateful(value) for name, value in objects.items()}
        unfit = [name for name, value in self._objects.items() if value is None]
        if unfit or not objects:
            msg = (
                f"Checkpointer: {', '.join(unfit) or 'no object'} has state_dict() and "
                "load_state_dict(); pass what training changes, such as model=model"
            )
            raise InvalidSpec(msg)
        self._clock, self._monotonic, self._sleep = clock, monotonic, sleep
        self._context = context if context is not None else TrainerContext.find(storage)
        channel = self._context.channel if self._context else None
        self._channel = channel
        self._reporter = ProgressReporter(channel, clock=clock, monotonic=monotonic)
        self._reporter.tell(total_steps=total_steps)
        self._schedule = Schedule(period_s, self._reporter, monotonic=monotonic)
        self._retention = retention
        self._lazy = lazy
        self._memory_bytes = memory_bytes
        self._local = local
        self._compress = compress
        self._arena = Arena()
        self._saver: Saver | None = None
        self._step: int | None = None
        self._left: Drained | Superseded | None = None

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

    def report(self, **metrics: Any) -> None:
        """Metrics of the current step: numbers, or tensors of one element."""
        self._reporter.measure(metrics)

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
        _check_world_size()
        generators = rng_state()
        layout = self._collect()  # refuses now what no checkpoint could hold
        run, channel = self._context.run, self._channel
        chain = run.chain()
        self._reporter.stamp("standby", phase="standby")
        attempt = self._context.attempt
        resume_from = None
        retention = self._retention
        if attempt is None:
            attempt = (patiently(chain.refresh, what="read the run").holder or 0) + 1
            patiently(lambda: chain.claim(attempt), what="claim the run")
        else:
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
            try:
                claimed = wait_for_claim(
                    run, chain, attempt, leave=lambda: channel is not None and bool(channel.drain()),
                    clock=self._clock, monotonic=self._monotonic, sleep=self._sleep,
                )  # fmt: skip
            except ClaimLost as error:
                raise self._superseded(error) from error
            if not claimed:
                raise self._drained(0)
        self._reporter.stamp("claimed")
        tier = Tier(
            run.packs(), chain, attempt, chain.claims[-1], retention=retention or Retention(),
            pinned=run.pinned,
        )  # fmt: skip
        local = local_tier(run, attempt, tier.claim, self._local)
        restored = self._load_local(local, tier, layout) if local else None
        if restored is None:
            restored = patiently(
                lambda: load_newest(
                    run, chain, lambda packs, commit: self._read(packs, commit, layout),
                    content="state", resume_from=resume_from, warn=self._reporter.warn,
                ),
                what="read the checkpoint", sleep=self._sleep, warn=self._reporter.warn,
            )  # fmt: skip
            tier.known = _known(restored)
        self._saver = Saver(
            [local, tier] if local else [tier], on_saved=self._on_saved, warn=self._reporter.warn,
            compress=self._compress, monotonic=self._monotonic, sleep=self._sleep,
        )  # fmt: skip
        _before_optimizer_steps(self._saver)
        self._step = self._apply(restored)
        if restored is None:
            # The S3 client's imports draw from Python's global one (rich names its styles so).
            restore_rng(generators)
        self._schedule.start()
        self._reporter.stamp("restored", phase="training", start_step=self._step, step=self._step)
        if channel is not None and channel.drain() is not None:
            self._saver.release()
            raise self._drained(self._step)
        return self._step

    def step(self, done: int, **metrics: Any) -> None:
        """Say that ``done`` steps are finished, from 0 on; call it after every step.

        Here a checkpoint is begun when its time has come, and here the loop is left: raises
        :class:`Drained` when the agent asks for it, after a last checkpoint of this very step,
        and :class:`Superseded` when a newer attempt has taken over.
        """
        if self._step is None:
            msg = "call restore() before the first step(); steps() does it by itself"
            raise InvalidSpec(msg)
        if self._left is not None:  # a bare `except:` has swallowed it
            raise self._left
        self._step = done
        self.report(**metrics)
        self._tell_step(done)
        if self._saver is None:
            return
        try:
            self._saver.check()
            self._schedule.boundary(self._saver)
            if done == self._reporter.progress.total_steps:
                return  # close() follows: it saves, and then there is nothing to hand over
            drain = self._channel.drain() if self._channel is not None else None
            if drain is not None:
                self._drain(done, drain.by)
        except ClaimLost as error:
            raise self._superseded(error) from error
        if self._schedule.is_due(self._saver):
            self.save(wait=False)

    def save(self, *, wait: bool = True) -> bool:
        """Checkpoint the step last finished, now; whether a save was begun (or was not needed).

        With ``wait``, it is complete on return, and what went wrong is raised. Without, nothing
        happens while another save is running.
        """
        saver, step = self._saver, self._step
        if saver is None or step is None:
            return False
        if saver.busy and not wait:
            return False
        try:
            if not wait:
                saver.check()
                started = self._monotonic()
                saver.start(self._snapshot(step))
                self._schedule.begun(step, saver, since_s=started)
                return True
            saver.finish()
            if saver.newest_step != step:
                saver.start(self._snapshot(step))
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

    # -- leaving ----------------------------------------------------------------------------

    def _drain(self, step: int, by: datetime | None) -> None:
        """Leave, after a last checkpoint if it can be stored ``by`` then."""
        assert self._saver is not None
        self._reporter.stamp(
            "last_step", phase="draining", step=step, metrics=self._reporter.metrics()
        )
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
                saver.start(self._snapshot(step))
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

    def _snapshot(self, step: int) -> Snapshot:
        assert self._saver is not None
        started = self._monotonic()
        self._lazy = self._lazy and not self._saver.was_torn
        if cuda_in_use():
            torch.cuda.synchronize()  # side streams too have to be done with this step
        objects, rng, leaves = self._collect()
        settled = settled_until_step(self._objects.values()) if self._lazy else frozenset()
        return Snapshot(
            step=step, objects=objects, ranked={}, rng=rng, leaves=leaves, settled=settled,
            metrics=self._reporter.metrics(), taken_at=started, arena=self._arena,
            memory_bytes=self._memory_bytes,
        )  # fmt: skip

    def _collect(self) -> tuple[dict[str, Any], Any, list[Leaf]]:
        # All states are alive until the last is taken: tied tensors are known by their address.
        states = {name: value.state_dict() for name, value in self._objects.items()}
        generators = rng_state()
        collector = TensorCollector()
        objects = {name: flatten(state, collector, name) for name, state in states.items()}
        return objects, flatten(generators, collector, "rng"), collector.leaves

    def _on_saved(self, saved: Saved) -> None:
        self._reporter.tell(
            checkpoint_seq=saved.seq, checkpoint_step=saved.step, checkpoint_s=saved.took_s
        )

    def _tell_step(self, done: int) -> None:
        if self._reporter.progress.timings.first_step is None:
            self._reporter.stamp(
                "first_step", "last_step", step=done, metrics=self._reporter.metrics()
            )
        elif done == self._reporter.progress.total_steps or self._reporter.due:
            self._reporter.stamp("last_step", step=done, metrics=self._reporter.metrics())

    # -- restoring --------------------------------------------------------------------------

    def _read(
        self, packs: Storage, commit: Commit, layout: tuple[dict[str, Any], Any, list[Leaf]]
    ) -> tuple[dict[str, Any], Any, StateManifest]:
        """The states and generators of a checkpoint, whole and fitting.

        What fits goes to the memory of the modules as it is read.
        """
        manifest = read_manifest(packs, commit.manifest, commit.digest)
        if not isinstance(manifest, StateManifest):
            msg = f"the checkpoint of step {commit.step} holds files, not a training state"
            raise StateMismatch(msg)
        modules = {n: v for n, v in self._objects.items() if isinstance(v, torch.nn.Module)}
        problems = differences(manifest, layout[0], layout[2], modules.keys())
        if problems:
            shown = "".join(f"\n  - {problem}" for problem in problems[:20])
            more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
            msg = (
                f"the checkpoint of step {commit.step} does not fit these objects:{shown}{more}\n"
                "Build them as they were, or start a new run"
            )
            raise StateMismatch(msg)
        trees = stored_trees(manifest)
        reader = StateReader(packs, manifest)
        for name in self._objects:
            targets = _tensors(modules[name]) if name in modules else {}
            reader.plan(trees[name], targets)
        generators = manifest.ranks[0].rng if manifest.ranks else None
        reader.plan(generators)
        reader.fetch()
        states = {name: reader.value(trees[name]) for name in self._objects}
        return states, reader.value(generators), manifest

    def _load_local(
        self, local: Tier, tier: Tier, layout: tuple[dict[str, Any], Any, list[Leaf]]
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
        local.known = _known(Restored(value, commit, 1))
        return Restored(value, commit, seq)

    def _apply(self, restored: Restored[tuple[dict[str, Any], Any, StateManifest]] | None) -> int:
        assert self._saver is not None
        if restored is None:
            return 0
        states, generators, _ = restored.value
        for name, state in states.items():
            try:
                self._objects[name].load_state_dict(state)
            except Exception as error:
                msg = (
                    f"{name}.load_state_dict() refused the checkpoint of step "
                    f"{restored.commit.step}: {type(error).__name__}: {error}"
                )
                raise StateMismatch(msg) from error
        for message in restore_rng(generators):
            self._reporter.warn(message)
        step = restored.commit.step
        if restored.seq is not None:
            self._saver.newest_step = step
            self._reporter.tell(now=False, checkpoint_seq=restored.seq, checkpoint_step=step)
        return step


def _check_world_size() -> None:
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size not in {"", "1"}:
        msg = (
            f"WORLD_SIZE is {world_size}: the Checkpointer saves the state of one process, and "
            "several would take the run from each other. Train with one process"
        )
        raise InvalidSpec(msg)


def _tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's own tensors, by the names of :func:`walk_leaves`."""
    collector = TensorCollector()
    tree = flatten(module.state_dict(), collector)
    return {
        name: collector.leaves[index].value
        for name, tag, index in walk_leaves(tree)
        if tag == "tensor"
    }


def _known(restored: Restored[tuple[Any, Any, StateManifest]] | None) -> dict[str, Location]:
    """What the next checkpoint need not write: the chunks of the one that we restored."""
    if restored is None or restored.seq is None:
        return {}
    manifest = restored.value[2]
    parts = (part for a in manifest.arrays for region in a.regions for part in region.parts)
    return known_parts(manifest.packs, parts)


def _before_optimizer_steps(saver: Saver) -> None:
    """Let every ``optimizer.step()`` of this process wait for what is still being copied."""
    reference = weakref.ref(saver)

    def wait(*_: Any) -> None:
        alive = reference()
        if alive is not None:
            alive.wait_copied()

    handle = register_optimizer_step_pre_hook(wait)
    weakref.finalize(saver, handle.remove)
