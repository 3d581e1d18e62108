"""Imports torch once, and forks the ranks of a process group for each order on its input."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what forks would import, each again
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
import scenarios

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a scenario prints is no answer


def main() -> None:
    torch.set_num_threads(1)  # a fork inherits no thread pool
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            ranks = range(order["world_size"])
            kill_after_s = order["arguments"].pop("kill_after_s", None)
            processes = [fork(rank, order, Path(folder)) for rank in ranks]
            if kill_after_s is not None:
                time.sleep(kill_after_s)
                for process in processes:
                    os.kill(process, signal.SIGKILL)  # not waited for yet, so it is ours
            ends = []
            for rank, process in enumerate(processes):
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                result = Path(folder) / str(rank)
                ends.append((code, json.loads(result.read_text()) if result.exists() else None))
        print(json.dumps(ends), file=ANSWERS, flush=True)


def fork(rank: int, order: dict[str, Any], folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        value = run(rank, order, folder)
        code = 0
    except SystemExit as leaving:
        value, code = f"{type(leaving).__name__}: {leaving}", int(leaving.code or 0)
    except BaseException as error:  # noqa: BLE001 - the test looks at it
        value = f"{type(error).__name__}: {error}"
        if not order["arguments"].get("quiet"):
            traceback.print_exc()
    (folder / str(rank)).write_text(json.dumps(value))
    os._exit(code)


def run(rank: int, order: dict[str, Any], folder: Path) -> Any:
    world_size = order["world_size"]
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    arguments = {k: v for k, v in order["arguments"].items() if k != "quiet"}
    os.environ |= arguments.pop("environment", {})
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
            timeout=timedelta(seconds=20),
        )  # fmt: skip
    value = getattr(scenarios, order["scenario"])(**arguments)
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()
    return value


if __name__ == "__main__":
    main()
