"""A small GPT-2 with the Trainer: dropout, accumulation, cosine, clipping, evaluation on the way."""

import os
import tempfile
import time

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from spotfirst.checkpointer import weights_sha256
from spotfirst.integrations.huggingface import resume

PACE_S = float(os.environ["PACE_S"])

torch.set_num_threads(1)
set_seed(8)


class Tokens(torch.utils.data.Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        tokens = torch.arange(number, number + 24) ** 2 % 61
        return {"input_ids": tokens, "labels": tokens}


class Pace(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        time.sleep(PACE_S)


model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=2))
arguments = TrainingArguments(
    tempfile.mkdtemp(),
    num_train_epochs=4,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    lr_scheduler_type="cosine",
    warmup_steps=5,
    eval_strategy="steps",
    eval_steps=10,
    logging_steps=5,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    seed=8,
)
trainer = Trainer(
    model, arguments, train_dataset=Tokens(250), eval_dataset=Tokens(30), callbacks=[Pace()]
)
trainer.train(resume_from_checkpoint=resume(trainer))
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"weights {weights_sha256(model)} losses {losses}")
