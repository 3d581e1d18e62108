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

Not restored: the losses since the last logged step, which go into the next logged mean.
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
from spotfirst.errors import InvalidSpec
from spotfirst.integrations.dataloader import ResumableLoader

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState
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
        state = _TrainerState(trainer)
        scaler = getattr(trainer.accelerator, "scaler", None)
        others = {"scaler": scaler} if scaler is not None else {}
        self._checkpointer = Checkpointer(
            model=trainer.model,
            optimizer=optimizer,
            scheduler=scheduler,
            loader=loader,
            trainer=state,
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
        in_epoch = self._done % steps_per_epoch
        batches.drops = in_epoch * trainer.args.gradient_accumulation_steps
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

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.restored: str | None = None

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        stateful: dict[str, list[Any]] = {}
        for callback in [*trainer.callback_handler.callbacks, trainer.control]:
            if isinstance(callback, ExportableState):
                stateful.setdefault(type(callback).__name__, []).append(callback.state())
        state = dataclasses.asdict(dataclasses.replace(trainer.state, stateful_callbacks=stateful))
        return {"trainer_state.json": json.dumps(state)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = state["trainer_state.json"]


class _Batches(IterableDataset[Any]):
    """The batches as the Trainer counts them: it drops the used ones of an epoch by itself."""

    def __init__(self, loader: ResumableLoader, is_over: Callable[[], bool]) -> None:
        self._loader = loader
        self._is_over = is_over
        self.drops = 0

    def __iter__(self) -> Iterator[Any]:
        drops, self.drops = self.drops, 0
        yield from [None] * drops
        if not self._is_over():
            yield from self._loader

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(epoch)


class _Loader(DataLoader[Any]):
    """What the Trainer takes for its data loader. It draws nothing from the global generators."""

    def __init__(self, batches: _Batches) -> None:
        super().__init__(batches, batch_size=None, generator=torch.Generator())

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)  # type: ignore[attr-defined]


def _num_examples(original: Any, data: Any, inner: Any) -> Any:
    return lambda loader: original(inner if loader is data else loader)


def _check(trainer: Any) -> None:
    if trainer.model_init is not None:
        msg = "the Trainer would make the model again, with model_init: give it model= instead"
        raise InvalidSpec(msg)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        msg = "DeepSpeed and FSDP in the Trainer are not supported: train without them"
        raise InvalidSpec(msg)
