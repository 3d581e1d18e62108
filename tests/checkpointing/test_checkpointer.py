from __future__ import annotations

import errno
import gc
import logging
import random
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from spotfirst._storage_local import LocalStorage
from spotfirst.checkpointer import Checkpointer, Drained, Superseded, weights_sha256
from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.manifest import read_manifest
from spotfirst.checkpoints.packs import PackWriter
from spotfirst.checkpoints.weights import state_digest
from spotfirst.errors import (
    CorruptObject,
    InvalidSpec,
    StateMismatch,
    StorageUnavailable,
    UnsupportedState,
)
from spotfirst.heartbeat import ExitReport
from spotfirst.run import Run, create_run
from spotfirst.spec import ResumeFrom, RunSpec
from spotfirst.storage import Storage, open_storage
from tests.checkpointing.conftest import LONG_AGO
from tests.checkpointing.storages import Outage, faulty
from tests.checkpointing.training import (
    STEPS,
    Trainer,
    ask_to_drain,
    attempt,
    progress,
    train_until,
    uninterrupted,
)
from tests.waiting import PATIENCE_S, wait_until


@pytest.fixture(scope="module")
def expected() -> str:
    return uninterrupted()


def _commits(run: Run) -> list[tuple[int, Commit]]:
    return run.chain().refresh().commits


def _damage(run: Run, commit: Commit, *, delete: bool) -> None:
    """Spoil the pack that only this checkpoint has."""
    packs = run.packs()
    manifest = read_manifest(packs, commit.manifest, commit.digest)
    pack = next(p.name for p in manifest.packs if p.name[:15] == commit.manifest[:15])
    if delete:
        packs.delete(pack)
    else:
        data = bytearray(packs.read(pack))
        data[len(data) // 2] ^= 1
        packs.write(pack, bytes(data))


# -- a whole run ----------------------------------------------------------------------------


def test_a_run_ends_with_a_checkpoint_of_its_last_step(
    run: Run, tmp_path: Path, expected: str
) -> None:
    context = attempt(run, 1, tmp_path)
    assert Trainer(context).train() == expected
    ((seq, commit),) = _commits(run)
    assert (commit.step, commit.content, commit.attempt) == (STEPS, "state", 1)
    assert commit.metrics["loss"] > 0
    assert state_digest(run.packs(), commit) == expected
    told = progress(context)
    assert (told.phase, told.step, told.total_steps) == ("training", STEPS, STEPS)
    assert (told.checkpoint_seq, told.checkpoint_step, told.released) == (seq, STEPS, False)
    assert told.metrics == commit.metrics
    times = told.timings
    order = [times.standby, times.claimed, times.restored, times.first_step, times.last_step]
    assert order == sorted(moment for moment in order if moment is not None)
    assert told.checkpoint_s is not None
    assert told.checkpoint_s > 0


@pytest.mark.parametrize("seed", range(4))
def test_draining_at_any_steps_changes_no_bit_and_repeats_no_step(
    run: Run, tmp_path: Path, expected: str, seed: int
) -> None:
    stops = sorted(random.Random(seed).sample(range(1, STEPS), 3))
    for number, stop in enumerate(stops, start=1):
        context = attempt(run, number, tmp_path)
        period_s = random.Random(seed + number).choice([0.0, 300.0])
        train_until(context, stop, period_s=period_s)
        told = progress(context)
        assert (told.phase, told.released, told.checkpoint_step) == ("draining", True, stop)
        assert told.timings.drained is not None
    seen: list[int] = []
    last = attempt(run, 4, tmp_path)
    assert Trainer(last).train(at_step=seen.append) == expected
    assert seen == list(range(stops[-1], STEPS))
    assert progress(last).start_step == stops[-1]


def test_an_attempt_after_the_last_step_finds_nothing_to_do(
    run: Run, tmp_path: Path, expected: str
) -> None:
    Trainer(attempt(run, 1, tmp_path)).train()
    _exit(run, 1)
    seen: list[int] = []
    assert Trainer(attempt(run, 2, tmp_path)).train(at_step=seen.append) == expected
    assert seen == []
    assert len(_commits(run)) == 1


def test_the_explicit_form_does_the_same(run: Run, tmp_path: Path, expected: str) -> None:
    train_until(attempt(run, 1, tmp_path), 5)
    trainer = Trainer(attempt(run, 2, tmp_path), total_steps=STEPS)
    start = trainer.checkpointer.restore()
    assert start == 5
    for step in range(start, STEPS):
        trainer.checkpointer.step(step + 1, loss=trainer.train_one_step())
    trainer.checkpointer.close()
    assert weights_sha256(trainer.model) == expected
    assert [commit.step for _, commit in _commits(run)] == [5, STEPS]


def test_a_loop_that_trains_on_after_its_last_step_is_warned_of_once(
    run: Run, tmp_path: Path
) -> None:
    Trainer(attempt(run, 1, tmp_path)).train()
    _exit(run, 1)
    again = attempt(run, 2, tmp_path)
    trainer = Trainer(again)
    done = trainer.checkpointer.restore()
    trainer.checkpointer.expect(STEPS)
    for _ in range(2):  # it would ask only now whether that was enough
        done += 1
        trainer.checkpointer.step(done)
    (warning,) = progress(again).warnings
    assert f"trained on after its last step: step {STEPS + 1} of {STEPS}" in warning


def test_a_second_loop_goes_on_where_the_first_ended(run: Run, tmp_path: Path) -> None:
    trainer = Trainer(attempt(run, 1, tmp_path))
    assert list(trainer.checkpointer.steps(3)) == [0, 1, 2]
    assert list(trainer.checkpointer.steps(5)) == [3, 4]
    assert [commit.step for _, commit in _commits(run)] == [3, 5]


def test_a_run_can_start_from_another_runs_checkpoint(
    run: Run, storage: Storage, tmp_path: Path, expected: str
) -> None:
    train_until(attempt(run, 1, tmp_path), 4)
    train_until(attempt(run, 2, tmp_path), 8)
    seq, commit = _commits(run)[0]
    spec = msgspec.structs.replace(
        run.spec(), run_id="replay", resume_from=ResumeFrom(run_id="r", step=commit.step, seq=seq)
    )
    replay = create_run(storage, spec)
    train_until(attempt(replay, 1, tmp_path / "replay"), 6)
    for path, _ in list(run.storage.walk("")):
        run.storage.delete(path)  # from here on the replay stands by itself
    assert Trainer(attempt(replay, 2, tmp_path / "replay")).train() == expected


def test_a_replay_starts_from_the_very_checkpoint_that_was_named(
    run: Run, storage: Storage, tmp_path: Path
) -> None:
    """Whoever writes to the parent's chain does not choose what the child begins with."""
    train_until(attempt(run, 1, tmp_path), 4)
    seq, commit = _commits(run)[0]
    source = ResumeFrom(run_id="r", step=commit.step, seq=seq, digest="0" * 64)
    spec = msgspec.structs.replace(run.spec(), run_id="replay", resume_from=source)
    replay = create_run(storage, spec)
    with pytest.raises(CorruptObject, match=r"another than the one .* somebody replaced it"):
        Trainer(attempt(replay, 1, tmp_path / "replay")).train()


# -- saving ---------------------------------------------------------------------------------


def test_a_checkpoint_is_begun_when_its_period_is_over(run: Run, tmp_path: Path) -> None:
    now = [0.0]
    trainer = Trainer(attempt(run, 1, tmp_path), period_s=30, monotonic=lambda: now[0])
    for _ in trainer.checkpointer.steps(10):
        now[0] += 10
        trainer.train_one_step()
        assert trainer.checkpointer._saver is not None
        trainer.checkpointer._saver.finish()
    assert [commit.step for _, commit in _commits(run)] == [3, 6, 9, 10]


def test_the_period_comes_from_the_agent(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOTFIRST_CHECKPOINT_PERIOD_S", "17.5")
    assert Trainer(attempt(run, 1, tmp_path)).checkpointer._schedule.period.period_s <= 17.5
    monkeypatch.setenv("SPOTFIRST_CHECKPOINT_PERIOD_S", "often")
    with pytest.raises(InvalidSpec, match="often"):
        Trainer(attempt(run, 1, tmp_path))


def test_training_goes_on_beside_a_save_and_the_copy_is_of_its_step(
    run: Run, tmp_path: Path
) -> None:
    gate = threading.Event()
    slow = Run(_gated(run.root, gate), "r")
    trainer = Trainer(attempt(slow, 1, tmp_path), period_s=0)
    checkpointer = trainer.checkpointer
    checkpointer.restore()
    trainer.train_one_step()
    checkpointer.step(1)
    first = weights_sha256(trainer.model)
    for done in range(2, 5):
        trainer.train_one_step()
        checkpointer.step(done)
    assert weights_sha256(trainer.model) != first
    (warning,) = progress(attempt(slow, 1, tmp_path)).warnings
    assert "longer than its period" in warning
    gate.set()
    checkpointer.close()
    (_, one), (_, four) = _commits(run)
    assert (one.step, four.step) == (1, 4)
    assert state_digest(run.packs(), one) == first
    assert state_digest(run.packs(), four) == weights_sha256(trainer.model)


def test_an_unreachable_storage_does_not_stop_training(
    run: Run, tmp_path: Path, expected: str
) -> None:
    outage = Outage()
    context = attempt(Run(outage.over(run.root), "r"), 1, tmp_path)
    trainer = Trainer(context, period_s=0, sleep=lambda _: outage.wait())

    def at_step(step: int) -> None:
        if step == 2:
            wait_until(lambda: _commits(run), "the first checkpoint")
            outage.begin()
        if step == STEPS - 1:
            assert [c.step for _, c in _commits(run)][-1] <= 3  # training was not held up
            outage.end()

    assert trainer.train(at_step=at_step) == expected
    assert _commits(run)[-1][1].step == STEPS
    assert any("trying again" in warning for warning in progress(context).warnings)


def test_a_commit_whose_answer_was_lost_is_not_made_twice(run: Run, tmp_path: Path) -> None:
    lost: list[str] = []

    def lose(verb: str, path: str) -> None:
        if (verb, path) == ("create", "checkpoints/00000002.json") and not lost:
            lost.append(path)
            raise StorageUnavailable(path)

    storage = faulty(run.root, after=lose)
    trainer = Trainer(attempt(Run(storage, "r"), 1, tmp_path), sleep=lambda _: None)
    trainer.train(3)
    assert lost
    assert [commit.step for _, commit in _commits(run)] == [3]


def test_a_save_that_fails_is_told_and_the_next_one_tries_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = attempt(run, 1, tmp_path)
    checkpointer = Trainer(context).checkpointer
    checkpointer.restore()
    checkpointer.step(1)
    with monkeypatch.context() as patched:
        patched.setattr(PackWriter, "place", _raise(ValueError("no such thing")))
        assert checkpointer.save(wait=False)
        assert checkpointer._saver is not None
        assert isinstance(checkpointer._saver.finish(), ValueError)
        assert any("no such thing" in warning for warning in progress(context).warnings)
        with pytest.raises(ValueError, match="no such thing"):
            checkpointer.save(wait=True)
    checkpointer.step(2)
    checkpointer.close()
    assert [commit.step for _, commit in _commits(run)] == [2]


def test_metrics_that_are_no_numbers_are_left_out_with_a_warning(run: Run, tmp_path: Path) -> None:
    context = attempt(run, 1, tmp_path)
    trainer = Trainer(context)
    for _ in trainer.checkpointer.steps(2):
        trainer.checkpointer.report(loss=float("nan"), accuracy=torch.tensor(0.5))
    told = progress(context)
    assert told.metrics == {"accuracy": 0.5}
    assert told.warnings == ("metric loss is nan",)


def test_a_drain_whose_checkpoint_fails_keeps_the_previous_one_and_still_releases(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = attempt(run, 1, tmp_path)
    checkpointer = Trainer(context).checkpointer
    checkpointer.restore()
    checkpointer.step(1)
    checkpointer.save()
    ask_to_drain(context)
    monkeypatch.setattr(PackWriter, "place", _raise(ValueError("no such thing")))
    with pytest.raises(Drained):
        checkpointer.step(2)
    assert [commit.step for _, commit in _commits(run)] == [1]
    assert run.chain().refresh().released
    assert any("could not be saved" in warning for warning in progress(context).warnings)


# -- one trainer ----------------------------------------------------------------------------


def test_a_trainer_whose_claim_is_taken_stops_at_a_step_boundary(
    run: Run, tmp_path: Path, expected: str
) -> None:
    first = attempt(run, 1, tmp_path)
    old = Trainer(first, period_s=0)

    def at_step(step: int) -> None:
        if step == 4:
            run.chain().claim(2)

    with pytest.raises(Superseded) as left:
        old.train(at_step=at_step)
    assert left.value.code == 75
    assert left.value.holder == 2
    with pytest.raises(Superseded):
        old.checkpointer.step(STEPS)
    told = progress(first)
    assert told.released
    assert "attempt 2 has taken over" in told.warnings[-1]
    assert all(commit.attempt == 1 and commit.step <= 4 for _, commit in _commits(run))
    assert Trainer(attempt(run, 2, tmp_path)).train() == expected


def test_an_attempt_that_comes_too_late_never_trains(run: Run, tmp_path: Path) -> None:
    run.chain().claim(2)
    with pytest.raises(Superseded):
        Trainer(attempt(run, 1, tmp_path)).train(at_step=lambda _: pytest.fail("it trained"))


@pytest.mark.parametrize("leaving", [Drained(3), Superseded(2)])
def test_leaving_passes_an_except_exception(leaving: BaseException) -> None:
    assert not isinstance(leaving, Exception)


def test_a_standby_takes_over_when_the_trainer_has_drained(run: Run, tmp_path: Path) -> None:
    first, second = attempt(run, 1, tmp_path), attempt(run, 2, tmp_path)
    old = Checkpointer(model=torch.nn.Linear(1, 1), context=first)
    steps = old.steps(100)
    assert [next(steps) for _ in range(3)] == [0, 1, 2]

    def one_more_step(_: float) -> None:  # while the standby waits
        assert progress(second).phase == "standby"
        if (handover := run.handover(1)) is None:  # it still reads ahead
            time.sleep(0.01)
            return
        assert handover.to == 2
        ask_to_drain(first)  # what the agent does when it sees it
        with pytest.raises(Drained):
            next(steps)

    new = Checkpointer(model=torch.nn.Linear(1, 1), context=second, sleep=one_more_step)
    assert new.restore() == 3
    assert run.chain().refresh().holder == 2
    assert progress(second).start_step == 3
    # Steps in quick succession are told now and then, but the last one always.
    assert (progress(first).step, progress(first).checkpoint_step) == (3, 3)


def test_a_standby_that_is_itself_asked_to_stop_leaves_without_a_claim(
    run: Run, tmp_path: Path
) -> None:
    run.chain().claim(1)
    second = attempt(run, 2, tmp_path)
    ask_to_drain(second)
    with pytest.raises(Drained):
        Trainer(second).train()
    assert run.chain().refresh().holder == 1
    assert progress(second).released


# -- restoring ------------------------------------------------------------------------------


@pytest.mark.parametrize("delete", [True, False])
def test_a_damaged_checkpoint_is_passed_over_loudly(
    run: Run, tmp_path: Path, expected: str, caplog: pytest.LogCaptureFixture, delete: bool
) -> None:
    train_until(attempt(run, 1, tmp_path), 4)
    train_until(attempt(run, 2, tmp_path), 8)
    _damage(run, _commits(run)[-1][1], delete=delete)
    third = attempt(run, 3, tmp_path)
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        assert Trainer(third).train(at_step=seen.append) == expected
    assert seen[0] == 4
    assert "checkpoint 5 of step 8 cannot be read" in caplog.text
    assert "checkpoint 5 of step 8 cannot be read" in progress(third).warnings[0]


def test_a_run_whose_every_checkpoint_is_damaged_does_not_start_anew(
    run: Run, tmp_path: Path
) -> None:
    train_until(attempt(run, 1, tmp_path), 4)
    _damage(run, _commits(run)[0][1], delete=True)
    with pytest.raises(CorruptObject, match="none of the 1 checkpoints"):
        Trainer(attempt(run, 2, tmp_path)).train()


def test_a_checkpoint_of_another_model_is_refused_with_a_list(run: Run, tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    first = Checkpointer(model=model, ema=model, context=attempt(run, 1, tmp_path))
    list(first.steps(1))
    _exit(run, 1)
    other = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3).half(), "c": torch.nn.Linear(2, 2)})
    before = weights_sha256(other)
    second = Checkpointer(model=other, extra=other, context=attempt(run, 2, tmp_path))
    with pytest.raises(StateMismatch) as refusal:
        second.restore()
    for line in (
        "extra is not in the checkpoint",
        "ema is in the checkpoint, and was not given",
        "model: a.weight is float16[3, 2] here and float32[2, 2] in the checkpoint",
        "model: b.bias is not in the model",
        "model: c.bias is not in the checkpoint",
    ):
        assert line in str(refusal.value)
    assert weights_sha256(other) == before


def test_an_optimizer_that_refuses_its_state_is_named(run: Run, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    one = torch.optim.SGD(model.parameters())
    list(Checkpointer(opt=one, context=attempt(run, 1, tmp_path)).steps(1))
    _exit(run, 1)
    # Without names (no module is given), torch compares the numbers of groups and parameters.
    groups: list[dict[str, Any]] = [{"params": [model.weight]}, {"params": [model.bias]}]
    two = torch.optim.SGD(groups)
    with pytest.raises(StateMismatch, match=r"opt\.load_state_dict\(\) refused"):
        Checkpointer(opt=two, context=attempt(run, 2, tmp_path)).restore()


def test_what_no_checkpoint_could_hold_is_refused_before_training(run: Run, tmp_path: Path) -> None:
    class Odd(torch.nn.Linear):
        def get_extra_state(self) -> Any:
            return {"callback": print}

    checkpointer = Checkpointer(model=Odd(1, 1), context=attempt(run, 1, tmp_path))
    with pytest.raises(UnsupportedState, match="callback"):
        checkpointer.restore()


def test_objects_without_a_state_are_refused_by_name() -> None:
    with pytest.raises(
        InvalidSpec, match=r"without state_dict\(\) .*: data \(list\), none \(NoneType\);"
    ):
        Checkpointer(model=torch.nn.Linear(1, 1), data=[1, 2], none=None)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(3, generator=g).tolist()),
        (lambda: random.Random(1), lambda g: [g.random(), g.gauss(0, 1)]),
        (lambda: np.random.default_rng(1), lambda g: g.standard_normal(3).tolist()),
        (
            lambda: np.random.Generator(np.random.MT19937(1)),
            lambda g: g.integers(9, size=3).tolist(),
        ),
        (lambda: np.random.RandomState(1), lambda g: g.randn(3).tolist()),
    ],
)
def test_a_generator_of_any_kind_goes_on_where_it_was(
    tmp_path: Path, make: Callable[[], Any], draw: Callable[[Any], list[float]]
) -> None:
    first, again = make(), make()
    checkpointer = Checkpointer(draws=first, storage=str(tmp_path))
    checkpointer.restore()
    draw(first)
    checkpointer.step(1)
    checkpointer.close()
    Checkpointer(draws=again, storage=str(tmp_path)).restore()
    assert draw(again) == draw(first)


def test_a_step_before_restoring_is_an_error(run: Run, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpec, match="restore"):
        Trainer(attempt(run, 1, tmp_path)).checkpointer.step(1)


def test_several_processes_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidSpec, match="WORLD_SIZE"):
        Trainer(attempt(run, 1, tmp_path)).checkpointer.restore()


def test_a_run_whose_agent_keeps_files_refuses_a_checkpointer(
    files_run: Run, tmp_path: Path
) -> None:
    with pytest.raises(InvalidSpec, match="checkpoint_mode"):
        Trainer(attempt(files_run, 1, tmp_path)).train()


def test_a_run_survives_on_s3(s3_url: str, tmp_path: Path, expected: str) -> None:
    spec = RunSpec(run_id="r", created_at=LONG_AGO, command=("train",))
    run = create_run(open_storage(s3_url), spec)
    train_until(attempt(run, 1, tmp_path), 5, period_s=0)
    assert Trainer(attempt(run, 2, tmp_path)).train() == expected
    assert state_digest(run.packs(), _commits(run)[-1][1]) == expected


# -- on a laptop ----------------------------------------------------------------------------


def test_outside_of_a_run_it_trains_without_checkpoints_and_says_so(
    caplog: pytest.LogCaptureFixture, expected: str
) -> None:
    with caplog.at_level(logging.WARNING):
        assert Trainer().train() == expected
    assert "nothing is checkpointed" in caplog.text


def test_with_a_folder_it_goes_on_where_the_last_process_stopped(
    tmp_path: Path, expected: str
) -> None:
    folder = str(tmp_path / "checkpoints")

    def stop(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    first = Trainer(storage=folder, period_s=0)
    with pytest.raises(KeyboardInterrupt):
        first.train(at_step=stop)
    first.checkpointer.save()
    seen: list[int] = []
    assert Trainer(storage=folder).train(at_step=seen.append) == expected
    assert seen[0] == 6


def test_the_agents_variables_lead_to_the_attempt(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: str
) -> None:
    monkeypatch.setenv("SPOTFIRST_STORAGE", run.root.url)
    monkeypatch.setenv("SPOTFIRST_RUN", "r")
    monkeypatch.setenv("SPOTFIRST_ATTEMPT", "3")
    monkeypatch.setenv("SPOTFIRST_CHANNEL", str(tmp_path))
    assert Trainer().train() == expected
    assert [commit.attempt for _, commit in _commits(run)] == [3]
    assert (tmp_path / "progress.json").exists()
    monkeypatch.delenv("SPOTFIRST_ATTEMPT")
    with pytest.raises(InvalidSpec, match="SPOTFIRST_ATTEMPT"):
        Trainer()


def _gated(storage: Storage, gate: threading.Event) -> Storage:
    """The first commit waits for the gate."""

    def wait(verb: str, path: str) -> None:
        if (verb, path) == ("create", "checkpoints/00000002.json"):
            gate.wait(PATIENCE_S)

    return faulty(storage, before=wait)


def _raise(error: Exception) -> Any:
    def method(*_: Any, **__: Any) -> None:
        raise error

    return method


def _exit(run: Run, number: int) -> None:
    run.report_exit(ExitReport(attempt=number, at=LONG_AGO, cause="completed"))


def test_a_storage_that_refuses_the_last_checkpoint_is_waited_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = False
    waits: list[float] = []

    def refusing(method: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(self: LocalStorage, full: str, *rest: Any) -> Any:
            if refuses:
                raise OSError(errno.EROFS, "Read-only file system", full)
            return method(self, full, *rest)

        return refuse

    for name in ("_create", "_write", "_write_from"):
        monkeypatch.setattr(LocalStorage, name, refusing(getattr(LocalStorage, name)))

    def sleep(seconds: float) -> None:
        nonlocal refuses
        waits.append(seconds)
        refuses = refuses and sum(waits) < 3600

    trained = Checkpointer(
        model=torch.nn.Linear(2, 1), period_s=1e9, storage=str(tmp_path), sleep=sleep
    )
    for step in trained.steps(4):
        if step == 2:
            assert trained.save()
        refuses = step == 3
    assert sum(waits) >= 3600, "it waits as long as it takes: the storage took others before"
    again = Checkpointer(model=torch.nn.Linear(2, 1), storage=str(tmp_path))
    assert again.restore() == 4


def test_a_checkpointer_that_is_dropped_frees_its_memory_and_ends_its_threads(
    tmp_path: Path,
) -> None:
    before = set(threading.enumerate())
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = Checkpointer(model=model, optimizer=optimizer, storage=str(tmp_path / "s"))
    for _ in checkpointer.steps(3):
        model(torch.randn(3, 64)).square().mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    left = [weakref.ref(each) for each in (checkpointer, model, optimizer)]
    del checkpointer, model, optimizer
    gc.collect()
    assert [each() for each in left] == [None, None, None]
    wait_until(lambda: set(threading.enumerate()) <= before, "the threads to end")
