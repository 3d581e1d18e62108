"""The Checkpointer in several processes."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from spotfirst.channel import Channel
from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.checkpoints.ranks import part_name
from spotfirst.checkpoints.retention import Retention, collect, prune
from spotfirst.distributed.group import MEETING_S
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from tests.checkpointing.conftest import LONG_AGO
from tests.checkpointing.distributed.conftest import Ranks

pytestmark = pytest.mark.torch

STEPS = 60
KILLS = 5


def commits(folder: Path, run_id: str = "local") -> list[int]:
    chain = Run(open_storage(str(folder)), run_id).chain().refresh()
    return [commit.step for _, commit in chain.commits]


def newest(folder: Path) -> StateManifest:
    run = Run(open_storage(str(folder)), "local")
    found = run.chain().refresh().newest()
    assert found is not None
    manifest = read_manifest(run.packs(), found[1].manifest, found[1].digest)
    assert isinstance(manifest, StateManifest)
    return manifest


def values(found: list[dict[str, Any]], *names: str) -> list[Any]:
    return [[each[name] for name in names] for each in found]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(
    ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    whole, halves = str(tmp_path / "a"), str(tmp_path / "b")
    expected = ranks.run("train_steps", 2, storage=whole, kind=kind, steps=6)
    ranks.run("train_steps", 2, storage=halves, kind=kind, steps=6, leave_after=3)
    found = ranks.run("train_steps", 2, storage=halves, kind=kind, steps=6)
    names = ("common", "own", "buffers")
    assert values(found, *names) == values(expected, *names)
    assert values(found, "first", "done", "warnings") == [[3, 3, []]] * 2
    assert commits(tmp_path / "b") == [3, 6]


def test_ranks_that_are_killed_at_random_end_with_the_same_weights_bit_for_bit(
    ranks: Ranks, tmp_path: Path
) -> None:
    def train(folder: str, kill_after_s: float | None) -> list[tuple[int, Any]]:
        return ranks.ends(
            "train_steps", 2, storage=str(tmp_path / folder), kind="ddp", steps=STEPS, period_s=0,
            quiet=True, kill_after_s=kill_after_s,
        )  # fmt: skip

    start = time.monotonic()
    expected = [found for _, found in train("a", None)]
    took_s = time.monotonic() - start
    chance = random.Random(3)
    for _ in range(KILLS):
        train("b", chance.uniform(0.1, 0.6) * took_s)
    resumed = commits(tmp_path / "b")
    ends = train("b", None)
    assert [code for code, _ in ends] == [0, 0]
    found = [value for _, value in ends]
    assert len(Run(open_storage(str(tmp_path / "b")), "local").chain().refresh().claims) >= 3
    assert found[0]["first"] in {resumed[-1], None}  # None: it was at its end
    assert values(found, "common", "own", "buffers") == values(expected, "common", "own", "buffers")


def test_every_rank_has_its_own_generators_and_objects_back(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks.run("train_steps", 2, storage=str(tmp_path), kind="ddp", steps=3)
    found = ranks.run("restored", 2, storage=str(tmp_path), kind="ddp")
    assert values(found, "common", "own", "buffers") == values(saved, "common", "own", "buffers")
    assert saved[0]["own"] != saved[1]["own"]
    assert saved[0]["buffers"] != saved[1]["buffers"]  # each has seen other samples
    assert saved[0]["common"] == saved[1]["common"]


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_another_number_of_ranks_has_the_same_weights_and_says_what_differs(
    ranks: Ranks, tmp_path: Path, kind: str
) -> None:
    saved = ranks.run("train_steps", 2, storage=str(tmp_path), kind=kind, steps=3)
    for world_size in (1, 4) if kind == "fsdp" else (1,):
        found = ranks.run("restored", world_size, storage=str(tmp_path), kind=kind)
        again = ranks.run("restored", world_size, storage=str(tmp_path), kind=kind)
        assert found == again  # also the seeds
        assert {each["common"] for each in found} == {saved[0]["common"]}
        assert len({each["own"] for each in found}) == world_size
        assert all(f"here are {world_size}" in each["warnings"][0] for each in found)


@pytest.mark.parametrize(("kind", "then"), [("hsdp", "fsdp"), ("2d", "tp")])
def test_a_state_sharded_along_two_dimensions_is_the_same_when_it_is_sharded_otherwise(
    ranks: Ranks, tmp_path: Path, kind: str, then: str
) -> None:
    saved = ranks.run("train_steps", 4, storage=str(tmp_path), kind=kind, steps=2)
    same = ranks.run("restored", 4, storage=str(tmp_path), kind=kind)
    assert values(same, "common", "own", "buffers") == values(saved, "common", "own", "buffers")
    other = ranks.run("restored", 2, storage=str(tmp_path), kind=then)
    assert {each["common"] for each in other} == {saved[0]["common"]}


def test_what_was_saved_by_one_process_goes_on_in_several(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks.run("train_steps", 1, storage=str(tmp_path), kind="fsdp", steps=3)
    found = ranks.run("restored", 2, storage=str(tmp_path), kind="fsdp")
    assert {each["common"] for each in found} == {saved[0]["common"]}
    assert "of 1 ranks" in found[0]["warnings"][0]


def test_all_ranks_write_and_leave_no_parts_behind(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run("train_steps", 2, storage=str(tmp_path), kind="fsdp", steps=1)
    manifest = newest(tmp_path)
    assert {pack.name.split("-")[1] for pack in manifest.packs} == {"00000", "00001"}
    assert len(manifest.ranks) == 2
    assert not list(tmp_path.rglob("*.part.json"))


def test_a_period_of_0_saves_after_every_step(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run("train_steps", 2, storage=str(tmp_path), kind="ddp", steps=4, period_s=0)
    saved = commits(tmp_path)
    assert saved[-1] == 4
    assert len(saved) >= 2


def test_fast_steps_are_not_held_up_by_meetings(ranks: Ranks, tmp_path: Path) -> None:
    (met, took_s), (other, _) = ranks.run(
        "meetings", 2, storage=str(tmp_path), step_s=0.001, steps=400
    )
    assert met == other
    assert met < 40 + 2 * took_s / MEETING_S  # it would be 400, one after each step


def test_a_rank_that_cannot_save_fails_the_save_on_all_and_the_next_one_is_whole(
    ranks: Ranks, tmp_path: Path
) -> None:
    errors = ranks.run("fail_on_rank_1", 2, storage=str(tmp_path))
    assert errors[0] == ["2: rank 1 could not save its part: OSError: the disk is on fire"]
    assert errors[1] == ["2: rank 0 has failed; its log says why"]
    assert commits(tmp_path) == [1, 3]
    found = ranks.run("restored", 2, storage=str(tmp_path), kind="ddp")
    assert values(found, "step", "warnings") == [[3, []]] * 2


def test_ranks_with_other_models_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    ends = ranks.ends("unlike", 2, storage=str(tmp_path), quiet=True)
    assert "rank 1's modules and optimizers have other names or shapes" in ends[0][1]
    assert commits(tmp_path) == []


def test_a_model_that_differs_from_rank_to_rank_is_told(ranks: Ranks, tmp_path: Path) -> None:
    (told, *_), _ = ranks.run("each_for_itself", 2, storage=str(tmp_path))
    assert "of ranks [1] are not those of rank 0" in told


def test_several_processes_without_a_group_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    ends = ranks.ends("without_a_group", 2, storage=str(tmp_path / "s"), quiet=True)
    assert all("init_process_group" in message for _, message in ends), ends


@pytest.fixture
def in_a_run(tmp_path: Path) -> dict[str, str]:
    spec = RunSpec(run_id="r", created_at=LONG_AGO, command=("train",))
    create_run(open_storage(str(tmp_path / "s")), spec)
    (tmp_path / "channel").mkdir()
    return {"storage": str(tmp_path / "s"), "folder": str(tmp_path / "channel")}


def test_a_drain_leaves_all_ranks_at_one_step_with_the_chain_released(
    ranks: Ranks, tmp_path: Path, in_a_run: dict[str, str]
) -> None:
    ends = ranks.ends("drained", 2, after=5, **in_a_run)
    assert ends == [(0, "Drained: 0"), (0, "Drained: 0")]
    chain = Run(open_storage(in_a_run["storage"]), "r").chain().refresh()
    assert chain.released
    assert chain.commits[-1][1].step >= 6
    told = Channel(tmp_path / "channel").progress()
    assert told is not None
    assert (told.released, told.checkpoint_step) == (True, chain.commits[-1][1].step)


def test_all_ranks_stop_when_a_newer_attempt_has_taken_over(
    ranks: Ranks, in_a_run: dict[str, str]
) -> None:
    ends = ranks.ends("superseded", 2, **in_a_run)
    assert [code for code, _ in ends] == [75, 75]


def test_a_process_group_that_is_started_again_in_the_same_attempt_goes_on(
    ranks: Ranks, in_a_run: dict[str, str]
) -> None:
    storage = in_a_run["storage"]
    environment = {
        "SPOTFIRST_STORAGE": storage, "SPOTFIRST_RUN": "r", "SPOTFIRST_ATTEMPT": "1",
    }  # fmt: skip
    for end in (2, 4):
        found = ranks.run(
            "train_steps", 2, storage=storage, kind="ddp", steps=end, environment=environment
        )
    assert [each["first"] for each in found] == [2, 2]
    chain = Run(open_storage(storage), "r").chain().refresh()
    assert chain.holder == 1
    assert len(chain.claims) == 2
    assert [commit.step for _, commit in chain.commits] == [2, 4]


def test_parts_that_a_dead_rank_has_left_are_garbage_once_there_is_a_newer_checkpoint(
    ranks: Ranks, tmp_path: Path
) -> None:
    ranks.run("train_steps", 2, storage=str(tmp_path), kind="ddp", steps=3, period_s=0)
    run = Run(open_storage(str(tmp_path)), "local")
    chain = run.chain().refresh()
    claim = chain.claims[0]
    newest_save = max(int(c.manifest[9:15]) for _, c in chain.commits)
    left, under_way = part_name(claim, 0, 1), part_name(claim, newest_save + 1, 1)
    for name in (left, under_way):
        run.packs().write(name, b"{}")
    chain.claim(2)
    prune(chain, 2, Retention(last=1))
    collect(run.packs(), chain)
    assert not run.packs().exists(left)
    assert run.packs().exists(under_way)


def test_all_ranks_go_back_when_one_cannot_read_the_newest_checkpoint(
    ranks: Ranks, tmp_path: Path
) -> None:
    for steps in (2, 4):
        ranks.run("train_steps", 2, storage=str(tmp_path), kind="fsdp", steps=steps)
    name = max(pack.name for pack in newest(tmp_path).packs if "-00001-" in pack.name)
    path = tmp_path / "runs/local/packs" / name
    data = bytearray(path.read_bytes())
    data[10] ^= 1  # in what only rank 1 reads: its generators
    path.write_bytes(data)
    found = ranks.run("restored", 2, storage=str(tmp_path), kind="fsdp")
    assert [each["step"] for each in found] == [2, 2]
    assert "another rank cannot read" in found[0]["warnings"][0]


def test_a_process_group_of_one_saves_to_its_local_disk_too(ranks: Ranks, tmp_path: Path) -> None:
    places = {"storage": str(tmp_path / "s"), "local": str(tmp_path / "l")}
    ranks.run("alone_in_a_group", 1, **places)
    (tmp_path / "s-store").unlink()
    (found,) = ranks.run("alone_in_a_group", 1, **places)
    (expected,) = ranks.run("train_steps", 1, storage=str(tmp_path / "e"), kind="fsdp", steps=4)
    assert found["step"] == 4
    assert (found["common"], found["own"]) == (expected["common"], expected["own"])
    assert commits(tmp_path / "l") == [4]
