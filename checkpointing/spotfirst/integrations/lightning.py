"""Spotfirst in Lightning: one callback.

::

    trainer = Trainer(callbacks=[SpotfirstCallback()], enable_checkpointing=False)
    trainer.fit(model, loader)

It acts before the other callbacks, wherever it is among them. What is saved is the dictionary of Lightning's own checkpoints,
as Lightning makes it: callbacks, modules and data modules get their hooks, and may change it. It is
restored by Lightning too, at the moments at which it restores its own. Optimizers and schedulers of
a script that has changed follow the rule of every Checkpointer: parameters by name, and new
hyperparameters win (:mod:`spotfirst.checkpoints.optimizers`). Beside the dictionary are saved the
position in the training data, the means that ``self.log(on_epoch=True)`` and metrics are still
collecting, and what callbacks have set on the module and the trainer: which parameters are frozen
or pruned, how many batches are accumulated, and whether training is to stop.

A step is over when its validation and its callbacks are: there checkpoints are taken, and there the
trainer leaves when a notice came (:class:`~spotfirst.checkpointer.Drained` passes through ``fit``;
the process exits with 0).

The private attributes of Lightning that are used are those of ``tests/integrations/test_pinned.py``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import torch
from torch.nn.utils import prune

from spotfirst.checkpointer import Checkpointer
from spotfirst.checkpoints.loading import misfit
from spotfirst.checkpoints.manifest import Made
from spotfirst.checkpoints.optimizers import Refit, Start
from spotfirst.checkpoints.rng import restore_rng, rng_state
from spotfirst.checkpoints.statetree import flatten, unflatten
from spotfirst.checkpoints.tensors import TensorCollector
from spotfirst.errors import InvalidSpec, SpotfirstError, StateMismatch
from spotfirst.integrations.dataloader import ResumableLoader

try:
    from lightning.fabric.utilities.data import sized_len
    from lightning.pytorch import Callback
    from lightning.pytorch.callbacks import (
        BatchSizeFinder,
        GradientAccumulationScheduler,
        LearningRateFinder,
        ModelPruning,
        StochasticWeightAveraging,
    )
except ImportError as error:
    msg = "spotfirst.integrations.lightning needs Lightning: pip install lightning"
    raise ImportError(msg, name="lightning") from error

__all__ = ["SpotfirstCallback"]


class SpotfirstCallback(Callback):
    """Restores when ``fit`` begins, checkpoints at step boundaries, leaves when it is asked to.

    ``options`` are those of the :class:`~spotfirst.checkpointer.Checkpointer`, such as
    ``period_s`` and ``storage``. A step is one of ``trainer.global_step``. Raises
    :class:`InvalidSpec` in ``fit`` for what cannot be resumed, before anything is trained.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._checkpointer: Checkpointer | None = None
        self._loaders: list[ResumableLoader] = []
        self._positions: list[dict[str, Any]] = []
        self._state: _TrainerState | None = None
        self._seen = 0
        self._due: int | None = None
        self._in_epoch = False
        self._overridden: list[tuple[Any, str]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> SpotfirstCallback:
        """A callback as this one was made: what belongs to a ``fit`` stays with it."""
        copied = type(self).__new__(type(self))
        SpotfirstCallback.__init__(copied, **self._options)
        return copied

    # -- Lightning's hooks ------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have the training data's position kept, and Lightning restore what Spotfirst has."""
        if stage != "fit":
            return
        _check(trainer)
        trainer.callbacks = [self, *(c for c in trainer.callbacks if c is not self)]
        connector, strategy = trainer._checkpoint_connector, trainer.strategy
        fit_loop = trainer.fit_loop
        process, set_up = strategy.process_dataloader, fit_loop.setup_data
        loop_state = fit_loop.on_save_checkpoint
        restore_modules = connector._restore_modules_and_callbacks
        restore_training = connector.restore_training_state
        restore_optimizers = connector.restore_optimizers_and_schedulers

        def resumable(loader: Any) -> Any:
            loader = process(loader)
            return self._resumable(trainer, loader) if trainer.training else loader

        def epoch_over() -> None:
            progress = fit_loop.epoch_progress.total
            if self._in_epoch and progress.ready == progress.completed:
                self._in_epoch = False
                for loader in self._loaders:
                    loader.leave()
                self._boundary()
            set_up()

        def loop_state_of_file() -> dict[str, Any]:
            """As without Spotfirst: other programs read Lightning's own files too."""
            state: dict[str, Any] = loop_state()
            state.pop("combined_loader", None)
            own = [each for each in _own_loaders(trainer) if hasattr(each, "load_state_dict")]
            if own:
                state["combined_loader"] = [loader.state_dict() for loader in own]
            return state

        self._override(strategy, "process_dataloader", resumable)
        self._override(fit_loop, "on_save_checkpoint", loop_state_of_file)
        self._override(fit_loop, "setup_data", epoch_over)
        self._override(connector, "resume_start", lambda *a, **k: self._restore(trainer, *a, **k))
        self._override(connector, "_restore_modules_and_callbacks", self._named(restore_modules))
        self._override(connector, "restore_training_state", self._named(restore_training))
        self._override(
            connector, "restore_optimizers_and_schedulers",
            lambda: self._restore_optimizers(trainer, restore_optimizers),
        )  # fmt: skip

    def _override(self, owner: Any, name: str, function: Any) -> None:
        setattr(owner, name, function)
        self._overridden.append((owner, name))

    def _named(self, restore: Callable[..., None]) -> Callable[..., None]:
        """Say that it is the checkpoint which a module, a callback or an optimizer refuses."""

        def restore_or_say(*arguments: Any, **options: Any) -> None:
            try:
                restore(*arguments, **options)
            except SpotfirstError:
                raise
            except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
                if self._state is None or self._state.restored is None:
                    raise
                what = f"{type(error).__name__}: {error}"
                msg = f"the checkpoint of step {self._seen} was refused in fit(): {what}"
                raise StateMismatch(msg) from error

        return restore_or_say

    def _resumable(self, trainer: Any, loader: Any) -> ResumableLoader:
        mine = ResumableLoader(
            loader, before_fetch=self._boundary, ahead=lambda: _ahead(trainer, mine)
        )
        mine.beside(lambda: _side_by_side(trainer, mine))
        self._loaders.append(mine)
        if self._positions:
            mine.load_state_dict(self._positions.pop(0))
        return mine

    def _restore(self, trainer: Any, path: Any = None, weights_only: Any = None) -> None:
        """In place of reading a checkpoint of Lightning's."""
        if path is not None:
            msg = (
                "fit(ckpt_path=…) would overwrite what Spotfirst restores: load those weights into "
                "the module instead, with load_from_checkpoint()"
            )
            raise InvalidSpec(msg)
        if self._checkpointer is not None:
            msg = (
                "fit() is called a second time with SpotfirstCallback: a run is one training. Train "
                "all in one fit(), such as by a callback that changes things, or in two runs"
            )
            raise InvalidSpec(msg)
        state = self._state = _TrainerState(trainer)
        self._checkpointer = Checkpointer(
            model=state.model, optimizer=state.optimizers, trainer=state, **self._options
        )
        self._seen = self._checkpointer.restore()
        if state.restored is None:
            return
        # It was made when the training began, and would change what is restored.
        self._override(trainer, "_run_sanity_check", lambda: None)
        checkpoint = state.checkpoint()
        loops = checkpoint["loops"]["fit_loop"]["state_dict"]
        loops.pop("combined_loader", None)
        self._positions = state.restored["positions"]
        for loader in self._loaders:  # made early, by setup() of the module
            if self._positions:
                loader.load_state_dict(self._positions.pop(0))
        trainer._checkpoint_connector._loaded_checkpoint = checkpoint
        trainer.should_stop = state.restored["should_stop"]

    def _restore_optimizers(self, trainer: Any, restore: Callable[[], None]) -> None:
        """Have Lightning restore what fits the script as it is now."""
        state, checkpointer = self._state, self._checkpointer
        if state is None or checkpointer is None or state.restored is None or state.made is None:
            restore()
            return
        made = msgspec.json.decode(state.restored.get("made", "{}"), type=dict[str, Made])
        refit, problems = state.made.fit(trainer._checkpoint_connector._loaded_checkpoint, made)
        if problems and self._options.get("strict", True):
            raise misfit(self._seen, problems)
        restore()
        refit.settle()
        state.made.start.adopt(made)
        for each in [*problems, *refit.notes]:
            checkpointer.warn(each)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the very weights, whatever hooks have made of those in the dictionary."""
        assert self._state is not None
        self._state.made = _MadeByModule(trainer)  # before other callbacks add groups
        averages = any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)
        if averages and StochasticWeightAveraging.pl_module_contains_batch_norm(pl_module):
            msg = (
                "StochasticWeightAveraging of a module with BatchNorm ends with an epoch from "
                "gradients that are in no checkpoint: use EMAWeightAveraging or WeightAveraging"
            )
            raise InvalidSpec(msg)
        self._state.restore_weights()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore what training needs last; say how many steps there will be."""
        combined = trainer.fit_loop._combined_loader
        unsized = [each for each in combined.flattened if sized_len(each) is None]
        if unsized and len(combined.flattened) > 1 and combined._mode == "max_size_cycle":
            msg = (
                "CombinedLoader(…, 'max_size_cycle') of data without a length ends when all were "
                "exhausted once, which no checkpoint knows: use 'max_size' or 'min_size'"
            )
            raise InvalidSpec(msg)
        total = _total_steps(trainer)
        if self._checkpointer is not None and total is not None:
            self._checkpointer.expect(total)
        if self._state is None or self._state.restored is None:
            return
        if self._positions:
            count = len(self._loaders)
            msg = (
                f"the checkpoint has the positions of {count + len(self._positions)} training data "
                f"loaders, and here are {count}: train with those that the run began with"
            )
            raise StateMismatch(msg)
        self._state.restore_rest()
        loop = trainer.fit_loop
        if loop.restarting and loop.restarted_mid_epoch:
            # All of the step was done: there is no validation to be made or to be passed over.
            _once(loop.epoch_loop, "_should_check_val_fx", lambda _: False)
            self._state.restore_averaging()
            return
        loop.epoch_loop.restarting = False
        self._state.restored = None  # what is left of it, callbacks set when an epoch begins
        if trainer.reload_dataloaders_every_n_epochs and trainer.current_epoch:
            iter(loop._data_fetcher)  # of loaders that it has just made Lightning begins two epochs
        waiting = [loader for loader in self._loaders if loader.generators_are_set()]
        if waiting:
            restore_rng(self._state.generators)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Have the rest of a resumed epoch be as that of any."""
        if self._state is not None and self._state.restored is not None:
            trainer.fit_loop._restarting = False
            trainer.accumulate_grad_batches = self._state.restored["accumulate_grad_batches"]
            self._state.restored = None

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, if the optimizer made one; it is over when the next batch is asked for."""
        self._in_epoch = True
        if trainer.global_step != self._seen:
            self._seen = self._due = trainer.global_step
            self._report(trainer, outputs)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Complete the last checkpoint: it has the weights as other callbacks left them."""
        if self._state is not None:
            self._state.restore_logged()  # where there was nothing left to train
        if self._checkpointer is not None:
            self._checkpointer.expect(self._seen)
            self._boundary()
            self._checkpointer.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave the trainer as it was; Lightning calls no ``teardown`` then."""
        self._leave(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the trainer as it was."""
        self._leave(trainer)
        combined = trainer.fit_loop._combined_loader
        if combined is not None and stage == "fit":
            combined.reset()  # ends workers that persist, which Lightning has just looked for

    def _leave(self, trainer: Any) -> None:
        if self._overridden:
            combined = trainer.fit_loop._combined_loader
            if combined is not None:  # for what saves a checkpoint of its own afterwards
                combined.flattened = _own_loaders(trainer)
        for owner, name in self._overridden:
            vars(owner).pop(name, None)
        self._overridden = []

    # -- a step -----------------------------------------------------------------------------

    def _boundary(self) -> None:
        if self._checkpointer is None:
            msg = (
                "training data is read before Spotfirst can restore its position: ask for "
                "trainer.estimated_stepping_batches in configure_optimizers(), not in setup()"
            )
            if any(loader.fetched or loader.is_open for loader in self._loaders):
                raise InvalidSpec(msg)
            return
        done, self._due = self._due, None
        if done is not None:
            self._checkpointer.step(done)

    def _report(self, trainer: Any, outputs: Any) -> None:
        assert self._checkpointer is not None
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        metrics = {"loss": loss} if isinstance(loss, torch.Tensor) else {}
        metrics |= trainer.callback_metrics
        self._checkpointer.report(**{k: v for k, v in metrics.items() if v.numel() == 1})


# -- what is stored ---------------------------------------------------------------------------


class _Part:
    """A part of the state that the Checkpointer is given under a name of its own.

    ``torch_parts`` are the objects of torch that it is of: their memory changes in
    ``optimizer.step()`` only, and they are common to all ranks.
    """

    def __init__(self, save: Callable[[], Any], torch_parts: Callable[[], list[Any]]) -> None:
        self._save = save
        self.torch_parts = torch_parts
        self.restored: Any = None

    def state_dict(self) -> Any:
        return self._save()

    def load_state_dict(self, state: Any) -> None:
        self.restored = state


class _TrainerState:
    """Lightning's own dictionary, in three parts, and what Lightning does not save.

    The parts are asked for in this order: the model, the optimizers, and this, which is the rest.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._dumped: dict[str, Any] | None = None
        self.restored: dict[str, Any] | None = None
        self.generators: dict[str, Any] = {}
        self.made: _MadeByModule | None = None
        self.model = _Part(self._model_state, lambda: [trainer.lightning_module])
        self.optimizers = _Part(
            lambda: (self._dumped or {}).pop("optimizer_states", []), lambda: trainer.optimizers
        )

    # -- saving -----------------------------------------------------------------------------

    def _model_state(self) -> Any:
        trainer = self._trainer
        # Hooks may need what is not there before the optimizers are.
        ready = bool(trainer.optimizers)
        self._dumped = (
            trainer._checkpoint_connector.dump_checkpoint(weights_only=False) if ready else None
        )
        return trainer.lightning_module.state_dict()

    def state_dict(self) -> dict[str, Any]:
        checkpoint, self._dumped = self._dumped, None
        if checkpoint is None:
            return {}
        trainer = self._trainer
        for key in _hyperparameters(trainer):  # any objects; the script makes them again
            checkpoint.pop(key, None)
        module = trainer.lightning_module
        connector = trainer._logger_connector
        return {
            "checkpoint": checkpoint,
            "positions": [loader.state_dict() for loader in _training_data(trainer)],
            "made": "{}" if self.made is None else self.made.encoded(),
            "frozen": [n for n, p in module.named_parameters() if not p.requires_grad],
            "modes": {n: _mode(m) for n, m in module.named_modules()},
            "metrics": {n: _metric_state(m) for n, m in _metrics(module)},
            "results": {
                key: _metric_state(result)
                for key, result in trainer.fit_loop.epoch_loop._results.items()
                if result.is_tensor
            },
            "logged": {
                "callback": dict(connector._callback_metrics),
                "log": dict(connector._logged_metrics),
            },
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "should_stop": trainer.should_stop,
        }

    # -- restoring --------------------------------------------------------------------------

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.restored = state or None

    def checkpoint(self) -> dict[str, Any]:
        """The dictionary as Lightning's own checkpoint would have it."""
        assert self.restored is not None
        self.generators = rng_state()
        trainer = self._trainer
        checkpoint: dict[str, Any] = self.restored["checkpoint"]
        weights = checkpoint.setdefault("state_dict", {})
        for name in trainer.lightning_module.state_dict():
            # A hook may have dropped it, to save space in a file. Here it is stored all the same.
            if name not in weights and name in self.model.restored:
                weights[name] = self.model.restored[name]
        return {
            **checkpoint,
            "optimizer_states": self.optimizers.restored,
            **_hyperparameters(trainer),
        }

    def restore_weights(self) -> None:
        if self.restored is None:
            return
        self.restore_logged()
        module, weights = self._trainer.lightning_module, self.model.restored
        self.model.restored = None
        _prune_as(module, weights)
        here = module.state_dict()
        problems = [
            *(f"{name} is not in the module" for name in weights if name not in here),
            *(f"{name} is not in the checkpoint" for name in here if name not in weights),
            *(
                f"{name} is {list(here[name].shape)} here and {list(value.shape)} in the checkpoint"
                for name, value in weights.items()
                if isinstance(value, torch.Tensor)
                and name in here
                and here[name].shape != value.shape
            ),
        ]
        if problems and module.strict_loading:
            msg = "the checkpoint does not fit the module:\n  - " + "\n  - ".join(problems[:20])
            raise StateMismatch(msg)
        module.load_state_dict(weights, strict=module.strict_loading)

    def restore_rest(self) -> None:
        """What hooks would have set by now in an uninterrupted training."""
        state, trainer = self.restored, self._trainer
        assert state is not None
        module = trainer.lightning_module
        frozen = set(state["frozen"])
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name not in frozen)
        for name, each in module.named_modules():
            for attribute, value in state["modes"].get(name, {}).items():
                setattr(each, attribute, value)
        for name, metric in _metrics(module):
            _set_metric_state(metric, state["metrics"].get(name), module.device)
        self.restore_logged()
        results = trainer.fit_loop.epoch_loop._results
        kept, update = dict(state["results"]), results.update_metrics

        def update_metrics(key: str, *arguments: Any) -> None:
            """A result exists from its first value on."""
            if key in kept:
                _set_metric_state(results[key], kept.pop(key), module.device)
            update(key, *arguments)

        results.update_metrics = update_metrics

    def restore_averaging(self) -> None:
        """StochasticWeightAveraging takes over the schedule when an epoch begins, and only then."""
        trainer, module = self._trainer, self._trainer.lightning_module
        weights = {n: v.clone() for n, v in module.state_dict().items()}
        for callback in trainer.callbacks:
            if isinstance(callback, StochasticWeightAveraging):
                optimizer = copy.deepcopy(trainer.optimizers[0].state_dict())
                callback.on_train_epoch_start(trainer, module)
                module.load_state_dict(weights)
                trainer.optimizers[0].load_state_dict(optimizer)

    def restore_logged(self) -> None:
        if self.restored is None:
            return
        connector, logged = self._trainer._logger_connector, self.restored["logged"]
        connector._callback_metrics.update(logged["callback"])
        connector._logged_metrics.update(logged["log"])


class _MadeByModule:
    """The optimizers and schedulers as ``configure_optimizers`` has made them."""

    def __init__(self, trainer: Any) -> None:
        optimizers = _numbered("optimizers", trainer.optimizers)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self.start = Start({
            "model": trainer.lightning_module,
            **optimizers,
            **_numbered("lr_schedulers", schedulers),
        })  # fmt: skip
        self._groups = {
            name: [{k: v for k, v in group.items() if k != "params"} for group in each.param_groups]
            for name, each in optimizers.items()
        }

    def encoded(self) -> str:
        return msgspec.json.encode(self.start.made()).decode()

    def fit(self, checkpoint: dict[str, Any], made: dict[str, Made]) -> tuple[Refit, list[str]]:
        """Change Lightning's dictionary to what is to be restored here; what does not fit.

        An optimizer or a scheduler that does not fit keeps the state that it has.
        """
        start, collector = self.start, TensorCollector()
        here = {**start.optimizers, **start.schedulers}
        for name, groups in self._groups.items():
            # BaseFinetuning has given them the checkpoint's values by now.
            for group, values in zip(here[name].param_groups, groups, strict=False):
                group.update(values)
        optimizers = _numbered("optimizers", checkpoint["optimizer_states"])
        states = {**optimizers, **_numbered("lr_schedulers", checkpoint["lr_schedulers"])}
        trees = {
            name: flatten(state, collector, name) if name in optimizers else None
            for name, state in states.items()
        }
        refit = Refit(start, made, trees, collector.leaves)
        arranged = refit.arrange(trees)
        for name, tree in trees.items():
            if name not in arranged:
                states[name] = here[name].state_dict()
            elif arranged[name] is not tree:
                states[name] = unflatten(arranged[name], collector.value)
            if name in arranged:
                states[name] = refit.renew(name, states[name])
        for kind, key in (("optimizers", "optimizer_states"), ("lr_schedulers", "lr_schedulers")):
            checkpoint[key] = [each for name, each in states.items() if name.startswith(kind)]
        missing = here.keys() - made.keys() if made else set()
        return refit, sorted([
            *refit.problems,
            *(f"{name} is not in the checkpoint" for name in missing),
            *(f"{name} is in the checkpoint, and not here" for name in made.keys() - here.keys()),
        ])  # fmt: skip


def _numbered(kind: str, values: Iterable[Any]) -> dict[str, Any]:
    return {f"{kind}[{number}]": value for number, value in enumerate(values)}


def _hyperparameters(trainer: Any) -> dict[str, Any]:
    """The entries of Lightning's dictionary that hold what the script has given to the module."""
    found: dict[str, Any] = {}
    for owner in (trainer.lightning_module, trainer.datamodule):
        if owner is not None and owner.hparams:
            found[owner.CHECKPOINT_HYPER_PARAMS_KEY] = dict(owner.hparams)
            if hasattr(owner, "_hparams_name"):
                found[owner.CHECKPOINT_HYPER_PARAMS_NAME] = owner._hparams_name
            found[owner.CHECKPOINT_HYPER_PARAMS_TYPE] = type(owner.hparams)
    return found


def _mode(module: torch.nn.Module) -> dict[str, bool]:
    names = ("training", "track_running_stats")
    return {name: vars(module)[name] for name in names if name in vars(module)}


def _metrics(module: torch.nn.Module) -> Iterable[tuple[str, Any]]:
    """The metrics of torchmetrics below a module: by what they are, not to import it."""
    return [(name, m) for name, m in module.named_modules() if hasattr(m, "_update_count")]


def _metric_state(metric: Any) -> dict[str, Any]:
    values = {name: getattr(metric, name) for name in metric._defaults}
    return {"values": values, "updates": metric._update_count}


def _set_metric_state(metric: Any, state: dict[str, Any] | None, device: torch.device) -> None:
    if state is None or state["values"].keys() != metric._defaults.keys():
        return
    for name, value in state["values"].items():
        moved = [v.to(device) for v in value] if isinstance(value, list) else value.to(device)
        setattr(metric, name, moved)
    metric._update_count, metric._computed = state["updates"], None


def _prune_as(module: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Have the masks that the stored weights have: a pruned parameter has other names."""
    for name, mask in weights.items():
        owner, _, parameter = name.removesuffix("_mask").rpartition(".")
        if name.endswith("_mask") and f"{name.removesuffix('_mask')}_orig" in weights:
            part = module.get_submodule(owner)
            whole = part._parameters.get(parameter)
            if whole is not None:
                prune.custom_from_mask(part, parameter, mask.to(whole.device))  # type: ignore[no-untyped-call]


# -- Lightning's loops ------------------------------------------------------------------------


def _check(trainer: Any) -> None:
    strategy = trainer.strategy
    name = type(strategy).__name__
    if strategy.restore_checkpoint_after_setup or "FSDP" in name or "ModelParallel" in name:
        msg = (
            f"{name} is not supported: train with strategy='ddp', or with FSDP and a Checkpointer "
            "in a loop of your own"
        )
        raise InvalidSpec(msg)
    for callback in trainer.callbacks:
        if isinstance(callback, (BatchSizeFinder, LearningRateFinder)):
            msg = (
                f"{type(callback).__name__} tries trainings out whenever fit() begins: do that once, "
                "and give its result to the training"
            )
            raise InvalidSpec(msg)
        if isinstance(callback, ModelPruning) and callback._use_lottery_ticket_hypothesis:
            msg = (
                "ModelPruning(use_lottery_ticket_hypothesis=True) keeps weights in no checkpoint: "
                "set it to False"
            )
            raise InvalidSpec(msg)


def _total_steps(trainer: Any) -> int | None:
    """How many steps of the optimizer there will be, or None where that is not known."""
    if not trainer.lightning_module.automatic_optimization:
        # The module makes as many steps as it likes. With several optimizers Lightning sees only
        # after a batch that there were enough.
        each = max(1, len(trainer.optimizers))
        return math.ceil(trainer.max_steps / each) * each if trainer.max_steps > 0 else None
    batches, epochs, most = trainer.num_training_batches, trainer.max_epochs, trainer.max_steps
    total = math.inf
    if epochs is not None and epochs >= 0 and batches != math.inf:
        at = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]
        per_step = [
            at[-1].get_accumulate_grad_batches(epoch) if at else trainer.accumulate_grad_batches
            for epoch in range(epochs)
        ]
        total = sum(math.ceil(batches / count) for count in per_step)
    total = min(total, most) if most > 0 else total
    return int(total) if 0 < total < math.inf else None


def _training_data(trainer: Any) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return list(combined.flattened) if combined is not None else []


def _own_loaders(trainer: Any) -> list[Any]:
    loaders = _training_data(trainer)
    return [each._loader if isinstance(each, ResumableLoader) else each for each in loaders]


def _side_by_side(trainer: Any, loader: ResumableLoader) -> list[ResumableLoader]:
    beside = _training_data(trainer)
    return beside if any(each is loader for each in beside) else [loader]


def _ahead(trainer: Any, loader: ResumableLoader) -> int:
    """Of data without a length Lightning reads one batch ahead, to know which is the last."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or fetcher.length is not None:
        return 0
    used: int = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return max(0, loader.fetched - used)


def _once(owner: Any, name: str, function: Any) -> None:
    """Replace a method for one call."""

    def called(*arguments: Any) -> Any:
        vars(owner).pop(name, None)
        return function(*arguments)

    setattr(owner, name, called)
