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
from collections.abc import Callable, Iterator
from typing import Any

import torch  # noqa: TID253 - the Checkpointer is the part of Spotfirst that needs it

from spotfirst.checkpoints.blobs import BlobStore
from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.claiming import wait_for_claim
from spotfirst.checkpoints.manifest import ArrayRef, PartReader, StateManifest, read_manifest
from spotfirst.checkpoints.restoring import Restored, load_newest
from spotfirst.checkpoints.rng import as_stateful, cuda_in_use, restore_rng, rng_state
from spotfirst.checkpoints.saving import Saved, Saver, Snapshot
from spotfirst.checkpoints.statetree import Leaf, flatten, walk_leaves
from spotfirst.checkpoints.tensors import Buffers, TensorCollector, load_tree
from spotfirst.checkpoints.weights import weights_sha256
from spotfirst.context import TrainerContext
from spotfirst.errors import ClaimLost, InvalidSpec, StateMismatch
from spotfirst.leaving import Drained, Superseded
from spotfirst.patience import Sleep, patiently
from spotfirst.reporting import ProgressReporter
from spotfirst.wire import Clock, utc_now

__all__ = ["Checkpointer", "Drained", "Superseded", "weights_sha256"]

_log = logging.getLogger(__name__)

_PERIOD_VARIABLE = "SPOTFIRST_CHECKPOINT_PERIOD_S"
_DEFAULT_PERIOD_S = 300.0


class Checkpointer:
    """Saves and restores ``objects``, the random number generators and the step.

    ``objects`` have ``state_dict`` and ``load_state_dict`` (module, optimizer, scheduler, sampler,
    gradient scaler, …) or are generators (:class:`torch.Generator`, :class:`random.Random`, NumPy).
    Build them as for a fresh start, with the seeds set before; restoring overwrites them.

    ``period_s`` is the time from one checkpoint to the next (``SPOTFIRST_CHECKPOINT_PERIOD_S``, or
    300). ``storage`` is for training on one's own, outside of a run: a folder or URL that keeps
    the checkpoints. Without it, and outside of a run, training runs without checkpoints.
    ``context``, ``clock``, ``monotonic`` and ``sleep`` are for tests.
    """

    def __init__(
        self,
        *,
        period_s: float | None = None,
        total_steps: int | None = None,
        storage: str | None = None,
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
        self._period_s = _period(period_s)
        self._clock, self._monotonic, self._sleep = clock, monotonic, sleep
        self._context = context if context is not None else TrainerContext.find(storage)
        channel = self._context.channel if self._context else None
        self._channel = channel
        self._reporter = ProgressReporter(channel, clock=clock, monotonic=monotonic)
        self._reporter.tell(total_steps=total_steps)
        self._buffers = Buffers()
        self._saver: Saver | None = None
        self._step: int | None = None
        self._saved_at = 0.0
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
        layout = self._collect(None)  # refuses now what no checkpoint could hold
        run, channel = self._context.run, self._channel
        chain = run.chain()
        self._reporter.stamp("standby", phase="standby")
        attempt = self._context.attempt
        resume_from = None
        if attempt is None:
            attempt = (patiently(chain.refresh, what="read the run").holder or 0) + 1
            patiently(lambda: chain.claim(attempt), what="claim the run")
        else:
            spec = patiently(run.spec, what="read the run's spec", sleep=self._sleep)
            resume_from = spec.resume_from
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
        blobs = BlobStore(run.blobs())
        restored = patiently(
            lambda: load_newest(
                run, chain, blobs, lambda source, commit: self._read(source, commit, layout),
                content="state", resume_from=resume_from, warn=self._reporter.warn,
            ),
            what="read the checkpoint", sleep=self._sleep, warn=self._reporter.warn,
        )  # fmt: skip
        self._saver = Saver(
            blobs, chain, attempt, on_saved=self._on_saved, warn=self._reporter.warn,
            monotonic=self._monotonic, sleep=self._sleep,
        )  # fmt: skip
        self._step = self._apply(restored)
        if restored is None:
            # The S3 client's imports draw from Python's global one (rich names its styles so).
            restore_rng(generators)
        self._saved_at = self._monotonic()
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
            if done == self._reporter.progress.total_steps:
                return  # close() follows: it saves, and then there is nothing to hand over
            if self._channel is not None and self._channel.drain() is not None:
                self._drain(done)
        except ClaimLost as error:
            raise self._superseded(error) from error
        if self._monotonic() - self._saved_at >= self._period_s:
            self.save(wait=False)

    def save(self, *, wait: bool = True) -> bool:
        """Checkpoint the step last finished, now; whether a save was begun (or was not needed).

        With ``wait``, it is complete on return, and what went wrong is raised. Without, nothing
        happens while another save is running.
        """
        saver, step = self._saver, self._step
        if saver is None or step is None:
            return False
        self._saved_at = self._monotonic()
        if saver.busy and not wait:
            self._reporter.warn(
                f"a checkpoint takes longer than its period of {self._period_s:g} s: one was "
                "skipped. Training goes on, and a kill without notice can lose more than that"
            )
            return False
        try:
            if not wait:
                saver.check()
                saver.start(self._snapshot(step))
                return True
            saver.finish()
            if saver.newest_step != step:
                saver.start(self._snapshot(step))
                error = saver.finish()
                if error is not None:
                    raise error
        except ClaimLost as error:
            raise self._superseded(error) from error
        return True

    def close(self) -> None:
        """Complete the checkpoint of the step last finished, and tell the agent the last word."""
        if self._left is None:
            self.save(wait=True)
            self._reporter.tell(step=self._step, metrics=self._reporter.metrics())

    # -- leaving ----------------------------------------------------------------------------

    def _drain(self, step: int) -> None:
        assert self._saver is not None
        self._reporter.stamp(
            "last_step", phase="draining", step=step, metrics=self._reporter.metrics()
        )
        _log.info("asked to stop: taking a last checkpoint, of step %d", step)
        try:
            self.save(wait=True)
        except Exception as error:  # noqa: BLE001 - the previous checkpoint stays the newest
            self._reporter.warn(f"the last checkpoint, of step {step}, could not be saved: {error}")
        self._saver.release()
        raise self._drained(step)

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
        started = self._monotonic()
        if cuda_in_use():
            torch.cuda.synchronize()  # side streams too have to be done with this step
        objects, rng, leaves = self._collect(self._buffers)
        return Snapshot(step, objects, rng, leaves, self._reporter.metrics(), started)

    def _collect(self, buffers: Buffers | None) -> tuple[dict[str, Any], Any, list[Leaf]]:
        # All states are alive until the last is copied: tied tensors are known by their address.
        states = {name: value.state_dict() for name, value in self._objects.items()}
        generators = rng_state()
        collector = TensorCollector(buffers)
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
        self, blobs: BlobStore, commit: Commit, layout: tuple[dict[str, Any], Any, list[Leaf]]
    ) -> tuple[dict[str, Any], Any]:
        """The states and generators of a checkpoint, whole and fitting, before any is loaded."""
        manifest = read_manifest(blobs, commit.manifest)
        if not isinstance(manifest, StateManifest):
            msg = f"the checkpoint of step {commit.step} holds files, not a training state"
            raise StateMismatch(msg)
        modules = {n for n, v in self._objects.items() if isinstance(v, torch.nn.Module)}
        problems = _differences(manifest, layout[0], layout[2], modules)
        if problems:
            shown = "".join(f"\n  - {problem}" for problem in problems[:20])
            more = f"\n  … and {len(problems) - 20} more" if len(problems) > 20 else ""
            msg = (
                f"the checkpoint of step {commit.step} does not fit these objects:{shown}{more}\n"
                "Build them as they were, or start a new run"
            )
            raise StateMismatch(msg)
        reader = PartReader(blobs, manifest.blobs)
        states = {
            name: load_tree(manifest.objects[name], manifest, reader) for name in self._objects
        }
        return states, load_tree(manifest.rng, manifest, reader)

    def _apply(self, restored: Restored[tuple[dict[str, Any], Any]] | None) -> int:
        assert self._saver is not None
        if restored is None:
            return 0
        states, generators = restored.value
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


def _period(period_s: float | None) -> float:
    value = period_s
    if value is None:
        text = os.environ.get(_PERIOD_VARIABLE, "")
        try:
            value = float(text) if text else _DEFAULT_PERIOD_S
        except ValueError as error:
            msg = f"{_PERIOD_VARIABLE} is {text!r}; give seconds, such as 300"
            raise InvalidSpec(msg) from error
    if not value >= 0:
        msg = f"the checkpoint period is {value}; give seconds, 0 for every step"
        raise InvalidSpec(msg)
    return value


def _check_world_size() -> None:
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size not in {"", "1"}:
        msg = (
            f"WORLD_SIZE is {world_size}: the Checkpointer saves the state of one process, and "
            "several would take the run from each other. Train with one process"
        )
        raise InvalidSpec(msg)


def _differences(
    manifest: StateManifest, objects: dict[str, Any], leaves: list[Leaf], modules: set[str]
) -> list[str]:
    """How a checkpoint differs from the objects at hand; arrays are compared for modules.

    An optimizer has no arrays yet before its first step: its own ``load_state_dict`` judges.
    """
    problems = [f"{name} is not in the checkpoint" for name in objects.keys() - manifest.objects]
    problems += [
        f"{name} is in the checkpoint, and was not given to the Checkpointer"
        for name in manifest.objects.keys() - objects
    ]
    for name in sorted(modules & manifest.objects.keys()):
        here = {path: leaves[index] for path, _, index in walk_leaves(objects[name])}
        there = {
            path: manifest.arrays[index]
            for path, _, index in walk_leaves(manifest.objects[name])
        }  # fmt: skip
        problems += [
            f"{name}: {path} is not in the checkpoint" for path in here if path not in there
        ]
        problems += [f"{name}: {path} is not in the model" for path in there if path not in here]
        problems += [
            f"{name}: {path} is {_form(here[path])} here and {_form(there[path])} in the checkpoint"
            for path in here.keys() & there.keys()
            if _form(here[path]) != _form(there[path])
        ]
    return sorted(problems)


def _form(array: Leaf | ArrayRef) -> str:
    return f"{array.dtype}{list(array.shape)}"
