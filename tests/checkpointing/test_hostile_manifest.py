from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest
import torch

from spotfirst.checkpoints.blobs import BlobStore
from spotfirst.checkpoints.manifest import read_manifest
from spotfirst.errors import CorruptObject, NewerFormat
from tests.checkpointing.states import load, save


def _state(blobs: BlobStore) -> dict[str, Any]:
    digest = save(blobs, {"w": torch.arange(6, dtype=torch.float32).view(2, 3)})
    manifest: dict[str, Any] = msgspec.json.decode(blobs.get(digest))
    return manifest


def _files(blobs: BlobStore, *paths: str) -> dict[str, Any]:
    files = [{"path": path, "size_bytes": 0} for path in paths]
    return {"v": 1, "content": "files", "blobs": [], "files": files}


def _put(blobs: BlobStore, manifest: Any) -> str:
    return blobs.put(msgspec.json.encode(manifest))


STATE_CHANGES: dict[str, Any] = {
    "huge shape": lambda m: m["arrays"][0].update(shape=[1 << 40, 1 << 40]),
    "huge empty shape": lambda m: m["arrays"][0].update(shape=[0, 1 << 62], parts=[]),
    "other shape": lambda m: m["arrays"][0].update(shape=[2, 4]),
    "negative shape": lambda m: m["arrays"][0].update(shape=[-2, -3]),
    "many dimensions": lambda m: m["arrays"][0].update(shape=[1] * 63 + [2, 3]),
    "unknown dtype": lambda m: m["arrays"][0].update(dtype="object"),
    "attribute as dtype": lambda m: m["arrays"][0].update(dtype="__loader__"),
    "wider dtype": lambda m: m["arrays"][0].update(dtype="float64"),
    "part past the end": lambda m: m["arrays"][0].update(parts=[[0, 8, 24]]),
    "negative offset": lambda m: m["arrays"][0].update(parts=[[0, -8, 24]]),
    "negative size": lambda m: m["arrays"][0].update(parts=[[0, 0, 32], [0, 0, -8]]),
    "blob that is not listed": lambda m: m["arrays"][0].update(parts=[[1, 0, 24]]),
    "negative blob": lambda m: m["arrays"][0].update(parts=[[-1, 0, 24]]),
    "no parts": lambda m: m["arrays"][0].update(parts=[]),
    "path as digest": lambda m: m.update(blobs=[["../../spec.json", 24]]),
    "huge blob": lambda m: m.update(blobs=[[m["blobs"][0][0], 1 << 50]]),
    "empty blob": lambda m: m.update(blobs=[[m["blobs"][0][0], 0]]),
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
    "hostile generators": lambda m: m.update(rng={"tensor": 7}),
}


@pytest.mark.parametrize("change", STATE_CHANGES)
def test_a_hostile_state_manifest_is_corrupt_and_reserves_nothing(
    blobs: BlobStore, change: str
) -> None:
    manifest = _state(blobs)
    STATE_CHANGES[change](manifest)
    digest = _put(blobs, manifest)
    tracemalloc.start()
    try:
        with pytest.raises(CorruptObject):
            read_manifest(blobs, digest)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize(
    "paths",
    [
        ["../x"], ["/etc/passwd"], ["a/../../x"], [""], ["."], ["a//b"], ["a/"], ["a\\b"],
        ["a\0b"], ["a", "a"], ["a", "a/b"],
    ],
)  # fmt: skip
def test_a_hostile_files_manifest_is_corrupt(blobs: BlobStore, paths: list[str]) -> None:
    with pytest.raises(CorruptObject):
        read_manifest(blobs, _put(blobs, _files(blobs, *paths)))


@pytest.mark.parametrize(
    "data", [b"not json", b"[]", b"null", b"\xff\xfe", b'{"v":1}', b"[" * 100_000, b'{"v":"x"}']
)
def test_something_else_than_a_manifest_is_corrupt(blobs: BlobStore, data: bytes) -> None:
    with pytest.raises(CorruptObject):
        read_manifest(blobs, blobs.put(data))


@pytest.mark.parametrize("depth", [300, 900, 100_000])
def test_a_deep_tree_is_corrupt(blobs: BlobStore, depth: int) -> None:
    data = msgspec.json.encode(_state(blobs)).replace(
        b'{"dict":[["w",{"tensor":0}]]}', b"[" * depth + b"7.5" + b"]" * depth
    )
    assert b"7.5" in data
    digest = blobs.put(data)
    with pytest.raises(CorruptObject):
        read_manifest(blobs, digest)


def test_a_newer_format_is_named(blobs: BlobStore) -> None:
    manifest = _state(blobs)
    manifest["v"] = 2
    with pytest.raises(NewerFormat):
        read_manifest(blobs, _put(blobs, manifest))


def test_a_blob_shorter_than_its_manifest_says_is_corrupt(blobs: BlobStore) -> None:
    manifest = _state(blobs)
    manifest["blobs"][0][1] = 48
    manifest["arrays"][0].update(shape=[2, 6], parts=[[0, 0, 48]])
    with pytest.raises(CorruptObject, match="has 24 bytes"):
        load(blobs, _put(blobs, manifest))
