"""The Trainer alone: a checkpoint every few steps, two of them kept, and its own way to go on."""

import os
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
from transformers.trainer_utils import get_last_checkpoint

PACE_S = float(os.environ["PACE_S"])

torch.set_num_threads(1)
set_seed(9)
FOLDER = os.environ["SPOTFIRST_CHECKPOINT_DIR"]


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 250

    def __getitem__(self, number):
        tokens = torch.arange(number, number + 24) ** 2 % 61
        return {"input_ids": tokens, "labels": tokens}


class Pace(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        time.sleep(PACE_S)


model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=24, n_embd=32, n_layer=2, n_head=2))
arguments = TrainingArguments(
    FOLDER,
    num_train_epochs=3,
    per_device_train_batch_size=8,
    learning_rate=3e-3,
    lr_scheduler_type="linear",
    logging_steps=10,
    save_steps=6,
    save_total_limit=2,
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    seed=9,
)
trainer = Trainer(model, arguments, train_dataset=Tokens(), callbacks=[Pace()])
trainer.train(resume_from_checkpoint=get_last_checkpoint(FOLDER))
trainer.save_model(f"{FOLDER}/final")
time.sleep(0.5)
