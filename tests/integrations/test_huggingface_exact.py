"""A Trainer that is interrupted after any step ends, and logs, as one that knows no Spotfirst."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from spotfirst.channel import Channel, Drain
from spotfirst.checkpointer import Drained, weights_sha256
from spotfirst.context import TrainerContext
from spotfirst.errors import InvalidSpec, StateMismatch
from spotfirst.integrations.huggingface import resume
from spotfirst.run import Run
from spotfirst.storage import open_storage
from tests.integrations.data import seed

pytestmark = pytest.mark.filterwarnings("ignore")


class Items(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 18

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.full((4,), index / 18) + torch.rand(()) / 9
        return {"input_ids": x, "labels": torch.ones(())}


class Stream(torch.utils.data.IterableDataset[Any]):
    """Its order is another in each epoch, as Hugging Face's streamed data sets are shuffled."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(18, generator=torch.Generator().manual_seed(self.epoch))
        for index in order.tolist():
            yield Items()[index]


class Net(torch.nn.Module):
    main_input_name = "input_ids"

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1)
        )

    def num_parameters(self, **_: Any) -> int:
        """What the Trainer counts operations by."""
        return 49

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.layers(input_ids).squeeze(1)
        return {"loss": (output - labels).square().mean(), "logits": output}


@dataclass
class Variant:
    data: Callable[[], Any] = Items
    callbacks: Callable[[], list[TrainerCallback]] = list
    options: dict[str, Any] = field(default_factory=dict)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "learning_rate": 0.5,  # so that the best model is not the last
}
VARIANTS = {
    "plain": Variant(),
    "accumulating": Variant(options={"gradient_accumulation_steps": 2, "logging_steps": 2}),
    "evaluated at the start": Variant(
        options={"eval_on_start": True, "eval_strategy": "epoch", "logging_strategy": "epoch"}
    ),
    "the best model": Variant(options=BEST),
    "stopped early": Variant(callbacks=lambda: [EarlyStoppingCallback(1)], options=BEST),
    "streamed": Variant(data=Stream, options={"max_steps": 12}),
    "some steps": Variant(options={"max_steps": 7}),
    "tokens": Variant(options={"include_num_input_tokens_seen": True}),
}
NOT_COMPARED = ("runtime", "per_second")


class NoticeAfter(TrainerCallback):
    def __init__(self, channel: Channel, step: int) -> None:
        self._channel, self._step = channel, step

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step >= self._step:
            self._channel.ask_to_drain(Drain(reason="interruption"))


def trained(
    variant: Variant,
    folder: Path,
    own: Callable[[Any], str | None] = lambda _: None,
    **options: Any,
) -> dict[str, Any]:
    seed()
    model = Net()
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
        **variant.options,
        **options,
    }
    trainer: Any = Trainer(
        model,
        TrainingArguments(**given),
        train_dataset=variant.data(),
        eval_dataset=Items(),
        callbacks=variant.callbacks(),
    )
    trainer.train(resume_from_checkpoint=own(trainer))
    logs = [
        {k: v for k, v in log.items() if not k.endswith(NOT_COMPARED)}
        for log in trainer.state.log_history
    ]
    if variant.data is Stream:
        for log in logs:
            del log["epoch"]  # the Trainer counts epochs of a stream from 0 when it resumes
    return {
        "weights": weights_sha256(model),
        "steps": trainer.state.global_step,
        "flos": trainer.state.total_flos,
        "best": trainer.state.best_metric,
        "logs": logs,
        "callbacks": {k: type(v) for k, v in trainer.state.stateful_callbacks.items()},
        "drawn": float(torch.rand(())),
    }


def attempt(
    variant: Variant,
    folder: Path,
    leave_after: int = 0,
    *,
    replay: bool = True,
    **options: Any,
) -> dict[str, Any] | None:
    number = len(list(folder.glob("channel-*")))
    place = folder / f"channel-{number}"
    place.mkdir(parents=True)
    channel = Channel(place)
    context = TrainerContext(Run(open_storage(str(folder / "s")), "r"), None, channel)

    def own(trainer: Any) -> str | None:
        if leave_after:
            trainer.add_callback(NoticeAfter(channel, leave_after))
        return resume(trainer, context=context, period_s=1e9, replay=replay)

    try:
        # Each instance has a disk of its own.
        return trained(variant, folder / f"disk-{number}", own, **options)
    except Drained:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_interrupted_after_any_step_it_ends_as_the_trainer_alone(name: str, tmp_path: Path) -> None:
    variant = VARIANTS[name]
    whole = trained(variant, tmp_path / "alone")
    for step in sorted({1, 4, 5, 6, whole["steps"] - 1}):
        folder = tmp_path / str(step)
        ended = attempt(variant, folder, leave_after=step) or attempt(variant, folder)
        assert ended == whole, f"after step {step}"


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_learning_rate_that_the_script_sets_now_is_trained_with(
    schedule: str, tmp_path: Path
) -> None:
    options = {"lr_scheduler_type": schedule, "logging_steps": 1}
    attempt(VARIANTS["plain"], tmp_path, leave_after=7, **options)
    again = attempt(VARIANTS["plain"], tmp_path, **options, learning_rate=1e-3)
    whole = trained(VARIANTS["plain"], tmp_path / "alone", **options, learning_rate=1e-3)
    assert again is not None
    rates = [[log.get("learning_rate") for log in each["logs"]] for each in (again, whole)]
    # What is logged after a step is the learning rate of that step.
    assert rates[0][7:-1] == pytest.approx(rates[1][7:-1])
    told = Channel(tmp_path / "channel-1").progress()
    assert told is not None
    assert any("the learning rate is" in each or "sets it now" in each for each in told.warnings)


def test_a_search_for_the_batch_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="auto_find_batch_size=True"):
        attempt(VARIANTS["plain"], tmp_path, auto_find_batch_size=True)


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2 here"),
        ({"per_device_train_batch_size": 2}, "batch_size was 4 and is 2"),
    ],
)
def test_other_batches_are_refused_in_the_middle_of_an_epoch(
    option: dict[str, Any], what: str, tmp_path: Path
) -> None:
    attempt(VARIANTS["plain"], tmp_path, leave_after=3)
    with pytest.raises(StateMismatch, match=what):
        attempt(VARIANTS["plain"], tmp_path, **option)


class Noted(Items):
    """Notes which samples are read, and what is drawn for them."""

    def __init__(self) -> None:
        self.read: list[tuple[int, float]] = []

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = super().__getitem__(index)
        self.read.append((index, float(item["input_ids"][0])))
        return item


@pytest.mark.parametrize("replay", [True, False])
def test_without_replay_the_samples_are_the_same_and_what_is_drawn_for_them_differs(
    replay: bool, tmp_path: Path
) -> None:
    whole, first, second = Noted(), Noted(), Noted()
    options = {"eval_strategy": "no", "num_train_epochs": 1}

    def variant(data: Noted) -> Variant:
        return Variant(data=lambda: data)

    trained(variant(whole), tmp_path / "alone", **options)
    attempt(variant(first), tmp_path, leave_after=2, **options)
    attempt(variant(second), tmp_path, replay=replay, **options)
    left = whole.read[8:]
    assert [index for index, _ in second.read[-len(left) :]] == [index for index, _ in left]
    assert (second.read[-len(left) :] == left) == replay
    assert replay or len(second.read) == len(left)


@pytest.mark.parametrize("what", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_deepspeed_and_fsdp_are_refused(what: str, tmp_path: Path) -> None:
    trainer: Any = Trainer(
        Net(),
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=Items(),
    )
    setattr(trainer, what, True)
    with pytest.raises(InvalidSpec, match="DeepSpeed and FSDP in the Trainer are not supported"):
        resume(trainer)
