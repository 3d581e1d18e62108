from __future__ import annotations

from typing import Any

import pytest

from spotfirst.checkpoints.manifest import (
    ArrayRef,
    PackRef,
    Part,
    RankState,
    read_manifest,
    write_manifest,
)
from spotfirst.checkpoints.ranks import (
    Piece,
    RankPart,
    hand_in,
    merge,
    part_name,
    rank_trees,
    wait_for_parts,
)
from spotfirst.errors import CorruptObject, SpotfirstError, StateMismatch
from spotfirst.storage import Storage

DIGEST = "0" * 32


def array(pack: int, offset: int, *shape: int, digest: str = DIGEST) -> ArrayRef:
    size = 4
    for n in shape:
        size *= n
    part = Part(pack=pack, offset=offset, size_bytes=size, digest=digest)
    return ArrayRef(dtype="float32", shape=shape, parts=(part,))


def part(rank: int, offset: tuple[int, ...] = (), **changes: Any) -> RankPart:
    """Rows `2 * rank` and the next of an array of four rows, and one of its own."""
    tree = {"ordered": [["w", {"tensor": 0}]]}
    fields: dict[str, Any] = {
        "rank": rank,
        "step": 3,
        "packs": (PackRef(name=f"00000001/000001-{rank:05d}-000000", size_bytes=100),),
        "arrays": (array(0, 0, 2, 5), array(0, 40, 3)),
        "pieces": (Piece(key="w", shape=(4, 5), offset=offset or (2 * rank, 0), array=0),),
        "state": RankState(objects={"own": {"tensor": 1}}),
        "objects": {"model": tree} if rank == 0 else {},
        "keys": ("w",) if rank == 0 else (),
    }
    return RankPart(**fields | changes)


def test_parts_make_one_manifest_that_can_be_read(packs: Storage) -> None:
    manifest = merge([part(0), part(1)])
    digest, _ = write_manifest(packs, "00000001/000001.json", manifest)
    assert read_manifest(packs, "00000001/000001.json", digest) == manifest
    assert [pack.name[-12:] for pack in manifest.packs] == ["00000-000000", "00001-000000"]
    (whole, *own) = manifest.arrays
    assert [shard.offset for shard in whole.shards] == [(0, 0), (2, 0)]
    assert [each.parts[0].pack for each in own] == [0, 1]
    assert [rank.objects["own"] for rank in manifest.ranks] == [{"tensor": 1}, {"tensor": 2}]


def test_a_piece_that_is_missing_is_not_made_up() -> None:
    with pytest.raises(StateMismatch, match="does not make up its shape"):
        merge([part(0), part(1, pieces=())])


def test_shards_that_overlap_are_refused_when_read(packs: Storage) -> None:
    manifest = merge([part(0), part(1, offset=(1, 0))])
    digest, _ = write_manifest(packs, "00000001/000001.json", manifest)
    with pytest.raises(CorruptObject, match="overlap"):
        read_manifest(packs, "00000001/000001.json", digest)


@pytest.mark.parametrize("changes", [{"layout": "other"}, {"step": 4}])
def test_parts_of_other_states_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(StateMismatch, match="rank 1's"):
        merge([part(0), part(1, **changes)])


def test_what_ranks_have_beside_the_common_is_kept_only_where_it_differs() -> None:
    def with_buffer(rank: int, digest: str) -> RankPart:
        tree = {"dict": [["w", {"tensor": 0}]]}
        return part(
            rank,
            arrays=(array(0, 0, 2, 5, digest=digest),),
            state=RankState(objects={"model": tree}),
        )

    same = merge([with_buffer(0, DIGEST), with_buffer(1, DIGEST)])
    assert [rank.objects for rank in same.ranks] == [{}, {}]
    assert len(same.arrays) == 1
    other = merge([with_buffer(0, DIGEST), with_buffer(1, "1" * 32)])
    trees = [rank_trees(other, rank, 2)["model"] for rank in (0, 1)]
    assert [tree["ordered"][0][1] for tree in trees] == [{"tensor": 1}, {"tensor": 2}]
    assert rank_trees(other, 1, 3)["model"]["ordered"][0][1] == {"tensor": 0}


def test_rank_0_waits_for_the_parts_of_the_others(packs: Storage) -> None:
    looks = 0

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        hand_in(packs, 1, 2, part(looks))

    found = wait_for_parts(packs, 1, 2, range(1, 4), limit_s=9, sleep=sleep)
    assert [each.rank for each in found] == [1, 2, 3]


def test_a_rank_that_says_nothing_is_waited_for_until_a_limit(packs: Storage) -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    hand_in(packs, 1, 2, part(1))
    with pytest.raises(TimeoutError, match="rank 2 has not saved its part within 60 s"):
        wait_for_parts(packs, 1, 2, range(1, 3), limit_s=60, sleep=sleep, monotonic=lambda: now)
    assert 60 <= now < 61


def test_a_rank_that_could_not_save_is_not_waited_for(packs: Storage) -> None:
    hand_in(packs, 1, 2, RankPart(rank=1, step=3, error="OSError: full"))
    with pytest.raises(SpotfirstError, match="rank 1 could not save its part: OSError: full"):
        wait_for_parts(packs, 1, 2, [1], limit_s=60)


def test_a_part_that_is_no_part_is_refused(packs: Storage) -> None:
    packs.write(part_name(1, 2, 1), b"not JSON")
    with pytest.raises(CorruptObject, match="part"):
        wait_for_parts(packs, 1, 2, [1], limit_s=60)
