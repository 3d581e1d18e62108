"""Spotfirst in the Trainer of Hugging Face: one line.

::

    trainer = Trainer(model, args, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=resume(trainer))

``TrainingArguments(save_strategy="no")``, as the Trainer's own checkpoints are not needed. What is
saved: model, optimizer, scheduler, gradient scaler, the state of the Trainer and of its callbacks,
and the position in the training data. A step is over when it was logged and evaluated: there
checkpoints are taken, and there the Trainer leaves when a notice came
(:class:`~spotfirst.checkpointer.Drained` passes through ``train``; the process exits with 0).

A callback alone cannot do that: the Trainer decides where to begin before it calls any. So
:func:`resume` makes optimizer and scheduler as ``train`` would, restores them, and hands the
Trainer a folder with nothing but its ``trainer_state.json``.

With ``load_best_model_at_end`` the files of the best model are part of the checkpoint: they are
written again to where they were. The private attributes of the Trainer that are used are those of
``tests/integrations/test_pinned.py``.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from spotfirst.checkpointer import Checkpointer
from spotfirst.errors import InvalidSpec, StateMismatch
from spotfirst.integrations.dataloader import ResumableLoader

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import has_length
except ImportError as error:
    msg = (
        "spotfirst.integrations.huggingface needs transformers: "
        "pip install 'transformers>=5' accelerate"
    )
    raise ImportError(msg, name="transformers") from error

__all__ = ["SpotfirstCallback", "resume"]


def resume(trainer: Any, **options: Any) -> str | None:
    """Restore ``trainer``: what to give to ``train(resume_from_checkpoint=…)``, once.

    ``options`` are those of :class:`SpotfirstCallback`, which is added to the Trainer unless it
    has one. Raises as :meth:`~spotfirst.checkpointer.Checkpointer.restore` does.
    """
    callbacks = [c for c in trainer.callback_handler.callbacks if isinstance(c, SpotfirstCallback)]
    if not callbacks:
        callbacks = [SpotfirstCallback(**options)]
        trainer.add_callback(callbacks[0])
    return callbacks[0].restore(trainer)


class SpotfirstCallback(TrainerCallback):
    """Checkpoints at step boundaries, and leaves there when it is asked to; see :func:`resume`.

    ``replay=False`` skips the used batches of an epoch without reading them, as the Trainer does
    by itself; then what the dataset or the collator draws at random is not what it would have been.
    ``options`` are those of the :class:`~spotfirst.checkpointer.Checkpointer`, such as ``period_s``
    and ``storage``.
    """

    def __init__(self, *, replay: bool = True, **options: Any) -> None:
        self._replay = replay
        self._options = options
        self._checkpointer: Checkpointer | None = None
        self._due: int | None = None
        self._total = 0
        self._state: _TrainerState | None = None

    def restore(self, trainer: Any) -> str | None:
        """As :func:`resume`."""
        _check(trainer)
        inner = trainer.get_train_dataloader()
        loader = ResumableLoader(inner, skip=self._skip(), before_fetch=self._boundary)
        batches = _Batches(loader, self._is_over)
        data = _Loader(batches)
        trainer.get_train_dataloader = lambda: data
        trainer.num_examples = _num_examples(trainer.num_examples, data, inner)
        _, steps_per_epoch, *_, self._total = trainer.set_initial_training_values(
            trainer.args, data
        )
        optimizer = trainer.create_optimizer()
        scheduler = trainer.create_scheduler(self._total, optimizer)
        trainer._created_lr_scheduler = False  # as if they had been given to it: it keeps them
        best = _BestModel(trainer)
        state = self._state = _TrainerState(trainer, best)
        scaler = getattr(trainer.accelerator, "scaler", None)
        others = {"scaler": scaler} if scaler is not None else {}
        self._checkpointer = Checkpointer(
            model=trainer.model,
            optimizer=optimizer,
            scheduler=scheduler,
            loader=loader,
            trainer=state,
            best=best,
            total_steps=self._total,
            **others,
            **self._options,
        )
        self._done = self._checkpointer.restore()
        if state.restored is None:
            return None
        # All is loaded, so there is nothing for it to find in the folder but its own state.
        trainer._load_from_checkpoint = lambda *_, **__: None
        trainer.args.restore_callback_states_from_checkpoint = True
        trainer.args.ignore_data_skip = False
        trainer.args.eval_on_start = False
        in_epoch = self._done % steps_per_epoch
        batches.drops = in_epoch * trainer.args.gradient_accumulation_steps
        if has_length(inner) and loader.fetched not in (0, batches.drops):
            before = loader.fetched / in_epoch if in_epoch else 0
            msg = (
                f"the checkpoint is {loader.fetched} batches into an epoch, of {in_epoch} steps of "
                f"about {before:g} batches, and gradient_accumulation_steps is "
                f"{trainer.args.gradient_accumulation_steps} here: go on with the old value"
            )
            raise StateMismatch(msg)
        if not has_length(inner):
            batches.first_epoch = loader.epoch  # the Trainer takes it all for one epoch
        folder = Path(tempfile.mkdtemp(prefix="spotfirst-resume-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        (folder / "trainer_state.json").write_text(state.restored)
        return str(folder)

    # -- the Trainer's events ---------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse to train what was not restored."""
        if self._checkpointer is None:
            msg = (
                "SpotfirstCallback: begin with trainer.train(resume_from_checkpoint=resume(trainer)), "
                "with spotfirst.integrations.huggingface.resume"
            )
            raise InvalidSpec(msg)
        if self._state is not None:
            self._state.restore_sums()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Count the step; it is over when the next batch is asked for."""
        self._done = self._due = state.global_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Report what is logged."""
        if self._checkpointer is not None:
            numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float))}
            self._checkpointer.report(**numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Complete the last checkpoint."""
        self._boundary()
        if self._checkpointer is not None:
            self._checkpointer.close()

    # -- a step -----------------------------------------------------------------------------

    def _boundary(self) -> None:
        done, self._due = self._due, None
        if done is not None and self._checkpointer is not None:
            self._checkpointer.step(done)

    def _is_over(self) -> bool:
        return 0 < self._total <= self._done

    def _skip(self) -> Any:
        if self._replay:
            return None
        from accelerate import skip_first_batches

        return skip_first_batches


class _TrainerState:
    """The Trainer's own state, in the words of its ``trainer_state.json``."""

    def __init__(self, trainer: Any, best: _BestModel) -> None:
        self._trainer = trainer
        self._best = best
        self.restored: str | None = None
        self._sums: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        trainer.store_flos()
        found: dict[str, list[Any]] = {}
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                found.setdefault(type(callback).__name__, []).append(callback.state())
        # As the Trainer keeps them: it would go on to append to a list of one.
        stateful = {k: states if len(states) > 1 else states[0] for k, states in found.items()}
        state = dataclasses.asdict(dataclasses.replace(trainer.state, stateful_callbacks=stateful))
        sums = {name: getattr(trainer, name) for name in _SUMS if hasattr(trainer, name)}
        return {"trainer_state.json": json.dumps(state), "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        restored = json.loads(state["trainer_state.json"])
        if restored["best_model_checkpoint"]:
            restored["best_model_checkpoint"] = self._best.place(restored["best_model_checkpoint"])
        self.restored, self._sums = json.dumps(restored), state["sums"]

    def restore_sums(self) -> None:
        """The losses since the last log, and over the whole training."""
        for name, value in self._sums.items():
            moved = value.to(self._trainer.args.device) if hasattr(value, "to") else value
            setattr(self._trainer, name, moved)
        self._sums = {}


class _BestModel:
    """The files of the best model so far, for ``load_best_model_at_end``."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._folder = ""
        self._files: dict[str, torch.Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        args, folder = self._trainer.args, self._trainer.state.best_model_checkpoint
        if not args.load_best_model_at_end or not folder:
            return {"folder": "", "files": {}}
        if folder != self._folder:
            self._files = {
                path.name: torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
                for path in sorted(Path(folder).iterdir())
                if path.is_file() and path.stat().st_size and _is_of_model(path.name)
            }
            self._folder = folder
        return {"folder": folder, "files": self._files}

    def place(self, folder: str) -> str:
        """Where this training has that folder: in its own output_dir, wherever that is now."""
        return str(Path(self._trainer.args.output_dir) / Path(folder).name)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state["folder"]:
            return
        folder = Path(self.place(state["folder"]))
        names = [folder.name, *state["files"]]
        odd = [name for name in names if Path(name).name != name or not _is_of_model(name)]
        if odd or not folder.name.startswith("checkpoint-"):
            msg = f"the checkpoint has files of the best model with odd names: {names[:5]}"
            raise StateMismatch(msg)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in state["files"].items():
            (folder / name).write_bytes(content.numpy().tobytes())
        self._folder, self._files = str(folder), state["files"]


def _is_of_model(name: str) -> bool:
    return not name.startswith(
        ("optimizer.", "scheduler.", "scaler.", "rng_state", "training_args.")
    )


class _Batches(IterableDataset[Any]):
    """The batches as the Trainer counts them: it drops the used ones of an epoch by itself."""

    def __init__(self, loader: ResumableLoader, is_over: Callable[[], bool]) -> None:
        self._loader = loader
        self._is_over = is_over
        self.drops = 0
        self.first_epoch = 0

    def __iter__(self) -> Iterator[Any]:
        drops, self.drops = self.drops, 0
        yield from [None] * drops
        if not self._is_over():
            yield from self._loader

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(self.first_epoch + epoch)


class _Loader(DataLoader[Any]):
    """What the Trainer takes for its data loader. It draws nothing from the global generators."""

    def __init__(self, batches: _Batches) -> None:
        super().__init__(batches, batch_size=None, generator=torch.Generator())

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]


def _num_examples(original: Any, data: Any, inner: Any) -> Any:
    return lambda loader: original(inner if loader is data else loader)


_SUMS = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_initial_global_step")


def _check(trainer: Any) -> None:
    if trainer.args.auto_find_batch_size:
        msg = (
            "auto_find_batch_size=True tries other batch sizes whenever memory is short, and a run "
            "has one: set it to False, and per_device_train_batch_size to what it finds"
        )
        raise InvalidSpec(msg)
    if trainer.model_init is not None:
        msg = "the Trainer would make the model again, with model_init: give it model= instead"
        raise InvalidSpec(msg)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        msg = "DeepSpeed and FSDP in the Trainer are not supported: train without them"
        raise InvalidSpec(msg)
