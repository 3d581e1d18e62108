"""Imports a training script once, and forks a process for each order; see ``conftest.py``.

An order is a line of JSON on its input; the answers are the process's id, and ``ended`` with its
exit status.
"""

# ruff: noqa: T201
from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # the first optimizer of each fork would import it, for seconds


def main() -> None:
    torch.set_num_threads(1)  # a fork inherits no thread pool
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    script = importlib.import_module(f"tests.integrations.{sys.argv[1]}")
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            os._exit(work(script, json.loads(line)))
        print(process, flush=True)
        print("ended", os.waitpid(process, 0)[1], flush=True)


def work(script: Any, order: dict[str, Any]) -> int:
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the answers are the parent's
    os.environ.update(order["environment"])
    try:
        weights = script.train(order["variant"], resumable=bool(order["environment"]))
    except SystemExit as left:
        return int(left.code or 0)
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent would
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    Path(order["out"]).write_text(weights)
    return 0


if __name__ == "__main__":
    main()
