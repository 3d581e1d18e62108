"""A script that writes files in every way there is, moved and killed at random moments.

``SPOTFIRST_MOMENTS=200`` tries as many, ``SPOTFIRST_SEED`` others.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

from spotfirst.code import publish
from spotfirst.heartbeat import ExitReport
from tests.agent.conftest import Lab
from tests.waiting import wait_until

MOMENTS = int(os.environ.get("SPOTFIRST_MOMENTS", "6"))
SEED = int(os.environ.get("SPOTFIRST_SEED", "1"))
WRITER = Path(__file__).with_name("writer.py")


@pytest.mark.parametrize("with_torch", [False, True] if MOMENTS > 20 else [False])
def test_no_file_ever_comes_back_torn(lab: Lab, with_torch: bool) -> None:
    chance = random.Random(SEED)
    run = lab.create(
        "python", "writer.py", code=publish(lab.storage, WRITER), checkpoint_mode="files",
        checkpoint_period_s=1.0, env={"TORCH": str(int(with_torch))},
    )  # fmt: skip
    came_back: list[dict[str, int]] = []
    for attempt in range(1, MOMENTS + 2):
        lab.metadata.interruption = None
        instance = lab.start(run, attempt)
        wait_until(
            lambda: instance.log_line("RUNNING") or instance.log_line("TORN"),  # noqa: B023
            f"attempt {attempt}: {lab.output()[-2000:]}",
        )
        came_back.append(json.loads(instance.log_line("FOUND").removeprefix("FOUND ")))
        assert not instance.log_line("TORN"), lab.output()[-5000:]
        commits = len(run.chain().refresh().commits) + len(run.chain().refresh().pruned)
        wait_until(
            lambda: len((c := run.chain().refresh()).commits) + len(c.pruned) > commits,  # noqa: B023
            "a capture",
        )
        time.sleep(chance.uniform(0, 2.5))  # the moment that is tried
        how = chance.choice(["handover", "notice", "kill", "script", "shutdown"])
        print(f"attempt {attempt}: {came_back[-1]}, then {how}")  # noqa: T201
        if how == "handover":
            instance.hand_over(to=attempt + 1)
            instance.exit()
        elif how == "notice":
            lab.metadata.interrupt(6)
            instance.exit()
        elif how == "shutdown":
            instance.process.send_signal(signal.SIGTERM)
            instance.process.wait(120)
        else:
            if how == "kill":
                instance.process.kill()
                instance.process.wait(120)
            else:  # the system is out of memory, say
                for pid in lab.pids("writer.py"):
                    os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not lab.pids("writer.py"), "the end of the script")
            if how == "kill":
                now = datetime.now(timezone.utc)
                run.report_exit(ExitReport(attempt=attempt, at=now, cause="lost"))
            else:
                instance.exit()
    last = came_back[-1]
    for name in ("ckpt.pt", "model.joblib", "state.json", "study.db", "rows.dat", "run"):
        assert last[name] > 0, last
    for name in ("ckpt.pt", "model.joblib", "state.json", "study.db"):
        assert last[name] > came_back[1][name], f"{name} never came further: {came_back}"
