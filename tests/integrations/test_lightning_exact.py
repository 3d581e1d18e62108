"""A Lightning training that is interrupted after any step ends as one that knows no Spotfirst."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from spotfirst.channel import Channel, Drain
from spotfirst.checkpointer import Drained, weights_sha256
from spotfirst.context import TrainerContext
from spotfirst.errors import InvalidSpec, SpotfirstError, StateMismatch, UnsupportedState
from spotfirst.integrations.lightning import SpotfirstCallback
from spotfirst.run import Run
from spotfirst.storage import open_storage
from tests.integrations.data import seed

pytestmark = pytest.mark.filterwarnings("ignore")
for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
    logging.getLogger(name).setLevel(logging.ERROR)

BATCH = 4


class Items(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index) / self._count) + torch.rand(()) / 9


class Stream(torch.utils.data.IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        items = Items(18)
        return (items[index] for index in range(18))


def loader(count: int = 18) -> DataLoader[Any]:
    return DataLoader(Items(count), BATCH, shuffle=True)


class Net(pl.LightningModule):
    """Draws in the forward pass, logs means over the epoch, validates."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.2)
        )
        self.head = torch.nn.Linear(4, 1)
        self.epochs: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        parts = batch.values() if isinstance(batch, dict) else [batch]
        inputs = torch.cat([part for part in parts if part is not None])
        return (self.head(self.backbone(inputs)) - 1).square().mean()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train", loss, on_step=True, on_epoch=True, batch_size=BATCH)
        return loss

    def on_train_epoch_end(self) -> None:
        self.epochs.append(float(self.trainer.callback_metrics.get("train_epoch", 0)))

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=1e-2)


class Plateau(Net):
    interval = "epoch"

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        monitor = "train_epoch" if self.interval == "epoch" else "val"
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "monitor": monitor,
                "interval": self.interval,
                "strict": self.interval == "epoch",
            },
        }


class PlateauOfSteps(Plateau):
    interval = "step"


class OneCycle(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        total = int(self.trainer.estimated_stepping_batches)  # makes the loaders
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Two(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            loss = super().training_step(batch, index)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = (self.backbone, self.head)
        return [torch.optim.AdamW(part.parameters(), lr=1e-2) for part in parts]


class Measured(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.mean(loss.detach())
        self.log("train_epoch", self.mean, on_step=False, on_epoch=True)
        return loss


class Hooked(Net):
    """Keeps things in the dictionary; drops weights from it; has parameters of any kind."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters({"path": Path("/tmp"), "loss": torch.nn.MSELoss})
        self.seen: list[Any] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["words"] = ["a", "b"]
        for key in [k for k in checkpoint["state_dict"] if k.startswith("head")]:
            del checkpoint["state_dict"][key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["words"] == ["a", "b"]
        assert {"epoch", "global_step", "callbacks", "optimizer_states", "lr_schedulers"} < set(
            checkpoint
        )
        assert checkpoint["hyper_parameters"]["path"] == Path("/tmp")
        assert checkpoint["state_dict"]["backbone.0.weight"].shape == (4, 4)


class CountsValidations(Net):
    """A check of the validation before a resumed training would count as one."""

    def __init__(self) -> None:
        super().__init__()
        self.validations = 0

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.validations += 1

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return super().training_step(batch, index) * (1 + self.validations)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["validations"] = self.validations

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.validations = checkpoint["validations"]


class Unnormed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.2))


class EvalsItsBackbone(Net):
    def on_train_epoch_start(self) -> None:
        self.backbone.eval()


class Unfrozen(BackboneFinetuning):
    def __init__(self) -> None:
        super().__init__(unfreeze_backbone_at_epoch=1, verbose=False)


class Pruning(ModelPruning):
    def __init__(self, **options: Any) -> None:
        super().__init__(
            "l1_unstructured", amount=0.3, use_lottery_ticket_hypothesis=False, **options
        )


class Average(StochasticWeightAveraging):
    def __init__(self) -> None:
        super().__init__(swa_lrs=0.02, swa_epoch_start=1)


class LastLearningRate(Callback):
    """Draws when an epoch begins."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        torch.rand(3)


@dataclass
class Variant:
    module: Callable[[], Any] = Net
    data: Callable[[], Any] = loader
    callbacks: Callable[[], list[Callback]] = list
    validates: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def combined(mode: Any) -> Callable[[], Any]:
    return lambda: CombinedLoader({"a": loader(18), "b": loader(10), "c": loader(6)}, mode)


VARIANTS = {
    "plain": Variant(callbacks=lambda: [LastLearningRate()]),
    "min_size": Variant(data=combined("min_size")),
    "max_size": Variant(data=combined("max_size")),
    "max_size_cycle": Variant(data=combined("max_size_cycle")),
    "two workers": Variant(data=lambda: DataLoader(Items(18), BATCH, shuffle=True, num_workers=1)),
    "streamed": Variant(data=lambda: DataLoader(Stream(), BATCH)),
    "streamed side by side": Variant(
        data=lambda: CombinedLoader(
            {"a": DataLoader(Stream(), BATCH), "b": DataLoader(Stream(), 3)}, "max_size"
        )
    ),
    "limited": Variant(options={"limit_train_batches": 3}),
    "moving average": Variant(callbacks=lambda: [EMAWeightAveraging(decay=0.9)]),
    "averaged at the end": Variant(module=Unnormed, callbacks=lambda: [Average()]),
    "finetuning": Variant(callbacks=lambda: [Unfrozen()]),
    "pruned": Variant(callbacks=lambda: [Pruning()]),
    "pruned after validation": Variant(callbacks=lambda: [Pruning(prune_on_train_epoch_end=False)]),
    "accumulating": Variant(options={"accumulate_grad_batches": 2}),
    "accumulating by epoch": Variant(
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})]
    ),
    "learning rate by epoch": Variant(module=Plateau),
    "learning rate by step": Variant(module=PlateauOfSteps, options={"val_check_interval": 2}),
    "one cycle": Variant(module=OneCycle),
    "two optimizers": Variant(module=Two),
    "metric": Variant(module=Measured),
    "hooks": Variant(module=Hooked),
    "validations counted": Variant(module=CountsValidations),
    "eval mode": Variant(module=EvalsItsBackbone),
    "max steps": Variant(options={"max_epochs": -1, "max_steps": 12}),
    "max steps without validation": Variant(
        options={"max_epochs": -1, "max_steps": 12}, validates=False
    ),
    "stopped early": Variant(
        callbacks=lambda: [EarlyStopping("val", patience=0, min_delta=9.0)],
        options={"max_epochs": 9},
    ),
    "loaders made anew": Variant(options={"reload_dataloaders_every_n_epochs": 1}),
    "validation within the epoch": Variant(options={"val_check_interval": 2}),
}


class NoticeAfter(Callback):
    def __init__(self, channel: Channel, step: int) -> None:
        self._channel, self._step = channel, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step >= self._step:
            self._channel.ask_to_drain(Drain(reason="interruption"))


def trained(variant: Variant, own: list[Callback]) -> dict[str, Any]:
    seed()
    module, others = variant.module(), variant.callbacks()
    trainer = pl.Trainer(
        **{
            "max_epochs": 3,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 1,
            **variant.options,
        },
        callbacks=[*own, *others],
    )
    validation = DataLoader(Items(6), 3) if variant.validates else None
    trainer.fit(module, variant.data(), validation)
    optimizers = [o.param_groups[0]["lr"] for o in trainer.optimizers]
    return {
        "weights": weights_sha256(module),
        "steps": trainer.global_step,
        "epochs": module.epochs[-1:],
        "rates": optimizers,
        "logged": trainer.fit_loop.epoch_loop._batches_that_stepped,
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        "drawn": float(torch.rand(())),
    }


def attempt(
    variant: Variant, folder: Path, leave_after: int = 0, **options: Any
) -> dict[str, Any] | None:
    number = len(list(folder.glob("channel-*")))
    place = folder / f"channel-{number}"
    place.mkdir(parents=True)
    channel = Channel(place)
    context = TrainerContext(Run(open_storage(str(folder / "s")), "r"), None, channel)
    # Where it is among the callbacks does not matter.
    own: list[Callback] = [Callback(), SpotfirstCallback(context=context, period_s=1e9, **options)]
    if leave_after:
        own.append(NoticeAfter(channel, leave_after))
    try:
        return trained(variant, own)
    except Drained:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_interrupted_after_any_step_it_ends_as_lightning_alone(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    whole = trained(variant, [])
    for step in sorted({1, 4, 5, 6, 9, 10, 11, whole["steps"]} & set(range(1, whole["steps"] + 1))):
        folder = tmp_path / str(step)
        ended = attempt(variant, folder, leave_after=step) or attempt(variant, folder)
        assert ended == whole, f"after step {step}"
    # A training that is over stays so.
    again = attempt(variant, folder)
    assert again is not None
    for fact in ("weights", "steps", "metrics"):
        assert again[fact] == whole[fact]


class Counting(DataLoader[Any]):
    """A loader that keeps a position of its own."""

    def state_dict(self) -> dict[str, Any]:
        return {"own": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"own": 1}


@pytest.mark.parametrize("kind", [DataLoader, Counting])
def test_files_of_lightnings_beside_it_are_as_without_it(
    kind: type[DataLoader[Any]], tmp_path: Path
) -> None:
    def files(folder: str, own: list[Callback]) -> dict[str, Any]:
        kept = pl.callbacks.ModelCheckpoint(tmp_path / folder, filename="m", every_n_train_steps=3)
        trained(
            Variant(
                data=lambda: kind(Items(18), BATCH),
                callbacks=lambda: [kept],
                options={"enable_checkpointing": True, "max_steps": 3},
            ),
            own,
        )
        found: dict[str, Any] = torch.load(tmp_path / folder / "m.ckpt", weights_only=True)
        return found

    beside = files("a", [SpotfirstCallback(storage=str(tmp_path / "s"))])
    alone = files("b", [])
    assert beside["loops"] == alone["loops"]
    assert beside.keys() == alone.keys()
    net = Net.load_from_checkpoint(tmp_path / "a" / "m.ckpt")
    assert all(map(torch.equal, net.state_dict().values(), alone["state_dict"].values()))
    # Another program goes on from there, without Spotfirst.
    trainer = pl.Trainer(max_steps=5, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Net(), kind(Items(18), BATCH), ckpt_path=tmp_path / "a" / "m.ckpt")
    assert trainer.global_step == 5


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_fit_the_trainer_is_as_without_it(fails: bool, tmp_path: Path) -> None:
    class Fails(Net):
        def on_train_batch_end(self, *_: Any) -> None:
            if fails and self.trainer.global_step == 2:
                raise LookupError

    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        callbacks=[SpotfirstCallback(storage=str(tmp_path / "s"))],
    )  # fmt: skip
    with pytest.raises(LookupError) if fails else contextlib.nullcontext():
        trainer.fit(Fails(), DataLoader(Items(18), BATCH))
    assert type(trainer.train_dataloader) is DataLoader
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    torch.load(tmp_path / "own.ckpt", weights_only=True)
    trainer.validate(Net(), DataLoader(Items(6), 3))


def test_callbacks_can_be_copied_in_a_fit(tmp_path: Path) -> None:
    class Copies(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.copies = copy.deepcopy(trainer.callbacks)

    keeper = Copies()
    trained(VARIANTS["plain"], [SpotfirstCallback(storage=str(tmp_path)), keeper])
    (copied,) = [c for c in keeper.copies if isinstance(c, SpotfirstCallback)]
    trained(VARIANTS["plain"], [copied])  # there is nothing left to train


class KeepsAnObject(Net):
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["place"] = object()


class AsksEarly(OneCycle):
    def setup(self, stage: str) -> None:
        self.trainer.estimated_stepping_batches  # noqa: B018 - it makes the loaders


REFUSED: dict[str, tuple[Variant, type[SpotfirstError], str]] = {
    "a lottery ticket": (
        Variant(callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.3)]),
        InvalidSpec,
        "use_lottery_ticket_hypothesis=True",
    ),
    "weights averaged at the end, with BatchNorm": (
        Variant(callbacks=lambda: [Average()]),
        InvalidSpec,
        "StochasticWeightAveraging of a module with BatchNorm",
    ),
    "a search for the learning rate": (
        Variant(callbacks=lambda: [LearningRateFinder()]),
        InvalidSpec,
        "LearningRateFinder tries trainings out",
    ),
    "streams again and again": (
        Variant(data=lambda: [DataLoader(Stream(), BATCH), DataLoader(Stream(), 3)]),
        InvalidSpec,
        "'max_size_cycle'",
    ),
    "any object in the dictionary": (
        Variant(module=KeepsAnObject),
        UnsupportedState,
        "'place'",
    ),
    "a stream that is read in setup()": (
        Variant(
            module=AsksEarly,
            data=lambda: DataLoader(Stream(), BATCH),
            options={"max_steps": 9, "max_epochs": 3},
        ),
        InvalidSpec,
        "estimated_stepping_batches in configure_optimizers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_resumed_is_refused_at_the_first_start(name: str, tmp_path: Path) -> None:
    variant, kind, what = REFUSED[name]
    with pytest.raises(kind, match=what):
        attempt(variant, tmp_path)


def test_a_second_fit_is_refused(tmp_path: Path) -> None:
    channel = Channel(tmp_path)
    context = TrainerContext(Run(open_storage(str(tmp_path / "s")), "r"), None, channel)
    own: list[Callback] = [SpotfirstCallback(context=context)]
    trained(VARIANTS["plain"], own)
    with pytest.raises(InvalidSpec, match=r"fit\(\) is called a second time"):
        trained(VARIANTS["plain"], own)


def test_other_data_or_another_module_is_refused_before_it_trains(tmp_path: Path) -> None:
    attempt(VARIANTS["plain"], tmp_path, leave_after=3)
    other_data = Variant(data=lambda: DataLoader(Items(18), 3))
    with pytest.raises(StateMismatch, match="batch_size was 4 and is 3"):
        attempt(other_data, tmp_path)
    with pytest.raises(StateMismatch, match=r"backbone\.1\.weight"):
        attempt(Variant(module=Unnormed), tmp_path)


class Changed(Net):
    """A script that makes its optimizer and scheduler in one way or another."""

    def __init__(
        self,
        lr: float = 1e-2,
        schedule: Callable[[Any], Any] | None = None,
        make: Callable[[Net], Any] = Net.parameters,
        kind: type[torch.optim.Optimizer] = torch.optim.AdamW,
    ) -> None:
        super().__init__()
        self._lr, self._schedule, self._make, self._kind = lr, schedule, make, kind

    def configure_optimizers(self) -> Any:
        optimizer = self._kind(self._make(self), lr=self._lr)  # type: ignore[call-arg]
        if self._schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self._schedule(optimizer), "interval": "step"}]


def changed(callbacks: Callable[[], list[Callback]] = list, **how: Any) -> Variant:
    return Variant(module=lambda: Changed(**how), callbacks=callbacks)


def cosine(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


def halved(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.5)


def warnings_in_the_run(folder: Path) -> str:
    channels = sorted(folder.glob("channel-*"))
    told = Channel(channels[-1]).progress()
    assert told is not None
    return "\n".join(told.warnings)


@pytest.mark.parametrize("schedule", [None, halved, cosine])
def test_a_learning_rate_that_the_script_sets_now_is_trained_with(
    schedule: Any, tmp_path: Path
) -> None:
    attempt(changed(schedule=schedule), tmp_path, leave_after=7)
    again = attempt(changed(schedule=schedule, lr=1e-3), tmp_path)
    whole = trained(changed(schedule=schedule, lr=1e-3), [])
    assert again is not None
    assert again["rates"] == pytest.approx(whole["rates"])
    assert "as the script sets it now" in warnings_in_the_run(tmp_path)


@pytest.mark.parametrize("schedule", [None, halved])
def test_a_script_that_has_not_changed_is_restored_without_a_warning(
    schedule: Any, tmp_path: Path
) -> None:
    attempt(changed(schedule=schedule), tmp_path, leave_after=7)
    assert attempt(changed(schedule=schedule), tmp_path) == trained(changed(schedule=schedule), [])
    assert warnings_in_the_run(tmp_path) == ""


def test_a_schedule_that_the_script_has_changed_goes_on_at_its_place(tmp_path: Path) -> None:
    def slower(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 4, gamma=0.1)

    attempt(changed(schedule=halved), tmp_path, leave_after=7)
    again = attempt(changed(schedule=slower), tmp_path)
    assert again is not None
    assert again["rates"] == pytest.approx(trained(changed(schedule=slower), [])["rates"])


def test_groups_that_finetuning_has_added_are_restored_beside_a_new_learning_rate(
    tmp_path: Path,
) -> None:
    def head(lr: float) -> Variant:
        return changed(lambda: [Unfrozen()], lr=lr, make=lambda net: net.head.parameters())

    rates: list[list[float]] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def seen(variant: Variant) -> Variant:
        callbacks = variant.callbacks
        return Variant(module=variant.module, callbacks=lambda: [*callbacks(), Rates()])

    attempt(seen(head(1e-2)), tmp_path, leave_after=7)  # in the epoch that has unfrozen
    first = rates[-1]
    rates.clear()
    attempt(seen(head(5e-3)), tmp_path)
    assert len(first) == 2
    assert rates[0] == [5e-3, first[1]]


def test_parameters_in_another_order_get_their_own_state(tmp_path: Path) -> None:
    whole = trained(changed(), [])
    attempt(changed(), tmp_path, leave_after=7)
    again = attempt(changed(make=lambda net: list(net.parameters())[::-1]), tmp_path)
    assert again is not None
    assert again["weights"] == whole["weights"]


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (
            changed(make=lambda net: net.head.parameters()),
            r"model\.backbone\.0\.weight is in the ch",
        ),
        (changed(kind=torch.optim.Adam), "AdamW in the checkpoint and Adam here"),
        (changed(schedule=cosine), r"lr_schedulers\[0\] is not in the checkpoint"),
        (Variant(module=Two), r"optimizers\[1\] is not in the checkpoint"),
    ],
)
def test_optimizers_that_do_not_fit_are_refused_by_name(
    other: Variant, what: str, tmp_path: Path
) -> None:
    attempt(changed(), tmp_path, leave_after=3)
    with pytest.raises(StateMismatch, match=what):
        attempt(other, tmp_path)


def test_without_strict_an_optimizer_of_another_class_begins_anew(tmp_path: Path) -> None:
    attempt(changed(), tmp_path, leave_after=3)
    assert attempt(changed(kind=torch.optim.Adam), tmp_path, strict=False) is not None
    assert "AdamW in the checkpoint and Adam here" in warnings_in_the_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("plain", 15),
        ("accumulating", 9),
        ("accumulating by epoch", 10),
        ("max steps", 12),
        ("two optimizers", 30),
        ("stopped early", 10),
    ],
)
def test_at_the_end_the_last_step_is_the_total_told(name: str, total: int, tmp_path: Path) -> None:
    attempt(VARIANTS[name], tmp_path)
    told = Channel(tmp_path / "channel-0").progress()
    assert told is not None
    assert told.step == told.total_steps == total


@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_strategies_that_shard_the_module_are_refused_by_name(name: str) -> None:
    strategy_class: Any = getattr(pl.strategies, name)
    # DeepSpeed's cannot be made without its package. Which one it is, its class says.
    strategy = strategy_class.__new__(strategy_class)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer._accelerator_connector.strategy = strategy
    with pytest.raises(InvalidSpec, match=f"{name} is not supported: train with strategy='ddp'"):
        SpotfirstCallback().setup(trainer, Net(), "fit")


class Collects(Net):
    """Makes a step of its optimizer with the gradients of three of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()
        if index % 3 == 2:
            optimizer.zero_grad()


def test_gradients_that_the_module_keeps_over_its_own_steps_are_in_no_checkpoint(
    tmp_path: Path,
) -> None:
    variant = Variant(module=Collects)
    whole = trained(variant, [])
    for step, is_exact in ((3, True), (4, False)):
        folder = tmp_path / str(step)
        attempt(variant, folder, leave_after=step)
        ended = attempt(variant, folder)
        assert ended is not None
        assert ended["steps"] == whole["steps"]
        assert ended["drawn"] == whole["drawn"]
        assert (ended["weights"] == whole["weights"]) == is_exact


def test_a_search_for_the_batch_size_is_refused() -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[BatchSizeFinder()]
    )
    with pytest.raises(InvalidSpec, match="BatchSizeFinder tries trainings out"):
        SpotfirstCallback().setup(trainer, Net(), "fit")
