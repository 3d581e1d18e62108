"""What goes wrong around an agent, and what must hold all the same."""

from __future__ import annotations

import os
import signal
import textwrap
import time
from pathlib import Path

from tests.waiting import PATIENCE_S, is_gone, wait_until

from .conftest import Instance, Lab

OUTAGE = """
import os, pathlib
from spotfirst import storage
from spotfirst.errors import StorageUnavailable
flag = pathlib.Path(os.environ["OUTAGE"])
real = storage.Storage._call
def _call(self, verb, path, *args, **kwargs):
    if flag.exists():
        raise StorageUnavailable(f"could not {verb} {path}: the test says so", path=path)
    return real(self, verb, path, *args, **kwargs)
storage.Storage._call = _call
"""


def outage(lab: Lab) -> tuple[Path, dict[str, str]]:
    """(a file that takes the storage away while it is there, the variables for it)."""
    (lab.folder / "patch").mkdir()
    (lab.folder / "patch" / "sitecustomize.py").write_text(textwrap.dedent(OUTAGE))
    flag = lab.folder / "outage"
    return flag, {"PYTHONPATH": str(lab.folder / "patch"), "OUTAGE": str(flag)}


def test_a_killed_agent_leaves_no_process_and_no_instance(lab: Lab) -> None:
    off = lab.folder / "off"
    run = lab.shell("setsid sleep 300 & sleep 300 & echo started; wait")
    instance = lab.start(run, SPOTFIRST_POWER_OFF=f"touch {off}")
    wait_until(lambda: instance.log_line("started"), "the command")
    instance.process.kill()
    wait_until(off.exists, "the power-off")
    assert lab.leftovers() == []
    assert run.exit_report(1) is None


def test_an_agent_that_hangs_does_not_outlive_its_life(lab: Lab) -> None:
    off = lab.folder / "off"
    instance = lab.start(
        lab.shell("sleep 300"), SPOTFIRST_MAX_LIFE_S="4", SPOTFIRST_POWER_OFF=f"touch {off}"
    )
    command = instance.until_running()
    instance.process.send_signal(signal.SIGSTOP)
    wait_until(off.exists, "the power-off")
    assert instance.process.wait(PATIENCE_S) == -signal.SIGKILL
    assert is_gone(command)


def test_the_instance_is_powered_off_after_the_report(lab: Lab) -> None:
    run = lab.shell("true")
    report = lab.storage.child(f"runs/{run.run_id}")
    path = lab.folder / "storage" / "runs" / run.run_id / "attempts" / "1" / "exit.json"
    off = lab.folder / "off"
    lab.start(run, SPOTFIRST_POWER_OFF=f"test -e {path} && touch {off}").exit()
    wait_until(off.exists, "the power-off")
    assert report.exists("attempts/1/exit.json")


def test_the_storage_may_be_away_at_boot(lab: Lab) -> None:
    flag, variables = outage(lab)
    flag.touch()
    instance = lab.start(lab.shell("true"), **variables)
    wait_until(lambda: "waiting for the storage" in lab.output(), "the outage to be seen")
    flag.unlink()
    assert instance.exit().cause == "completed"


def test_an_outage_stops_neither_the_training_nor_the_look_for_notices(lab: Lab) -> None:
    flag, variables = outage(lab)
    script = "i=0; while [ $i -lt 80 ]; do i=$((i+1)); echo line $i; sleep 0.05; done"
    instance = lab.start(lab.shell(script), **variables)
    instance.until(lambda beat: beat.log_segments > 0)
    flag.touch()
    time.sleep(0.5)  # for what is under way
    before = instance.beat()
    lab.metadata.interrupt(60)
    wait_until(lambda: "notice: interruption" in lab.output(), "the notice")
    wait_until(lambda: instance.log_line("line 80"), "the script to go on")
    assert instance.beat() == before
    flag.unlink()
    # Of a script that tells no steps, an exit with 0 may be its own answer to the notice.
    assert instance.exit().cause == "interrupted"
    lines = [line for line in instance.log().splitlines() if line.startswith("line")]
    assert lines == [f"line {n}" for n in range(1, 81)]


def test_a_notice_during_an_outage_still_drains_in_time(lab: Lab) -> None:
    flag, variables = outage(lab)
    # The trainer's own storage is fine: only the agent's is away.
    run = lab.create(env={"PYTHONPATH": ""})
    instance = lab.start(run, **variables)
    instance.until_step(12)
    flag.touch()
    time_ = lab.metadata.interrupt(5)
    wait_until(lambda: run.chain().refresh().released, "the last checkpoint")
    flag.unlink()
    assert instance.exit().cause == "interrupted"
    assert run.chain().refresh().commits[-1][1].at < time_


def test_a_killed_trainer_is_no_interruption(lab: Lab) -> None:
    instance = lab.start(lab.create())
    instance.until_step(3)
    os.kill(instance.until_running(), signal.SIGKILL)
    report = instance.exit()
    assert (report.cause, report.exit_code) == ("killed", -9)
    assert "memory" in report.message


def test_a_metadata_service_that_fails_is_no_notice(lab: Lab) -> None:
    lab.metadata.status = 500
    instance = lab.start(lab.create(env={"STEPS": "40"}))
    assert instance.exit().cause == "completed"
    assert ("GET", "/latest/meta-data/spot/instance-action", 500) in lab.metadata.asked


def test_an_error_inside_the_agent_is_lost_and_said_and_leaves_nothing(lab: Lab) -> None:
    run = lab.shell("sleep 300")
    instance = lab.start(run)
    instance.until_running()
    break_channel(lab, instance)
    report = instance.exit()
    assert report.cause == "lost"
    assert "the agent failed" in report.message


def break_channel(lab: Lab, instance: Instance) -> None:
    """Take away a folder that the agent looks into."""
    (lab.work / f"{instance.run.run_id}-1" / "checkpoints").rmdir()
