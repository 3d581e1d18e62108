"""Saves of torch.distributed.checkpoint that overlap, and checkpoints of it that are damaged."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.checkpoints.retention import Retention
from spotfirst.distributed import SpotfirstReader, SpotfirstWriter
from spotfirst.errors import SaveOvertaken, StorageUnavailable, UnsupportedState
from spotfirst.run import Run
from spotfirst.storage import open_storage
from tests.checkpointing.distributed import killed_saves
from tests.checkpointing.distributed.conftest import Ranks
from tests.checkpointing.distributed.killed_saves import state_of
from tests.checkpointing.storages import faulty

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LIMIT_S = 300


def run_in(folder: Path) -> Run:
    return Run(open_storage(str(folder)), "local")


def empty() -> dict[str, Any]:
    return {"x": torch.zeros(2000), "same": torch.zeros(3000), "n": {"step": 0}}


def loaded(folder: Path, step: int | None = None) -> int:
    """The step whose state is loaded; all of it is that step's."""
    state = empty()
    dcp.load(state, checkpoint_id=step, storage_reader=SpotfirstReader(str(folder)))
    found: int = state["n"]["step"]
    for name, value in state_of(found).items():
        assert name == "n" or torch.equal(state[name], value)
    return found


def steps_in(folder: Path) -> list[int]:
    return [commit.step for _, commit in run_in(folder).chain().refresh().commits]


def outcome(future: Any) -> BaseException | None:
    """What a save's future raises, in the words of the rank that failed."""
    error: BaseException | None = future.exception(LIMIT_S)
    failures = getattr(error, "failures", None)
    return failures[0][0] if failures else error


# -- saves that overlap --------------------------------------------------------------------------


class Held(DefaultSavePlanner):
    """Stops its save before the plan is made, until it may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.may_go_on = threading.Event(), threading.Event()

    def create_local_plan(self) -> Any:
        self.reached.set()
        assert self.may_go_on.wait(LIMIT_S)
        return super().create_local_plan()


@pytest.mark.parametrize("last", [1, 5])
def test_saves_that_overlap_are_all_kept(tmp_path: Path, last: int) -> None:
    writer = SpotfirstWriter(str(tmp_path), retention=Retention(last=last))
    planners = {step: Held() for step in range(20, 26)}
    futures = {
        step: dcp.async_save(
            state_of(step), checkpoint_id=step, storage_writer=writer, planner=planner
        )
        for step, planner in planners.items()
    }
    for planner in planners.values():
        assert planner.reached.wait(LIMIT_S)  # now all are under way
    for planner in planners.values():
        planner.may_go_on.set()
    assert {step: outcome(future) for step, future in futures.items()} == dict.fromkeys(planners)
    kept = list(planners)
    assert steps_in(tmp_path) == kept[-last:]
    for step in kept[-last:]:
        assert loaded(tmp_path, step) == step
    assert loaded(tmp_path) == 25


def test_a_save_of_an_older_step_that_comes_too_late_says_so(tmp_path: Path) -> None:
    writes, may_write = threading.Event(), threading.Event()

    def hold(name: str, path: str) -> None:
        if name.startswith("write") and not path.endswith(".json") and not writes.is_set():
            writes.set()
            assert may_write.wait(LIMIT_S)

    run = Run(faulty(open_storage(str(tmp_path)), before=hold), "local")
    writer = SpotfirstWriter(run)
    second = dcp.async_save(state_of(2), checkpoint_id=2, storage_writer=writer)
    assert writes.wait(LIMIT_S)
    held = Held()
    first = dcp.async_save(state_of(1), checkpoint_id=1, storage_writer=writer, planner=held)
    assert held.reached.wait(LIMIT_S)
    held.may_go_on.set()
    may_write.set()
    assert outcome(second) is None
    assert isinstance(outcome(first), SaveOvertaken)
    assert steps_in(tmp_path) == [2]
    dcp.save(state_of(1), checkpoint_id=1, storage_writer=writer)  # to go back is no overlap
    assert loaded(tmp_path) == 1
    assert loaded(tmp_path, 2) == 2


def test_two_writers_of_one_storage_may_overlap_too(tmp_path: Path) -> None:
    futures = [
        dcp.async_save(
            state_of(step), checkpoint_id=step, storage_writer=SpotfirstWriter(str(tmp_path))
        )
        for step in range(1, 9)
    ]
    kept = [step for step, future in enumerate(futures, 1) if outcome(future) is None]
    assert steps_in(tmp_path) == kept[-5:]
    assert [loaded(tmp_path, step) for step in kept[-5:]] == kept[-5:]


def test_a_save_that_fails_holds_nobody_up(tmp_path: Path) -> None:
    writer = SpotfirstWriter(str(tmp_path))
    for thing in (object(), {"deep": [object()]}):
        failed = dcp.async_save({"thing": thing}, checkpoint_id=1, storage_writer=writer)
        assert isinstance(outcome(failed), UnsupportedState)
    assert outcome(dcp.async_save(state_of(2), checkpoint_id=2, storage_writer=writer)) is None
    assert loaded(tmp_path) == 2


def test_a_planner_that_two_saves_use_at_once_is_refused(tmp_path: Path) -> None:
    """It would give the values of one step to the checkpoint of another."""

    planner = DefaultSavePlanner()
    writer = SpotfirstWriter(str(tmp_path))
    finish = planner.finish_plan

    def finished_by_another(plan: Any) -> Any:
        done = finish(plan)
        planner.plan = finish(type(plan)([]))
        return done

    planner.finish_plan = finished_by_another  # type: ignore[method-assign]
    with pytest.raises(BaseException, match="a planner of its own"):
        dcp.save(state_of(1), checkpoint_id=1, storage_writer=writer, planner=planner)
    assert steps_in(tmp_path) == []


def test_a_step_is_not_remembered_from_one_save_to_the_next(tmp_path: Path) -> None:
    writer = SpotfirstWriter(str(tmp_path))
    dcp.save(state_of(1), checkpoint_id=1, storage_writer=writer)
    with pytest.raises(BaseException, match="checkpoint_id=step"):
        dcp.save(state_of(2), storage_writer=writer)
    assert steps_in(tmp_path) == [1]


def test_a_save_whose_plan_fails_holds_nobody_up(tmp_path: Path) -> None:
    """Torch does not tell the writer of it; and this thread goes on."""

    class Failing(DefaultSavePlanner):
        def create_local_plan(self) -> Any:
            raise ArithmeticError

    writer = SpotfirstWriter(str(tmp_path))
    with pytest.raises(BaseException, match="ArithmeticError"):
        dcp.save(state_of(1), checkpoint_id=1, storage_writer=writer, planner=Failing())
    assert outcome(dcp.async_save(state_of(2), checkpoint_id=2, storage_writer=writer)) is None
    assert loaded(tmp_path) == 2


def test_a_process_that_is_killed_between_any_two_writes_leaves_whole_checkpoints(
    tmp_path: Path,
) -> None:
    found = subprocess.run(
        [sys.executable, "-m", killed_saves.__name__, str(tmp_path)],
        cwd=Path(__file__).parents[3], check=True, stdout=subprocess.PIPE, text=True, timeout=1800,
    )  # fmt: skip
    kills = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(kills) > 10
    for kill, steps in enumerate(kills[:-1]):
        for step in steps:
            assert loaded(tmp_path / str(kill), step) == step, kill
        if steps:
            assert loaded(tmp_path / str(kill)) == steps[-1]
        # Whoever comes next can save, and removes what was left.
        writer = SpotfirstWriter(str(tmp_path / str(kill)))
        dcp.save(state_of(99), checkpoint_id=99, storage_writer=writer)
        assert loaded(tmp_path / str(kill)) == 99
    assert kills[-1][-1] == 3


# -- checkpoints that are damaged ------------------------------------------------------------------


def damage(folder: Path, how: str, commit: int = -1) -> None:
    """Damage one checkpoint: what only it has."""
    run = run_in(folder)
    chain = run.chain().refresh()
    _, chosen = chain.commits[commit]
    packs = run.packs()
    if how in {"truncated manifest", "no manifest"}:
        data = packs.read(chosen.manifest)
        packs.delete(chosen.manifest)
        if how == "truncated manifest":
            packs.write(chosen.manifest, data[: len(data) // 2])
        return
    manifest = read_manifest(packs, chosen.manifest, chosen.digest)
    assert isinstance(manifest, StateManifest)
    prefix = chosen.manifest.removesuffix(".json")
    name = next(pack.name for pack in manifest.packs if pack.name.startswith(prefix))
    data = packs.read(name)
    packs.delete(name)
    if how == "truncated pack":
        packs.write(name, data[:-1])
    elif how == "changed pack":
        packs.write(name, data[:100] + bytes([data[100] ^ 1]) + data[101:])


DAMAGES = ["truncated manifest", "no manifest", "truncated pack", "changed pack", "no pack"]


@pytest.fixture
def two_steps(tmp_path: Path) -> Path:
    for step in (1, 2):
        writer = SpotfirstWriter(str(tmp_path))
        dcp.save(state_of(step), checkpoint_id=step, storage_writer=writer)
    return tmp_path


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over(
    two_steps: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage(two_steps, how)
    reader = SpotfirstReader(str(two_steps))
    state = empty()
    dcp.load(state, storage_reader=reader)
    assert (state["n"]["step"], state["x"][0].item(), reader.step) == (1, 1.0, 1)
    assert "step 2 cannot be read, going back to the one of step 1" in caplog.text


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("step", [None, 2])
def test_nothing_is_changed_when_no_checkpoint_that_may_be_read_is_whole(
    two_steps: Path, how: str, step: int | None
) -> None:
    damage(two_steps, how)
    if step is None:
        damage(two_steps, "no manifest", 0)
    state = {"x": torch.full((2000,), 7.0), "same": torch.full((3000,), 7.0), "n": {"step": 7}}
    with pytest.raises(BaseException, match=r"is whole; the last one that was tried"):
        dcp.load(state, checkpoint_id=step, storage_reader=SpotfirstReader(str(two_steps)))
    assert state["n"] == {"step": 7}
    assert set(state["x"].tolist()) == set(state["same"].tolist()) == {7.0}


def test_what_does_not_fit_in_memory_is_verified_before_it_is_read(
    two_steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spotfirst.distributed.reader._MEMORY_SHARE", 0.0)
    assert loaded(two_steps) == 2
    damage(two_steps, "changed pack")
    assert loaded(two_steps) == 1


def test_an_older_checkpoint_of_another_model_is_not_loaded(tmp_path: Path) -> None:
    writer = SpotfirstWriter(str(tmp_path))
    dcp.save({"x": torch.zeros(3)}, checkpoint_id=1, storage_writer=writer)
    dcp.save({"x": torch.ones(2000)}, checkpoint_id=2, storage_writer=writer)
    damage(tmp_path, "changed pack")
    state = {"x": torch.full((2000,), 7.0)}
    with pytest.raises(BaseException, match="x is not in the checkpoint of step 1 as it is in"):
        dcp.load(state, storage_reader=SpotfirstReader(str(tmp_path)))
    assert set(state["x"].tolist()) == {7.0}


@pytest.mark.parametrize("how", ["changed pack", "no manifest"])
def test_all_ranks_go_back_when_one_cannot_read_its_part(
    ranks: Ranks, tmp_path: Path, how: str
) -> None:
    for step in (1, 2):
        ranks.run("save_value", 2, storage=str(tmp_path), step=step)
    if how == "no manifest":
        damage(tmp_path, how)
    else:
        _, newest = run_in(tmp_path).chain().refresh().commits[-1]
        packs, prefix = run_in(tmp_path).packs(), newest.manifest.removesuffix(".json")
        (name,) = [path for path, _ in packs.walk("") if path.startswith(f"{prefix}-00001")]
        packs.write(name, bytes(packs.size_bytes(name)))
    assert ranks.run("load_value", 2, storage=str(tmp_path)) == [[1, 1.0], [1, 1.0]]


@pytest.mark.parametrize("blind", [0, 1])
def test_all_ranks_go_back_when_one_cannot_read_the_manifest(
    ranks: Ranks, tmp_path: Path, blind: int
) -> None:
    for step in (1, 2, 3):
        ranks.run("save_value", 2, storage=str(tmp_path), step=step)
    found = ranks.run("load_value", 2, storage=str(tmp_path), blind=blind)
    assert found == [[2, 2.0], [2, 2.0]]


def test_a_storage_that_fails_once_is_asked_again(two_steps: Path) -> None:
    failures = iter([True])

    def fail(name: str, _: str) -> None:
        if name.startswith("read") and next(failures, False):
            msg = "for a moment"
            raise StorageUnavailable(msg)

    run = Run(faulty(open_storage(str(two_steps)), before=fail), "local")
    state = empty()
    dcp.load(state, storage_reader=SpotfirstReader(run))
    assert state["n"]["step"] == 2


# -- states that are not flattened -----------------------------------------------------------------

values = st.recursive(
    st.integers() | st.text(max_size=3) | st.none() | st.complex_numbers(allow_nan=False)
    | st.sets(st.integers(), max_size=3) | st.just(torch.bfloat16) | st.just(Path("a/b"))
    | st.integers(0, 3).map(lambda n: torch.arange(float(n))),
    lambda inner: st.lists(inner, max_size=3)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text("ab.0", min_size=1, max_size=2), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


def equal(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def has_empty_mapping(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict) and not value:
        return True
    return isinstance(value, (dict, list, tuple)) and any(map(has_empty_mapping, inner))


@given(st.dictionaries(st.text("ab.0", min_size=1, max_size=3), values, max_size=4))
@settings(max_examples=60, deadline=None)
def test_a_state_that_is_not_flattened_comes_back_value_by_value(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any]
) -> None:
    folder = str(tmp_path_factory.mktemp("dcp"))
    is_flat = not has_empty_mapping(state)  # torch drops those on its way to sharded tensors
    dcp.save(
        state, checkpoint_id=1, storage_writer=SpotfirstWriter(folder),
        planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=is_flat),
    )  # fmt: skip
    found = {
        key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else 0
        for key, value in state.items()
    }
    dcp.load(
        found, storage_reader=SpotfirstReader(folder),
        planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=is_flat),
    )  # fmt: skip
    assert equal(found, state)
