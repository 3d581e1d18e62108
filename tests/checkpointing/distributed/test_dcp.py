from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from spotfirst.checkpointer import Checkpointer
from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.context import TrainerContext
from spotfirst.distributed import SpotfirstReader, SpotfirstWriter
from spotfirst.errors import ClaimLost, InvalidSpec, StateMismatch, UnknownRun, UnsupportedState
from spotfirst.run import Run
from spotfirst.storage import open_storage
from tests.checkpointing.distributed.conftest import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def local_run(folder: Path) -> Run:
    return Run(open_storage(str(folder)), "local")


def newest(folder: Path) -> StateManifest:
    run = local_run(folder)
    found = run.chain().refresh().newest()
    assert found is not None
    manifest = read_manifest(run.packs(), found[1].manifest, found[1].digest)
    assert isinstance(manifest, StateManifest)
    return manifest


@pytest.mark.parametrize(("kind", "written_by"), [("fsdp", 2), ("tp", 2), ("ddp", 2), ("hsdp", 4)])
def test_a_state_saved_by_some_ranks_is_the_same_at_every_other_world_size(
    ranks: Ranks, tmp_path: Path, kind: str, written_by: int
) -> None:
    saved = ranks.run("save", written_by, storage=str(tmp_path), kind=kind)
    assert len(set(saved)) == 1
    loaded = {
        world_size: set(ranks.run("load", world_size, storage=str(tmp_path), kind=kind))
        for world_size in ((1, 2, 4) if kind == "fsdp" else (1, written_by))
        if kind != "hsdp" or world_size > 1
    }
    assert all(found == set(saved) for found in loaded.values()), loaded


def test_all_ranks_write(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run("save", 2, storage=str(tmp_path), kind="fsdp")
    writers = {pack.name.split("-")[1] for pack in newest(tmp_path).packs}
    assert writers == {"00000", "00001"}
    assert any(len(array.shards) == 2 for array in newest(tmp_path).arrays)


def test_an_asynchronous_save_holds_the_same(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks.run("save", 2, storage=str(tmp_path), kind="fsdp", asynchronous=True)
    assert ranks.run("load", 1, storage=str(tmp_path), kind="fsdp") == saved[:1]


def test_only_what_has_changed_is_written_again(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run("save_twice", 2, storage=str(tmp_path))
    (_, first), (_, second) = local_run(tmp_path).chain().refresh().commits
    assert first.new_bytes > 4 * 400_000
    assert 400_000 < second.new_bytes < 410_000


def test_a_rank_that_dies_while_saving_leaves_the_previous_checkpoint_the_newest(
    ranks: Ranks, tmp_path: Path
) -> None:
    ends = ranks.ends("die_while_saving", 2, storage=str(tmp_path), quiet=True)
    assert ends[1][0] == -9
    assert ends[0][0] != 0
    assert [c.step for _, c in local_run(tmp_path).chain().refresh().commits] == [1]
    state = {"w0": torch.zeros(1000, 100)}
    dcp.load(state, storage_reader=SpotfirstReader(str(tmp_path)))
    torch.manual_seed(0)
    assert torch.equal(state["w0"], torch.randn(1000, 100))


def test_values_of_every_kind_come_back_without_a_planner_of_our_own(tmp_path: Path) -> None:
    state: dict[str, Any] = {
        "model": {"w": torch.arange(6.0).reshape(2, 3), "empty": torch.zeros(0, 4)},
        "scalar": torch.tensor(3.5),
        "bf16": torch.ones(3, dtype=torch.bfloat16),
        "list": [torch.ones(2), {"lr": 0.1}, 7],
        "plain": [1, 2.5, None, float("nan"), True],
        "pair": ("a", b"b"),
    }
    dcp.save(state, checkpoint_id=5, storage_writer=SpotfirstWriter(str(tmp_path)))
    found: dict[str, Any] = {
        "model": {"w": torch.zeros(2, 3), "empty": torch.zeros(0, 4)},
        "scalar": torch.tensor(0.0),
        "bf16": torch.zeros(3, dtype=torch.bfloat16),
        "list": [torch.zeros(2), {"lr": 0.0}, 0],
        "plain": [],
        "pair": (),
    }
    reader = SpotfirstReader(str(tmp_path))
    assert reader.step == 5
    dcp.load(found, storage_reader=reader)
    assert torch.equal(found["model"]["w"], state["model"]["w"])
    assert torch.equal(found["scalar"], state["scalar"])
    assert torch.equal(found["bf16"], state["bf16"])
    assert torch.equal(found["list"][0], torch.ones(2))
    assert found["list"][1:] == [{"lr": 0.1}, 7]
    assert found["plain"][:3] == [1, 2.5, None]
    assert found["plain"][3] != found["plain"][3]  # not a number
    assert found["pair"] == ("a", b"b")


def test_a_raw_optimizer_state_with_numbers_for_keys_comes_back(tmp_path: Path) -> None:
    def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = trained()
    optimizer.param_groups[0]["lr"] = 0.7
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=2, storage_writer=SpotfirstWriter(str(tmp_path)))
    _, fresh = trained()
    found = {"optimizer": fresh.state_dict()}
    dcp.load(found, storage_reader=SpotfirstReader(str(tmp_path)))
    fresh.load_state_dict(found["optimizer"])
    assert fresh.param_groups[0]["lr"] == 0.7
    for mine, theirs in zip(fresh.state.values(), optimizer.state.values(), strict=True):
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])
        assert torch.equal(mine["step"], theirs["step"])


def test_a_step_is_chosen_by_checkpoint_id(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        state = {"w": torch.full((2,), float(step))}
        dcp.save(state, checkpoint_id=step, storage_writer=SpotfirstWriter(str(tmp_path)))
    found = {"w": torch.zeros(2)}
    dcp.load(found, checkpoint_id=2, storage_reader=SpotfirstReader(str(tmp_path)))
    assert found["w"].tolist() == [2.0, 2.0]
    with pytest.raises(UnknownRun, match=r"no checkpoint of step 9; it has those of \[1, 2, 3\]"):
        SpotfirstReader(str(tmp_path)).reset(9)


def test_a_region_is_read_from_uneven_shards_and_across_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spotfirst.checkpoints.packs.CHUNK_BYTES", 100)
    state = {"w": torch.arange(1000.0).reshape(10, 100)}
    dcp.save(state, checkpoint_id=1, storage_writer=SpotfirstWriter(str(tmp_path)))
    run = local_run(tmp_path)
    manifest = newest(tmp_path)
    assert len(manifest.arrays[0].parts) == 40
    from spotfirst.checkpoints.packs import fetch
    from spotfirst.checkpoints.regions import RegionPlan

    for rows, columns in (((3, 7), (0, 100)), ((3, 7), (13, 60)), ((9, 10), (99, 100))):
        target = torch.zeros(rows[1] - rows[0], columns[1] - columns[0])
        plan = RegionPlan(manifest.packs)
        plan.add(manifest.arrays[0], (rows[0], columns[0]), target)
        read = fetch(run.packs(), plan.wanted, readers=1)
        plan.finish()
        assert torch.equal(target, state["w"][slice(*rows), slice(*columns)])
        assert read <= 4 * ((rows[1] - rows[0]) * 100 + 100)


def test_a_checkpoint_of_the_checkpointer_is_read_by_its_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    checkpointer = Checkpointer(model=model, storage=str(tmp_path))
    for _ in checkpointer.steps(1):
        pass
    fresh = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    state = {"model": fresh.state_dict()}
    dcp.load(state, storage_reader=SpotfirstReader(str(tmp_path)))
    for name, value in model.state_dict().items():
        assert torch.equal(state["model"][name], value)


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickled")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    state: dict[str, Any] = {"w": torch.ones(2), "note": {"text": "x"}}
    dcp.save(state, checkpoint_id=1, storage_writer=SpotfirstWriter(str(tmp_path)))
    found: dict[str, Any] = {"w": torch.zeros(2), "note": {"text": ""}}
    dcp.load(found, storage_reader=SpotfirstReader(str(tmp_path)))
    assert found["note"] == {"text": "x"}
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text())


def test_planners_that_would_pickle_are_refused(tmp_path: Path) -> None:
    class Unpickling(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            raise AssertionError

    state: dict[str, Any] = {"w": torch.ones(2), "note": "x"}
    dcp.save(state, checkpoint_id=1, storage_writer=SpotfirstWriter(str(tmp_path)))
    with pytest.raises(BaseException, match="would unpickle"):
        dcp.load(state, storage_reader=SpotfirstReader(str(tmp_path)), planner=Unpickling())


def test_a_value_that_no_tree_holds_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BaseException, match=r"thing is builtins\.object") as refused:
        dcp.save(
            {"thing": object()}, checkpoint_id=1, storage_writer=SpotfirstWriter(str(tmp_path))
        )
    (cause, _), *_ = refused.value.failures.values()  # type: ignore[attr-defined]
    assert isinstance(cause, UnsupportedState)
    assert local_run(tmp_path).chain().refresh().commits == []


def test_a_save_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseException, match="checkpoint_id=step"):
        dcp.save({"w": torch.ones(1)}, storage_writer=SpotfirstWriter(str(tmp_path)))
    with pytest.raises(InvalidSpec, match="no number of steps"):
        SpotfirstWriter(str(tmp_path)).reset("/checkpoints/1")


def test_cached_plans_are_refused_because_their_names_are_taken(tmp_path: Path) -> None:
    for step in (1, 2):
        planner = DefaultSavePlanner(enable_plan_caching=True)
        save = lambda: dcp.save(  # noqa: E731
            {"w": torch.ones(2)}, checkpoint_id=step, planner=planner,  # noqa: B023
            storage_writer=SpotfirstWriter(str(tmp_path)),
        )  # fmt: skip
        if step == 1:
            save()
        else:
            with pytest.raises(BaseException, match="enable_plan_caching"):
                save()


def test_an_older_attempt_cannot_commit(run: Run) -> None:
    old, new = TrainerContext(run, 1), TrainerContext(run, 2)
    state = {"w": torch.ones(2)}
    dcp.save(state, checkpoint_id=1, storage_writer=SpotfirstWriter(old))
    chain = run.chain().refresh()
    chain.claim(2)
    with pytest.raises(BaseException, match="ClaimLost") as lost:
        dcp.save(state, checkpoint_id=2, storage_writer=SpotfirstWriter(old))
    (cause, _), *_ = lost.value.failures.values()  # type: ignore[attr-defined]
    assert isinstance(cause, ClaimLost)
    reader = SpotfirstReader(new)
    assert reader.step == 1


def test_the_state_of_a_key_that_is_not_there_is_missed_by_name(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2)}, checkpoint_id=1, storage_writer=SpotfirstWriter(str(tmp_path)))
    with pytest.raises(BaseException, match="other"):
        dcp.load({"other": torch.ones(2)}, storage_reader=SpotfirstReader(str(tmp_path)))


def test_a_file_checkpoint_is_no_state(files_run: Run) -> None:
    from spotfirst.checkpoints.manifest import FilesManifest, write_manifest

    manifest = FilesManifest(packs=(), files=())
    digest, _ = write_manifest(files_run.packs(), "00000001/000001.json", manifest)
    chain = files_run.chain().refresh()
    chain.claim(1)
    chain.commit(1, step=1, manifest="00000001/000001.json", digest=digest, content="files")
    with pytest.raises(StateMismatch, match="holds files"):
        SpotfirstReader(files_run).read_metadata()
