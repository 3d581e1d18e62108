"""The private attributes of frameworks that the integrations use are there.

When one of these fails after an upgrade, the integration is to be looked at before it is used.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch


def test_torch() -> None:
    iterator: Any = iter(torch.utils.data.DataLoader([1, 2]))  # type: ignore[arg-type]
    assert iterator._next_index() == [0]


def test_lightning() -> None:
    pl: Any = pytest.importorskip("lightning.pytorch")
    callbacks: Any = pytest.importorskip("lightning.pytorch.callbacks")
    trainer: Any = pl.Trainer(accelerator="cpu", logger=False, barebones=True)
    connector, loop = trainer._checkpoint_connector, trainer.fit_loop
    assert list(inspect.signature(connector.resume_start).parameters) == [
        "checkpoint_path", "weights_only",
    ]  # fmt: skip
    for owner, names in {
        connector: [
            "_restore_modules_and_callbacks", "_loaded_checkpoint", "restore_training_state",
            "restore_optimizers_and_schedulers",
            "dump_checkpoint",
        ],
        trainer._logger_connector: ["_callback_metrics", "_logged_metrics"],
        loop: [
            "_combined_loader", "_data_fetcher", "_restarting", "restarted_mid_epoch", "setup_data",
            "epoch_progress",
        ],
        loop.epoch_loop: ["_should_check_val_fx", "_results", "batch_progress", "restarting"],
        trainer.strategy: ["process_dataloader", "restore_checkpoint_after_setup"],
    }.items():  # fmt: skip
        for name in names:
            assert hasattr(owner, name), name
    assert callable(loop.epoch_loop._results.update_metrics)
    assert hasattr(callbacks.ModelPruning("l1_unstructured"), "_use_lottery_ticket_hypothesis")
    source = inspect.getsource(type(trainer)._run)
    order = [
        "_call_setup_hook",
        "_restore_modules_and_callbacks",
        "strategy.setup(self)",
        '"on_fit_start"',
    ]
    places = [source.index(name) for name in [*order, "restore_training_state()", "_run_stage()"]]
    assert places == sorted(places)


def test_torchmetrics() -> None:
    torchmetrics: Any = pytest.importorskip("torchmetrics")
    metric = torchmetrics.MeanMetric()
    metric.update(2.0)
    assert metric._update_count == 1
    assert {"mean_value", "weight"} == metric._defaults.keys()


def test_transformers() -> None:
    trainer: Any = pytest.importorskip("transformers").Trainer
    for name in ("_load_from_checkpoint", "set_initial_training_values", "store_flos"):
        assert callable(getattr(trainer, name))
    loop = inspect.getsource(trainer._inner_training_loop)
    set_before = [
        "_initial_global_step", "_tr_loss", "_total_loss_scalar", "_globalstep_last_logged",
    ]  # fmt: skip
    places = [loop.index(f"self.{name} = ") for name in set_before]
    assert max(places) < loop.index("on_train_begin")
    source = inspect.getsource(trainer)
    assert "_created_lr_scheduler" in source
    assert "restore_callback_states_from_checkpoint" in source


def test_accelerate() -> None:
    accelerate: Any = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.step == 0
    assert accelerator._custom_objects == []
