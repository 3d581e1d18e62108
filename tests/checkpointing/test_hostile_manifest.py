from __future__ import annotations

import itertools
import math
import time
import tracemalloc
from typing import Any

import msgspec
import pytest
import torch

from spotfirst.checkpoints.loading import StateReader
from spotfirst.checkpoints.manifest import manifest_digest, read_manifest
from spotfirst.checkpoints.weights import state_digest
from spotfirst.errors import CorruptObject, NewerFormat
from spotfirst.storage import Storage
from tests.checkpointing.conftest import LONG_AGO
from tests.checkpointing.states import Commit, load, save

D = "0" * 32
_numbers = itertools.count(500)


def _state(packs: Storage) -> dict[str, Any]:
    commit = save(packs, {"w": torch.arange(6, dtype=torch.float32).view(2, 3)})
    manifest: dict[str, Any] = msgspec.json.decode(packs.read(commit.manifest))
    manifest.setdefault("ranks", [{}])
    return manifest


def _files(*paths: str) -> dict[str, Any]:
    files = [{"path": path, "size_bytes": 0} for path in paths]
    return {"v": 1, "content": "files", "packs": [], "files": files}


def _put(packs: Storage, manifest: Any) -> Commit:
    """Write what somebody else made up, with the right digest."""
    data = manifest if isinstance(manifest, bytes) else msgspec.json.encode(manifest)
    name = f"00000001/{next(_numbers):06d}.json"
    packs.write(name, data)
    return Commit(
        attempt=1, at=LONG_AGO, nonce="n", step=3, manifest=name, digest=manifest_digest(data),
        content="state",
    )  # fmt: skip


def _read(packs: Storage, commit: Commit) -> Any:
    return read_manifest(packs, commit.manifest, commit.digest)


def _shard(manifest: dict[str, Any], *regions: list[int]) -> None:
    """Make up the first array of shards, each an offset and a shape."""
    shards = []
    for region in regions:
        offset, shape = region[: len(region) // 2], region[len(region) // 2 :]
        parts = [[0, 0, 4, D]] * abs(math.prod(shape))
        shards.append({"offset": offset, "shape": shape, "parts": parts})
    manifest["arrays"][0].pop("parts", None)
    manifest["arrays"][0]["shards"] = shards


STATE_CHANGES: dict[str, Any] = {
    "huge shape": lambda m: m["arrays"][0].update(shape=[1 << 40, 1 << 40]),
    "huge empty shape": lambda m: m["arrays"][0].update(shape=[0, 1 << 62], parts=[]),
    "other shape": lambda m: m["arrays"][0].update(shape=[2, 4]),
    "negative shape": lambda m: m["arrays"][0].update(shape=[-2, -3]),
    "many dimensions": lambda m: m["arrays"][0].update(shape=[1] * 63 + [2, 3]),
    "unknown dtype": lambda m: m["arrays"][0].update(dtype="object"),
    "attribute as dtype": lambda m: m["arrays"][0].update(dtype="__loader__"),
    "wider dtype": lambda m: m["arrays"][0].update(dtype="float64"),
    "part past the end": lambda m: m["arrays"][0].update(parts=[[0, 8, 24, D]]),
    "negative offset": lambda m: m["arrays"][0].update(parts=[[0, -8, 24, D]]),
    "negative size": lambda m: m["arrays"][0].update(parts=[[0, 0, 32, D], [0, 0, -8, D]]),
    "pack that is not listed": lambda m: m["arrays"][0].update(parts=[[1, 0, 24, D]]),
    "negative pack": lambda m: m["arrays"][0].update(parts=[[-1, 0, 24, D]]),
    "no parts": lambda m: m["arrays"][0].update(parts=[]),
    "empty part": lambda m: m["arrays"][0].update(parts=[[0, 0, 24, D], [0, 0, 0, D]]),
    "no digest": lambda m: m["arrays"][0].update(parts=[[0, 0, 24, ""]]),
    "a digest that is none": lambda m: m["arrays"][0].update(parts=[[0, 0, 24, "Z" * 32]]),
    "path as pack": lambda m: m.update(packs=[["../../spec.json", 24]]),
    "path that ends as a pack": lambda m: m.update(packs=[[f"../{m['packs'][0][0]}", 24]]),
    "pack with a line's end": lambda m: m.update(packs=[[f"{m['packs'][0][0]}\n", 24]]),
    "huge pack": lambda m: m.update(packs=[[m["packs"][0][0], 1 << 50]]),
    "empty pack": lambda m: m.update(packs=[[m["packs"][0][0], 0]]),
    "parts and shards": lambda m: m["arrays"][0].update(
        shards=[{"offset": [0, 0], "shape": [2, 3], "parts": m["arrays"][0]["parts"]}]
    ),
    "overlapping shards": lambda m: _shard(m, [0, 0, 2, 2], [0, 1, 2, 1]),
    "equal shards": lambda m: _shard(m, [0, 0, 1, 3], [0, 0, 1, 3]),
    "a gap between shards": lambda m: _shard(m, [0, 0, 2, 1], [0, 2, 2, 1]),
    "a shard outside": lambda m: _shard(m, [0, 0, 1, 3], [2, 0, 1, 3]),
    "a shard before": lambda m: _shard(m, [-1, 0, 1, 3], [0, 0, 1, 3]),
    "a shard inside out": lambda m: _shard(m, [2, 3, -2, -3]),
    "a shard of other dimensions": lambda m: _shard(m, [0, 6]),
    "a shard of very many dimensions": lambda m: m["arrays"][0].update(
        parts=[], shards=[{"offset": [0, 0], "shape": [(1 << 62) + 1] * 200_000, "parts": []}]
    ),
    "crossing shards": lambda m: (
        m["arrays"][0].update(shape=[3, 3]),
        _shard(m, [0, 1, 3, 1], [1, 0, 1, 3], [0, 0, 1, 1], [2, 0, 1, 1], [0, 2, 1, 1]),
    ),
    "array out of range": lambda m: m["objects"].update(model={"tensor": 1}),
    "negative array": lambda m: m["objects"].update(model={"tensor": -1}),
    "array number as text": lambda m: m["objects"].update(model={"tensor": "0"}),
    "unknown tag": lambda m: m["objects"].update(model={"object": ["os.system"]}),
    "two tags": lambda m: m["objects"].update(model={"tensor": 0, "tuple": []}),
    "no tag": lambda m: m["objects"].update(model={}),
    "metadata of a dict": lambda m: m["objects"].update(model={"dict": [], "metadata": 1}),
    "key twice": lambda m: m["objects"].update(model={"dict": [["a", 1], ["a", 2]]}),
    "list as key": lambda m: m["objects"].update(model={"dict": [[[], 1]]}),
    "tensor as key": lambda m: m["objects"].update(model={"dict": [[{"tensor": 0}, 1]]}),
    "triple for a pair": lambda m: m["objects"].update(model={"dict": [["a", 1, 2]]}),
    "bad base64": lambda m: m["objects"].update(model={"bytes": "*"}),
    "bad float": lambda m: m["objects"].update(model={"float": "7ff8"}),
    "bad int": lambda m: m["objects"].update(model={"int": "xyz"}),
    "number as bytes": lambda m: m["objects"].update(model={"bytes": 5}),
    "numpy has no bfloat16": lambda m: (
        m["arrays"][0].update(dtype="bfloat16", shape=[12]),
        m["objects"].update(model={"array": 0}),
    ),
    "negative step": lambda m: m.update(step=-1),
    "text as step": lambda m: m.update(step="3"),
    "unknown content": lambda m: m.update(content="pickle"),
    "no objects": lambda m: m.pop("objects"),
    "hostile generators": lambda m: m["ranks"][0].update(rng={"tensor": 7}),
    "hostile object of a rank": lambda m: m["ranks"][0].update(objects={"x": {"tensor": 7}}),
}


@pytest.mark.parametrize("change", STATE_CHANGES)
def test_a_hostile_state_manifest_is_corrupt_and_reserves_nothing(
    packs: Storage, change: str
) -> None:
    manifest = _state(packs)
    STATE_CHANGES[change](manifest)
    commit = _put(packs, manifest)
    before = list(packs.walk(""))
    start_s = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptObject):
            _read(packs, commit)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000 + 20 * packs.size_bytes(commit.manifest)
    assert time.process_time() - start_s < 5
    assert list(packs.walk("")) == before


@pytest.mark.parametrize(
    "paths",
    [
        ["../x"], ["/etc/passwd"], ["a/../../x"], [""], ["."], ["a//b"], ["a/"], ["a\\b"],
        ["a\0b"], ["a", "a"], ["a", "a/b"],
    ],
)  # fmt: skip
def test_a_hostile_files_manifest_is_corrupt(packs: Storage, paths: list[str]) -> None:
    with pytest.raises(CorruptObject):
        _read(packs, _put(packs, _files(*paths)))


@pytest.mark.parametrize(
    "data", [b"not json", b"[]", b"null", b"\xff\xfe", b'{"v":1}', b"[" * 100_000, b'{"v":"x"}']
)
def test_something_else_than_a_manifest_is_corrupt(packs: Storage, data: bytes) -> None:
    with pytest.raises(CorruptObject):
        _read(packs, _put(packs, data))


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_a_deep_tree_is_corrupt(packs: Storage, depth: int) -> None:
    data = msgspec.json.encode(_state(packs)).replace(
        b'{"dict":[["w",{"tensor":0}]]}', b"[" * depth + b"7.5" + b"]" * depth
    )
    assert b"7.5" in data
    with pytest.raises(CorruptObject):
        _read(packs, _put(packs, data))


def test_a_newer_format_is_named(packs: Storage) -> None:
    manifest = _state(packs)
    manifest["v"] = 2
    with pytest.raises(NewerFormat):
        _read(packs, _put(packs, manifest))


def test_a_pack_shorter_than_its_manifest_says_is_corrupt(packs: Storage) -> None:
    manifest = _state(packs)
    manifest["packs"][0][1] = 48
    manifest["arrays"][0].update(shape=[2, 6], parts=[[0, 0, 48, D]])
    with pytest.raises(CorruptObject, match="ends 24 bytes before"):
        load(packs, _put(packs, manifest))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../spec.json",
        "/etc/passwd",
        "00000001/../../spec.json",
        "1/000001.json",
        "x" * 999,
    ],
)
def test_only_a_save_names_a_manifest(packs: Storage, name: str) -> None:
    with pytest.raises(CorruptObject, match="no name of a manifest"):
        read_manifest(packs, name, D * 2)


def test_every_flipped_bit_of_a_manifest_is_found(packs: Storage) -> None:
    commit = save(packs, {"w": torch.ones(2)})
    data = packs.read(commit.manifest)
    for bit in range(0, len(data) * 8, 7):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        packs.write(commit.manifest, bytes(damaged))
        with pytest.raises(CorruptObject, match="damaged"):
            _read(packs, commit)


def test_shards_that_fit_together_are_read_as_one_array(packs: Storage) -> None:
    manifest = _state(packs)
    part = manifest["arrays"][0]["parts"][0]
    columns = torch.arange(6, dtype=torch.float32).view(2, 3)
    whole = save(packs, {"a": columns[:, :1].clone(), "b": columns[:, 1:].clone()})
    pieces = msgspec.json.decode(packs.read(whole.manifest))
    assert part[2] == 24
    manifest["packs"] = pieces["packs"]
    manifest["arrays"][0].pop("parts")
    manifest["arrays"][0]["shards"] = [
        {"offset": [0, start], "shape": array["shape"], "parts": array["parts"]}
        for start, array in zip((0, 1), pieces["arrays"], strict=True)
    ]
    commit = _put(packs, manifest)
    assert torch.equal(load(packs, commit)["w"], columns)
    assert len(state_digest(packs, commit)) == 64


PINWHEEL = ([0, 0, 1, 2], [0, 2, 2, 1], [2, 1, 1, 2], [1, 0, 2, 1], [1, 1, 1, 1])


@pytest.mark.parametrize("wrong", [None, *range(4)])
def test_shards_need_not_form_a_grid(packs: Storage, wrong: int | None) -> None:
    manifest = _state(packs)
    manifest["arrays"][0].update(shape=[3, 3])
    regions = [list(region) for region in PINWHEEL]
    if wrong is not None:
        regions[4][:2] = regions[wrong][:2]
    _shard(manifest, *regions)
    commit = _put(packs, manifest)
    if wrong is None:
        _read(packs, commit)
    else:
        with pytest.raises(CorruptObject, match="overlap"):
            _read(packs, commit)


def test_very_many_shards_are_checked_quickly(packs: Storage) -> None:
    manifest = _state(packs)
    count = 30_000
    manifest["arrays"][0].update(shape=[1, count])
    _shard(manifest, *([0, column, 1, 1] for column in range(count)))
    start_s = time.process_time()
    _read(packs, _put(packs, manifest))
    manifest["arrays"][0]["shards"][-1]["offset"] = [0, count // 2]
    with pytest.raises(CorruptObject, match="overlap"):
        _read(packs, _put(packs, manifest))
    assert time.process_time() - start_s < 10


def test_more_than_the_machines_memory_is_refused_before_it_is_reserved(packs: Storage) -> None:
    manifest = _state(packs)
    manifest["packs"][0][1] = 1 << 30
    parts = [[0, 0, 1 << 30, D]] * 64
    arrays = [{"dtype": "uint8", "shape": [64 << 30], "parts": parts}] * 1000
    nodes = [{"tensor": number} for number in range(1000)]
    manifest.update(arrays=arrays, objects={"model": nodes})
    commit = _put(packs, manifest)
    with pytest.raises(CorruptObject, match="GB of memory"):
        load(packs, commit)


def test_very_many_arrays_cost_no_more_than_their_manifest(packs: Storage) -> None:
    manifest = _state(packs)
    data = msgspec.json.encode(manifest)
    one = msgspec.json.encode(manifest["arrays"][0])
    commit = _put(packs, data.replace(one, b",".join([one] * 100_000)))
    reader = StateReader(packs, read := _read(packs, commit))
    assert len(read.arrays) == 100_000
    reader.plan(read.objects["model"])
    assert reader.fetch() == 24  # what nothing names is not read


def test_a_key_that_is_there_twice_in_the_json_is_read_as_it_was_checked(packs: Storage) -> None:
    data = msgspec.json.encode(_state(packs))
    twice = data.replace(b'"objects":', b'"objects":{"model":{"tensor":0}},"objects":', 1)
    assert set(load(packs, _put(packs, twice))) == {"w"}
    hostile = data[:-1] + b',"objects":{"model":{"tensor":9}}}'
    with pytest.raises(CorruptObject, match="array 9"):
        _read(packs, _put(packs, hostile))
