"""A search over sixteen points; what was running when the process ended is tried again."""

import json
import os
import time
from pathlib import Path

import optuna
import torch

PACE_S = float(os.environ["PACE_S"])

FOLDER = Path(os.environ["SPOTFIRST_CHECKPOINT_DIR"])
POINTS = [
    {"lr": lr, "width": width, "momentum": momentum}
    for lr in (0.003, 0.01, 0.03, 0.1)
    for width in (4, 8)
    for momentum in (0.0, 0.9)
]

torch.set_num_threads(1)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def objective(trial):
    lr = trial.suggest_float("lr", 0.001, 1.0)
    width = trial.suggest_int("width", 1, 16)
    momentum = trial.suggest_float("momentum", 0.0, 0.99)
    torch.manual_seed(5)
    x = torch.randn(64, 4)
    y = x.prod(1, keepdim=True)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for epoch in range(10):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        trial.report(loss.item(), epoch)
        time.sleep(PACE_S)
    return loss.item()


def trials(*states):
    return study.get_trials(deepcopy=False, states=states)


study = optuna.create_study(
    study_name="widths", storage=f"sqlite:///{FOLDER}/study.db", load_if_exists=True
)
while True:
    done = trials(optuna.trial.TrialState.COMPLETE)
    left = [point for point in POINTS if point not in [trial.params for trial in done]]
    if not left:
        break
    if not trials(optuna.trial.TrialState.WAITING):
        study.enqueue_trial(left[0])
    study.optimize(objective, n_trials=1)
values = {json.dumps(trial.params, sort_keys=True): trial.value for trial in done}
steps = {json.dumps(t.params, sort_keys=True): t.intermediate_values for t in done}
result = {"values": values, "steps": steps, "best": study.best_params}
(FOLDER / "result.json").write_text(json.dumps(result, sort_keys=True, indent=1))
time.sleep(0.5)
