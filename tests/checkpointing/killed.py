"""Trainings that are killed. Run as a script it imports torch once, and forks one for each order.

Orders are lines on its input, answers lines on its output:

``train STORAGE ATTEMPT STEPS``  a process trains; its id, and ``ended`` with its exit status
``kill STORAGE KILLS SEED``      so many processes are killed, each at a random instant, and after
                                 each every checkpoint is read; the steps reached, or what is wrong
"""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import sys
import time
import traceback
from typing import NoReturn

import torch

from spotfirst.checkpointer import Checkpointer
from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.checkpoints.loading import StateReader
from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.checkpoints.retention import Retention
from spotfirst.run import Run
from spotfirst.storage import Storage, open_storage

LONGEST_S = 0.03
"""A whole save takes about that."""
WIDTH = 300
"""Large enough to be copied lazily."""


def main() -> None:
    torch.set_num_threads(1)  # a fork inherits no thread pool
    logging.disable(logging.WARNING)
    _warm_up()
    for order in sys.stdin:
        kind, *words = order.split()
        if kind == "kill":
            _tell(kill_often(words[0], int(words[1]), int(words[2])))
            continue
        process = os.fork()
        if process == 0:
            train(*words)
            os._exit(0)
        _tell(process)
        _tell("ended", os.waitpid(process, 0)[1])


def _warm_up() -> None:
    """Import, before the forks, what torch imports at the first step."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    gc.freeze()  # a collection would write to, and so copy, every page in each fork


def _tell(*words: object) -> None:
    print(*words, flush=True)  # noqa: T201


def train(storage: str, attempt: str, steps: str) -> None:
    os.environ |= {
        "SPOTFIRST_STORAGE": storage,
        "SPOTFIRST_RUN": "r",
        "SPOTFIRST_ATTEMPT": attempt,
    }
    torch.manual_seed(0)
    # Large enough that a save is many writes, small enough that there are many saves.
    model = torch.nn.ModuleList(torch.nn.Linear(300, 300) for _ in range(3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    checkpointer = Checkpointer(model=model, optimizer=optimizer, period_s=0)
    for _ in checkpointer.steps(int(steps)):
        inputs = torch.randn(4, 300)
        for layer in model:
            inputs = layer(inputs).relu()
        optimizer.zero_grad()
        inputs.square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()


# -- very many kills ------------------------------------------------------------------------


class Counter(torch.nn.Module):
    """Weights that say after how many steps they were saved, beside some that never change."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.frozen = torch.nn.Parameter(torch.arange(5000.0), requires_grad=False)


def kill_often(url: str, kills: int, seed: int) -> str:
    """Kill processes while they restore, save, commit, prune and collect."""
    instants = random.Random(seed)
    run = Run(open_storage(url), "local")
    chain = run.chain()
    reached = 0
    for kill in range(kills):
        awaited = instants.choice([b"restores", b"trains", b"saved 1", b"saved 2", b"saved 3"])
        delay_s = instants.uniform(0, LONGEST_S)
        status = _killed(url, awaited, delay_s)
        where = f"kill {kill}, {delay_s:.4f} s after it {awaited.decode()}"
        if status != signal.SIGKILL:
            return f"{where}: the process ended by itself with {status}"
        try:
            step = _check_all(run.packs(), chain)
        except Exception:  # noqa: BLE001 - for the test to show
            return f"{where}: {traceback.format_exc()}".replace("\n", " | ")
        if step < reached:
            return f"{where}: it had reached {reached}, and then {step}"
        reached = step
    return str(reached)


def _killed(url: str, awaited: bytes, delay_s: float) -> int:
    news, told = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(news)
        count(url, told)
    os.close(told)
    with os.fdopen(news, "rb") as lines:
        for line in lines:
            if line.strip() == awaited:
                time.sleep(delay_s)
                os.kill(process, signal.SIGKILL)
                break
    return os.waitpid(process, 0)[1]


def count(url: str, told: int) -> NoReturn:
    """Train and checkpoint every step, until it is killed."""
    try:
        model = Counter()
        optimizer = torch.optim.SGD([model.steps], lr=1.0)
        checkpointer = Checkpointer(
            model=model, optimizer=optimizer, storage=url, period_s=0, retention=Retention(last=2)
        )
        os.write(told, b"restores\n")
        step = checkpointer.restore()
        if not bool((model.steps == -step).all()):
            os._exit(3)
        os.write(told, b"trains\n")
        model.steps.grad = torch.ones(WIDTH, WIDTH)
        saved = None
        saves = 0
        while True:
            optimizer.step()
            step += 1
            checkpointer.step(step)
            if checkpointer.last_saved is not saved:
                saved = checkpointer.last_saved
                saves += 1
                os.write(told, b"saved %d\n" % saves)
            time.sleep(0.001)  # else it would starve its own saves
    except BaseException:  # noqa: BLE001 - it is told by the exit status
        traceback.print_exc()
        os._exit(4)


def _check_all(packs: Storage, chain: CheckpointChain) -> int:
    """The newest step, when every checkpoint that is kept is whole and of its step."""
    commits = chain.refresh().commits
    for _, commit in commits:
        check(packs, commit)
    return commits[-1][1].step if commits else 0


def check(packs: Storage, commit: Commit) -> None:
    manifest = read_manifest(packs, commit.manifest, commit.digest)
    assert isinstance(manifest, StateManifest)
    assert manifest.step == commit.step
    reader = StateReader(packs, manifest)
    for tree in manifest.objects.values():
        reader.plan(tree)
    reader.fetch()
    state = reader.value(manifest.objects["model"])
    assert bool((state["steps"] == -commit.step).all()), "it is of another step"
    assert torch.equal(state["frozen"], torch.arange(5000.0))


if __name__ == "__main__":
    main()
