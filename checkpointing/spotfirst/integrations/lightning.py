"""Spotfirst in Lightning: one callback.

::

    trainer = Trainer(callbacks=[SpotfirstCallback()], enable_checkpointing=False)
    trainer.fit(model, loader)

It comes first among the callbacks, so that theirs is restored before they begin to work. What is
saved: the module, optimizers, schedulers, the precision's scaler, the fit loop's progress, the
states of other callbacks and of the data module, and the position in the training data. A step is
over when its validation and its callbacks are: there checkpoints are taken, and there the trainer
leaves when a notice came (:class:`~spotfirst.checkpointer.Drained` passes through ``fit``; the
process exits with 0).

Not restored: the means over an epoch that ``self.log(on_epoch=True)`` is still collecting. Nor do
Lightning's own checkpoints have them.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from spotfirst.checkpointer import Checkpointer
from spotfirst.errors import InvalidSpec
from spotfirst.integrations.dataloader import ResumableLoader

try:
    from lightning.pytorch import Callback
except ImportError as error:
    msg = "spotfirst.integrations.lightning needs Lightning: pip install lightning"
    raise ImportError(msg, name="lightning") from error

__all__ = ["SpotfirstCallback"]


class SpotfirstCallback(Callback):
    """Restores when ``fit`` begins, checkpoints at step boundaries, leaves when it is asked to.

    ``options`` are those of the :class:`~spotfirst.checkpointer.Checkpointer`, such as
    ``period_s`` and ``storage``. A step is one of ``trainer.global_step``.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._checkpointer: Checkpointer | None = None
        self._loaders: list[ResumableLoader] = []
        self._seen = 0
        self._due: int | None = None

    # -- Lightning's hooks ------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have the training data's position kept, wherever its loaders come from."""
        if stage != "fit":
            return
        process = trainer.strategy.process_dataloader

        def resumable(loader: Any) -> Any:
            loader = process(loader)
            if not trainer.training:
                return loader
            mine = ResumableLoader(
                loader, before_fetch=self._boundary, ahead=lambda: _ahead(trainer, mine)
            )
            self._loaders.append(mine)
            return mine

        trainer.strategy.process_dataloader = resumable

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore, after the optimizers were made and before anything was trained."""
        if trainer.ckpt_path is not None:
            msg = (
                "fit(ckpt_path=…) would overwrite what Spotfirst restores: load those weights into "
                "the module instead, with load_from_checkpoint()"
            )
            raise InvalidSpec(msg)
        optimizers = _numbered("optimizer", trainer.optimizers)
        schedulers = _numbered("scheduler", [c.scheduler for c in trainer.lr_scheduler_configs])
        self._checkpointer = Checkpointer(
            model=pl_module,
            trainer=_TrainerState(self, trainer, self._loaders),
            **optimizers,
            **schedulers,
            **self._options,
        )
        self._seen = self._checkpointer.restore()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Say how many steps there will be, which only now is known."""
        total = trainer.estimated_stepping_batches
        if self._checkpointer is not None and 0 < total < math.inf:
            self._checkpointer.expect(int(total))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, if the optimizer made one; it is over when the next batch is asked for."""
        if trainer.global_step != self._seen:
            self._seen = self._due = trainer.global_step
            self._report(trainer, outputs)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Complete the last checkpoint: it has the weights as other callbacks left them."""
        self._boundary()
        if self._checkpointer is not None:
            self._checkpointer.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the strategy as it was."""
        vars(trainer.strategy).pop("process_dataloader", None)

    # -- a step -----------------------------------------------------------------------------

    def _boundary(self) -> None:
        done, self._due = self._due, None
        if done is not None and self._checkpointer is not None:
            self._checkpointer.step(done)

    def _report(self, trainer: Any, outputs: Any) -> None:
        assert self._checkpointer is not None
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        metrics = {"loss": loss} if isinstance(loss, torch.Tensor) else {}
        metrics |= trainer.callback_metrics
        self._checkpointer.report(**{k: v for k, v in metrics.items() if v.numel() == 1})


class _TrainerState:
    """What Lightning keeps beside the module and its optimizers."""

    def __init__(
        self, own: SpotfirstCallback, trainer: Any, loaders: list[ResumableLoader]
    ) -> None:
        self._trainer = trainer
        self._loaders = loaders
        self._others = {c.state_key: c for c in trainer.callbacks if c is not own}

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        extra: dict[str, Any] = {}
        trainer.lightning_module.on_save_checkpoint(extra)
        return {
            "fit_loop": trainer.fit_loop.state_dict(),
            "callbacks": {key: callback.state_dict() for key, callback in self._others.items()},
            "precision": trainer.precision_plugin.state_dict(),
            "data": trainer.datamodule.state_dict() if trainer.datamodule else {},
            "module": extra,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        trainer = self._trainer
        # Loaders that are made from here on, Lightning positions by itself.
        positions = state["fit_loop"]["state_dict"].get("combined_loader", [])
        for loader, position in zip(self._loaders, positions, strict=False):
            loader.load_state_dict(position)
        trainer.fit_loop.load_state_dict(state["fit_loop"])
        for key, saved in state["callbacks"].items():
            if saved and key in self._others:
                self._others[key].load_state_dict(saved)
        trainer.precision_plugin.load_state_dict(state["precision"])
        if trainer.datamodule and state["data"]:
            trainer.datamodule.load_state_dict(state["data"])
        if state["module"]:
            trainer.lightning_module.on_load_checkpoint(state["module"])


def _ahead(trainer: Any, loader: ResumableLoader) -> int:
    """Of data without a length Lightning reads one batch ahead, to know which is the last."""
    try:
        len(loader)
    except TypeError:
        used: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return max(0, loader.fetched - used)
    return 0


def _numbered(name: str, values: list[Any]) -> dict[str, Any]:
    if len(values) == 1:
        return {name: values[0]}
    return {f"{name}_{number}": value for number, value in enumerate(values)}
