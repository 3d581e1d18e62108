from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from spotfirst.checkpointer import weights_sha256
from spotfirst.errors import InvalidSpec
from spotfirst.integrations.huggingface import SpotfirstCallback, resume
from tests.integrations.data import BATCH, EPOCHS, Net, Noisy, Quiet, Streamed, seed


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net.loss({"x": x, "labels": labels})}


def train(variant: str, *, resumable: bool) -> str:
    if variant == "refused":
        return refused()
    seed()
    model = Model()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=EPOCHS,
        max_steps=40 if variant == "streamed" else -1,  # the second time through the data
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=32,
        gradient_accumulation_steps=2 if variant == "two workers" else 1,
        dataloader_num_workers=2 if variant == "two workers" else 0,
        learning_rate=0.01,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=9,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        metric_for_best_model="loss",
        greater_is_better=False,
    )
    stop = EarlyStoppingCallback(50)
    trainer: Any = Trainer(
        model,
        arguments,
        train_dataset={"skipping": Quiet, "streamed": Streamed}.get(variant, Noisy)(),
        eval_dataset=Noisy(),
        callbacks=[stop],
    )
    found = resume(trainer, replay=variant != "skipping") if resumable else None
    trainer.train(resume_from_checkpoint=found)
    (stop,) = [c for c in trainer.callback_handler.callbacks if type(c) is EarlyStoppingCallback]
    state = trainer.state
    counted = stop.early_stopping_patience_counter
    return f"{weights_sha256(model)} {state.global_step} {state.best_metric} {counted}"


def refused() -> str:
    """What is said to those who would train something else than they restored."""
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), use_cpu=True, report_to="none", disable_tqdm=True
    )
    forgotten = Trainer(Model(), arguments, train_dataset=Quiet(), callbacks=[SpotfirstCallback()])
    made_again: Any = Trainer(None, arguments, train_dataset=Quiet(), model_init=Model)
    said = []
    for action in (forgotten.train, lambda: resume(made_again)):
        try:
            action()
        except InvalidSpec as error:
            said.append(str(error))
    return "\n".join(said)
