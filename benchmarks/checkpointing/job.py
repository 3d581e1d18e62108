"""One process of the benchmark: ``python -m benchmarks.checkpointing.job NAME… --folder F``.

Each writer gets a process of its own, so that memory, caches and threads are its own. The last line
is one JSON object: what each job measured, by its name.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpointing import keeping, limits, losing, training, writers
from benchmarks.checkpointing.training import Training

__all__ = ["JOBS", "Plan"]


@dataclass(frozen=True)
class Plan:
    """How much is measured. ``least``: the steps of a window; ``many``: checkpoints of a small model."""

    folder: Path
    size: training.Size
    saves: int
    peer_saves: int
    rounds: int
    least: int
    many: int
    device: str = "cpu"
    seaweedfs: bool = True


def plan(folder: Path, scale: str) -> Plan:
    """``quick``, ``full`` or ``gpu``."""
    if scale == "quick":
        return Plan(
            folder, training.QUICK, saves=3, peer_saves=2, rounds=1, least=2, many=12,
            seaweedfs=False,
        )  # fmt: skip
    if scale == "gpu":
        return Plan(
            folder, training.GPU, saves=4, peer_saves=2, rounds=3, least=4, many=40, device="cuda"
        )
    return Plan(folder, training.FULL, saves=16, peer_saves=8, rounds=5, least=3, many=100)


def _spotfirst(plan: Plan) -> dict[str, float]:
    train = Training(plan.size, plan.device)
    for _ in range(3):
        train.step()
    memory = keeping.Memory()
    for _ in range(2 * plan.least):
        train.step()
    before = memory.peak_bytes
    memory.reset()
    writer = writers.Spotfirst(train, str(plan.folder / "spotfirst"))
    losses = losing.lose(train, writer, saves=plan.saves, least=plan.least)
    found = losses.summary()
    found["extra_bytes"] = memory.peak_bytes - before
    found["memcpy_s"] = _copy_s(train)
    idle, direct = _durable(train, writer, plan)
    found["idle_durable_s"] = idle
    found["o_direct_s"] = direct
    found["unchanged_share"] = keeping.unchanged_share(train, writer)
    found["state_bytes"] = train.state_bytes
    return found


def _durable(train: Training, writer: writers.Spotfirst, plan: Plan) -> tuple[float, float]:
    """With the training stopped: until a checkpoint is durable, and bare writes of the same bytes."""
    source = limits.warm(train.state_bytes)
    size = -(-train.state_bytes // limits.ALIGNMENT) * limits.ALIGNMENT
    ours: list[float] = []
    bare: dict[str, list[float]] = {}
    for _ in range(plan.rounds + 1):
        train.step()
        ours.append(writer.save())
        for name, took_s in limits.direct_write_s(
            plan.folder / "direct", source.view[:size]
        ).items():
            bare.setdefault(name, []).append(took_s)
    return median(ours[1:]), min(median(took[1:]) for took in bare.values())


def _copy_s(train: Training) -> float:
    if train.device.type == "cuda":
        return limits.device_copy_s(train.state_bytes)
    return limits.MemoryCopy(train.state_bytes).took_s()


def _eager(plan: Plan) -> dict[str, float]:
    train = Training(plan.size, plan.device)
    writer = writers.Spotfirst(train, str(plan.folder / "eager"), lazy=False)
    found = losing.lose(train, writer, saves=plan.peer_saves, least=plan.least).summary()
    return {**found, "memcpy_s": _copy_s(train)}


def _peer(name: str, plan: Plan) -> dict[str, float]:
    train = Training(plan.size, plan.device)
    train.step()  # the optimizer has a state from then on
    writer = writers.WRITERS[name](train, str(plan.folder / name))
    # A save that blocks has no steps beside it: two are enough.
    least = 2 if name == "torch_save" else plan.least
    found = losing.lose(train, writer, saves=plan.peer_saves, least=least).summary()
    if isinstance(writer, writers.TorchSave):
        found["unsynced_s"] = median(writer.unsynced_s)
    return found


def _keeping(plan: Plan) -> dict[str, float]:
    small, adapted = Training(training.SMALL), Training(training.LORA)
    return {
        "growth": keeping.growth(small, plan.folder / "small", plan.many),
        "lora_ratio": keeping.lora_ratio(adapted, plan.folder / "lora"),
    }


def _restoring(plan: Plan) -> dict[str, float]:
    from benchmarks.checkpointing import restoring

    found = restoring.compare(plan.size, plan.folder / "restore", rounds=plan.rounds)
    return {name: median(took_s) for name, took_s in found.items()}


def _s3(plan: Plan) -> dict[str, float]:
    from benchmarks.checkpointing import s3

    return s3.compare(plan.size, plan.folder / "s3", rounds=plan.rounds, seaweedfs=plan.seaweedfs)


JOBS: dict[str, Callable[[Plan], dict[str, float]]] = {
    "spotfirst": _spotfirst,
    "spotfirst_eager": _eager,
    "bare": lambda plan: _peer("bare", plan),
    "dcp_async": lambda plan: _peer("dcp_async", plan),
    "torch_save": lambda plan: _peer("torch_save", plan),
    "keeping": _keeping,
    "restoring": _restoring,
    "s3": _s3,
}
"""By name."""


def main() -> None:
    """Do the jobs one after the other, and print what they found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpointing.job")
    parser.add_argument("names", nargs="+", choices=list(JOBS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--scale", choices=["quick", "full", "gpu"], default="full")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    for name in options.names:
        start = time.perf_counter()
        found[name] = JOBS[name](plan(options.folder, options.scale))
        found[name]["load"] = round(os.getloadavg()[0], 1)
        print(f"  {name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
