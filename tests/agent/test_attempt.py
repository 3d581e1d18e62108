"""The agent as an instance runs it: one process, one attempt, from boot to report."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from datetime import datetime, timedelta, timezone

import pytest

from spotfirst.agent.fitness import UNFIT
from spotfirst.checkpoints.mirroring import mirror
from spotfirst.spec import CodeRef, RunSpec
from tests.waiting import PATIENCE_S, wait_until

from .conftest import Lab


def now() -> datetime:
    return datetime.now(timezone.utc)


# -- the plain life -------------------------------------------------------------------------


def test_a_trainer_that_finishes_has_completed_and_told_all(lab: Lab) -> None:
    instance = lab.start(lab.create(env={"STEPS": "15"}))
    report = instance.exit()
    assert (report.cause, report.exit_code, report.message) == ("completed", 0, "")
    assert (report.progress.step, report.progress.checkpoint_step) == (15, 15)
    assert report.log_tail[-2:] == ("step 15", "trained")
    assert report.moved_bytes > 0
    timings = report.progress.timings
    stamps = [timings.booted, timings.fetched, timings.started, timings.standby, timings.claimed]
    assert None not in stamps
    assert stamps == sorted(stamps, key=lambda t: t or now())
    beat = instance.beat()
    assert beat is not None
    assert (beat.phase, beat.log_segments) == ("exited", report.log_segments)
    lines = instance.log().splitlines()
    assert [line for line in lines if line.startswith("step")] == [
        f"step {n}" for n in range(1, 16)
    ]


def test_the_command_finds_its_run_in_its_environment(lab: Lab) -> None:
    run = lab.shell("env | grep ^SPOTFIRST_ | sort; echo $MINE", env={"MINE": "from the spec"})
    log = "\n".join(lab.start(run, attempt=3).exit().log_tail)
    assert f"SPOTFIRST_RUN={run.run_id}" in log
    assert "SPOTFIRST_ATTEMPT=3" in log
    assert f"SPOTFIRST_STORAGE={lab.storage.url}" in log
    assert "SPOTFIRST_CHECKPOINT_PERIOD_S=300.0" in log
    for name in ("SPOTFIRST_CHANNEL", "SPOTFIRST_CHECKPOINT_DIR"):
        assert f"{name}={lab.work}" in log
    assert "from the spec" in log


def test_code_in_the_cache_is_not_moved_again(lab: Lab) -> None:
    run = lab.create(env={"STEPS": "12"})
    assert lab.start(run, attempt=1).exit().moved_bytes > 0
    report = lab.start(run, attempt=2).exit()
    assert (report.moved_bytes, report.progress.start_step) == (0, 12)


@pytest.mark.parametrize(
    ("script", "cause", "code"),
    [
        ("exit 1", "script_failed", 1),
        ("kill -9 $$", "killed", -9),
        ("kill -15 $$", "killed", -15),
        ("exit 143", "killed", 143),
    ],
)
def test_without_a_notice_every_end_is_the_scripts_own(
    lab: Lab, script: str, cause: str, code: int
) -> None:
    report = lab.start(lab.shell(script)).exit()
    assert (report.cause, report.exit_code) == (cause, code)


@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_script_that_leaves_after_a_notice_was_interrupted(lab: Lab, code: int) -> None:
    go = lab.folder / "go"
    wait = f"until [ -e {go} ]; do sleep 0.05; done; exit {code}"
    instance = lab.start(lab.shell(wait, heartbeat_s=60.0))
    instance.until_running()
    lab.metadata.interrupt(600)
    seen = instance.until(lambda beat: beat.notice is not None, "the notice, long before a beat")
    assert seen.notice is not None
    assert seen.notice.kind == "interruption"
    go.touch()
    assert instance.exit().cause == "interrupted"


def test_a_script_that_hears_of_the_notice_before_the_agent_was_interrupted(lab: Lab) -> None:
    go = lab.folder / "go"
    wait = f"until [ -e {go} ]; do sleep 0.05; done; exit 1"
    instance = lab.start(lab.shell(wait, notice_poll_s=3600.0))
    instance.until_running()
    wait_until(lambda: len(lab.metadata.asked) > 2, "the agent's only look")
    lab.metadata.interrupt(600)
    go.touch()
    assert instance.exit().cause == "interrupted"


@pytest.mark.parametrize("mode", ["trainer", "files"])
@pytest.mark.parametrize("code", [0, 1, 143])
def test_a_script_that_the_system_shuts_down_was_interrupted(
    lab: Lab, mode: str, code: int
) -> None:
    script = f"trap 'exit {code}' TERM; echo ready; while :; do sleep 0.05; done"
    instance = lab.start(lab.shell(script, checkpoint_mode=mode))
    command = instance.until_running()
    wait_until(lambda: instance.log_line("ready"), "the trap")
    os.kill(command, signal.SIGTERM)
    instance.process.send_signal(signal.SIGTERM)
    assert instance.exit().cause == "interrupted"


def test_a_missing_program_is_reported_in_words(lab: Lab) -> None:
    report = lab.start(lab.create("trian.py")).exit()
    assert (report.cause, report.exit_code) == ("script_failed", None)
    assert "no program 'trian.py'" in report.message


def test_missing_code_is_reported_in_words(lab: Lab) -> None:
    run = lab.create("true", code=CodeRef(digest="0" * 64, size_bytes=1))
    report = lab.start(run).exit()
    assert report.cause == "script_failed"
    assert f"code/{'0' * 64}" in report.message


def test_the_wrong_environment_is_refused_by_name(lab: Lab) -> None:
    instance = lab.start(lab.shell("true"), SPOTFIRST_ATTEMPT="first")
    assert instance.process.wait(PATIENCE_S) == UNFIT
    assert "SPOTFIRST_ATTEMPT is 'first'" in lab.output()


# -- stopping -------------------------------------------------------------------------------


def test_a_successor_takes_over_where_the_first_stopped(lab: Lab) -> None:
    run = lab.create(env={"STEPS": "5000"})
    first = lab.start(run)
    first.until_step(5)
    lab.metadata.interrupt(60)
    first.until(lambda beat: beat.notice is not None)
    second = lab.start(run, attempt=2)
    report = first.exit()
    assert (report.cause, report.exit_code) == ("interrupted", 0)
    assert report.progress.released
    assert report.progress.checkpoint_step == report.progress.step
    second.until_step((report.progress.step or 0) + 5)
    second.hand_over()
    assert second.exit().progress.start_step == report.progress.step


def test_a_handover_without_a_notice_is_handed_over(lab: Lab) -> None:
    instance = lab.start(lab.create())
    instance.until_step(3)
    instance.hand_over(to=2)
    report = instance.exit()
    assert (report.cause, report.progress.phase) == ("handed_over", "draining")
    assert any("handover to attempt 2: a test" in line for line in instance.log().splitlines())


def test_a_recommendation_is_told_and_waits_for_a_successor(lab: Lab) -> None:
    instance = lab.start(lab.create())
    instance.until_step(3)
    lab.metadata.recommend()
    beat = instance.until(lambda b: b.notice is not None)
    instance.until_step((beat.progress.step or 0) + 20)
    instance.hand_over()
    assert instance.exit().cause == "handed_over"


def test_without_a_successor_it_drains_when_only_the_margin_is_left(lab: Lab) -> None:
    instance = lab.start(lab.create())
    instance.until_step(15)  # so a checkpoint has been measured
    time_ = lab.metadata.interrupt(5)
    report = instance.exit()
    assert report.cause == "interrupted"
    assert report.progress.checkpoint_step == report.progress.step
    left_s = (time_ - report.at).total_seconds()
    assert 0 < left_s < 3


def test_an_interrupted_instance_is_left_to_the_fleet_which_may_take_it_for_free(lab: Lab) -> None:
    instance = lab.start(lab.create())
    instance.until_step(3)
    lab.metadata.interrupt(60)
    instance.until(lambda beat: beat.notice is not None)
    instance.hand_over(to=2)
    wait_until(lambda: instance.run.exit_report(1), "the exit report")
    with pytest.raises(subprocess.TimeoutExpired):
        instance.process.wait(1)
    assert instance.exit().cause == "interrupted"


def test_a_shutdown_of_the_instance_drains_at_once(lab: Lab) -> None:
    instance = lab.start(lab.create())
    instance.until_step(3)
    instance.process.send_signal(signal.SIGTERM)
    report = instance.exit()
    assert (report.cause, report.progress.released) == ("interrupted", True)


def test_a_drain_that_is_ignored_ends_with_a_kill_and_still_a_report(lab: Lab) -> None:
    instance = lab.start(lab.create(env={"ON_DRAIN": "ignore"}), SPOTFIRST_SHUTDOWN_WINDOW_S="1")
    instance.until_step(3)
    instance.process.send_signal(signal.SIGTERM)
    report = instance.exit()
    assert (report.cause, report.exit_code) == ("interrupted", -9)
    assert "did not stop in time" in report.message


def test_a_failure_during_the_drain_goes_on_elsewhere_and_says_so(lab: Lab) -> None:
    instance = lab.start(lab.create(env={"ON_DRAIN": "fail"}))
    instance.until_step(3)
    instance.hand_over(to=2)
    report = instance.exit()
    assert (report.cause, report.exit_code) == ("handed_over", 3)
    assert "before its last checkpoint the command exited with code 3" in report.message
    assert report.log_tail[-1] == "a bug in the last checkpoint"


def test_a_crash_after_the_release_lost_nothing(lab: Lab) -> None:
    instance = lab.start(lab.create(env={"ON_DRAIN": "segfault"}))
    instance.until_step(3)
    instance.hand_over(to=2)
    report = instance.exit()
    assert (report.cause, report.exit_code) == ("handed_over", -11)


def test_a_trainer_that_finishes_during_the_drain_has_completed(lab: Lab) -> None:
    instance = lab.start(lab.create(env={"ON_DRAIN": "ignore", "STEPS": "60"}))
    instance.until_step(3)
    instance.hand_over(to=2)
    assert instance.exit().cause == "completed"


def test_a_trainer_that_was_overtaken_has_handed_over(lab: Lab) -> None:
    run = lab.create()
    instance = lab.start(run)
    instance.until_step(3)
    run.chain().claim(2)
    report = instance.exit()
    assert (report.cause, report.exit_code) == ("handed_over", 75)


def test_a_script_that_knows_no_checkpointer_is_not_waited_for_in_a_handover(lab: Lab) -> None:
    # A trainer would be waited for as long as this.
    instance = lab.start(lab.shell("sleep 7200"), SPOTFIRST_DRAIN_PATIENCE_S="7200")
    instance.until_running()
    instance.hand_over(to=2)
    assert instance.exit().cause == "handed_over"


def test_what_the_disk_had_no_room_to_tell_is_read_from_the_chain(lab: Lab) -> None:
    run = lab.create(env={"STEPS": "20", "MUTE_FROM": "5"})
    report = lab.start(run).exit()
    assert report.cause == "completed", lab.output()
    assert (report.progress.step, report.progress.checkpoint_step) == (20, 20)


def test_a_life_ends_with_a_checkpoint(lab: Lab) -> None:
    instance = lab.start(lab.create(max_life_s=4.0), SPOTFIRST_MAX_LIFE_S="3600")
    report = instance.exit()
    assert report.cause == "max_life"
    assert report.progress.checkpoint_step == report.progress.step


def test_a_second_agent_for_the_attempt_touches_nothing(lab: Lab) -> None:
    run = lab.create()
    instance = lab.start(run)
    instance.until_step(3)
    other = lab.start(run, SPOTFIRST_WORKDIR=str(lab.folder / "elsewhere"))
    assert other.process.wait(PATIENCE_S) == 0
    same_machine = lab.start(run)
    assert same_machine.process.wait(PATIENCE_S) == 0
    assert run.exit_report(1) is None
    beat = instance.beat()
    instance.until_step((beat.progress.step if beat else 0) or 0 + 5)
    instance.hand_over()
    assert instance.exit().cause == "handed_over"
    assert lab.start(run).process.wait(PATIENCE_S) == 0


# -- files mode -----------------------------------------------------------------------------

COUNTER = """
n=$(cat $SPOTFIRST_CHECKPOINT_DIR/n 2>/dev/null || echo 0); echo from $n
while [ $n -lt 1000 ]; do
  n=$((n+1)); echo $n > $SPOTFIRST_CHECKPOINT_DIR/.n; sleep 0.05
  mv $SPOTFIRST_CHECKPOINT_DIR/.n $SPOTFIRST_CHECKPOINT_DIR/n
done
"""


def test_in_files_mode_a_successor_goes_on_from_the_files(lab: Lab) -> None:
    run = lab.shell(COUNTER, checkpoint_mode="files", checkpoint_period_s=0.3)
    first = lab.start(run)
    first.until_running()
    wait_until(lambda: first.log_line("from"), "the script")
    time.sleep(0.5)
    second = lab.start(run, attempt=2)
    report = first.exit()
    assert (report.cause, report.progress.released) == ("handed_over", True)
    start = int(wait_until(lambda: second.log_line("from"), "the second script").split()[1])
    assert start > 0
    time.sleep(0.3)
    second.hand_over()
    ended = second.exit()
    assert (ended.progress.checkpoint_step or 0) > (ended.progress.start_step or 0) > 0


def test_in_files_mode_the_last_files_of_a_finished_script_are_kept(lab: Lab) -> None:
    run = lab.shell("echo done > $SPOTFIRST_CHECKPOINT_DIR/model", checkpoint_mode="files")
    report = lab.start(run).exit()
    assert (report.cause, report.progress.checkpoint_step) == ("completed", 1)
    assert run.chain().refresh().released


WRITER = """
import os, pathlib, time
model = pathlib.Path(os.environ["SPOTFIRST_CHECKPOINT_DIR"], "model")
model.write_text("whole")
while not os.path.exists(os.environ["GO"]):
    time.sleep(0.02)
with model.open("w") as file:
    print("half", file=file, flush=True)
    print("half", flush=True)
    time.sleep(300)
"""


def test_in_files_mode_a_file_that_was_being_written_at_the_end_is_kept_as_it_was(lab: Lab) -> None:
    go = lab.folder / "go"
    run = lab.create(
        "python", "-c", WRITER, checkpoint_mode="files", checkpoint_period_s=0.2,
        env={"GO": str(go)},
    )  # fmt: skip
    instance = lab.start(run)
    wait_until(lambda: run.chain().refresh().commits, "the first write")
    go.touch()
    wait_until(lambda: instance.log_line("half"), "the second write")
    instance.hand_over()
    report = instance.exit()
    assert report.cause == "handed_over"
    assert "was being written" in report.progress.warnings[-1]
    mirror(run.packs(), run.chain().refresh().commits[-1][1], lab.folder / "kept")
    assert (lab.folder / "kept" / "model").read_text() == "whole"


LEFT_BEHIND = """
import os, pathlib, subprocess, sys, time
def wait_for(name):
    while not os.path.exists(os.environ[name]):
        time.sleep(0.02)
model = pathlib.Path(os.environ["SPOTFIRST_CHECKPOINT_DIR"], "model")
if len(sys.argv) > 1:
    with model.open("w") as file:
        while True:
            print("half", file=file, flush=True)
            pathlib.Path(os.environ["HALF"]).touch()
            time.sleep(0.001)
model.write_text("whole")
wait_for("GO")
subprocess.Popen([sys.executable, "-c", os.environ["CODE"], "child"], start_new_session=NEW_SESSION)
wait_for("HALF")
"""


@pytest.mark.parametrize("new_session", [False, True])
def test_in_files_mode_what_a_process_that_is_left_behind_was_writing_is_kept_as_it_was(
    lab: Lab, new_session: bool
) -> None:
    code = LEFT_BEHIND.replace("NEW_SESSION", str(new_session))
    run = lab.create(
        "python", "-c", code, checkpoint_mode="files", checkpoint_period_s=0.2,
        env={"GO": str(lab.folder / "go"), "HALF": str(lab.folder / "half"), "CODE": code},
    )  # fmt: skip
    instance = lab.start(run)
    wait_until(lambda: run.chain().refresh().commits, "the first write")
    (lab.folder / "go").touch()
    report = instance.exit()
    assert report.cause == "completed"
    assert "was being written" in report.progress.warnings[-1]
    mirror(run.packs(), run.chain().refresh().commits[-1][1], lab.folder / "kept")
    assert (lab.folder / "kept" / "model").read_text() == "whole"


def test_in_files_mode_what_was_saved_before_a_crash_is_there_and_proves_nothing(lab: Lab) -> None:
    """The instance is there, and so are the files."""
    run = lab.shell(
        """
        echo had $(ls "$SPOTFIRST_CHECKPOINT_DIR")
        python -m zipfile -c "$SPOTFIRST_CHECKPOINT_DIR/model.zip" /etc/passwd; kill -9 $$
        """,
        checkpoint_mode="files", checkpoint_period_s=1000,
    )  # fmt: skip
    report = lab.start(run).exit()
    assert report.cause == "killed"
    assert (report.progress.step, report.progress.checkpoint_step) == (0, None)
    second = lab.start(run, attempt=2)
    wait_until(lambda: second.log_line("had model.zip"), "the second script")
    second.exit()


def test_files_without_files_mode_are_warned_about(lab: Lab) -> None:
    run = lab.shell("echo x > $SPOTFIRST_CHECKPOINT_DIR/model.pt; exec sleep 60")
    instance = lab.start(run)
    beat = instance.until(lambda b: bool(b.progress.warnings))
    assert 'checkpoint_mode="files"' in beat.progress.warnings[0]
    os.kill(instance.until_running(), signal.SIGKILL)
    assert instance.exit().progress.warnings == beat.progress.warnings


@pytest.mark.slow
def test_a_script_that_restores_no_checkpointer_is_warned_about(lab: Lab) -> None:
    instance = lab.start(lab.shell("exec sleep 600", checkpoint_period_s=1))
    beat = instance.until(lambda b: bool(b.progress.warnings))
    (warning,) = beat.progress.warnings
    assert "has run for 60 s and has restored no Checkpointer yet" in warning
    assert beat.progress.timings.started is not None
    assert beat.at - beat.progress.timings.started >= timedelta(seconds=60)
    os.kill(instance.until_running(), signal.SIGKILL)
    instance.exit()


# -- data -----------------------------------------------------------------------------------


def test_the_dataset_is_there_before_the_command(lab: Lab) -> None:
    datasets = pytest.importorskip("spotfirst.datasets")
    source = lab.folder / "data"
    source.mkdir()
    (source / "a.txt").write_text("one sample")
    datasets.commit(lab.storage, "corpus", source)
    run = lab.shell(
        "cat $SPOTFIRST_DATASET_DIR/a.txt", dataset=datasets.resolve(lab.storage, "corpus")
    )
    report = lab.start(run).exit()
    assert report.log_tail[-1] == "one sample"
    assert report.moved_bytes > 0


def test_the_spec_is_read_by_the_newest_amendment(lab: Lab) -> None:
    run = lab.shell("exit 1")
    spec = run.spec()
    amended: RunSpec = type(spec)(
        **{name: getattr(spec, name) for name in spec.__struct_fields__ if name != "command"},
        command=("true",),
    )
    run.amend(amended)
    assert lab.start(run).exit().cause == "completed"
