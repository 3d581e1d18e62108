"""Checkpoints as files that other tools read, and such files as checkpoints."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch

from spotfirst.checkpointer import weights_sha256
from spotfirst.checkpoints.exporting import export_safetensors, export_torch, state_of
from spotfirst.checkpoints.importing import commit_weights, read_weights
from spotfirst.checkpoints.manifest import FilesManifest, StateManifest
from spotfirst.checkpoints.packs import CHUNK_BYTES
from spotfirst.checkpoints.statetree import ITEM_BYTES, walk_leaves
from spotfirst.checkpoints.streaming import read_array
from spotfirst.errors import (
    CorruptObject,
    InvalidSpec,
    SpotfirstError,
    StateMismatch,
    StorageError,
    UnsupportedState,
)
from spotfirst.run import Run, create_run
from spotfirst.spec import ResumeFrom
from spotfirst.storage import Storage
from tests.checkpointing.stored import Writer, manifest_of
from tests.checkpointing.training import Trainer, attempt

FORMAT_LACKS = {"complex32", "complex128", "float4_e2m1fn_x2"}


def raw(value: torch.Tensor) -> bytes:
    flat = value.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def some(dtype: str, shape: tuple[int, ...] = (6, 8)) -> torch.Tensor:
    """Any bits, NaN among them."""
    count = ITEM_BYTES[dtype]
    for size in shape:
        count *= size
    bits = torch.randint(0, 256, (count,), dtype=torch.uint8)
    if dtype == "bool":
        bits &= 1
    return bits.view(getattr(torch, dtype)).reshape(shape)


def a_model() -> OrderedDict[str, Any]:
    tied = some("float32", (3, 5))
    return OrderedDict(
        {
            "embed.weight": tied,
            "big": torch.rand(8, 3 * CHUNK_BYTES // 4 // 8 + 1),
            "head.weight": tied,
            "scale": some("bfloat16", ()),
            "empty": torch.zeros(0, 4),
            "flags": some("bool", (7,)),
            "steps": torch.tensor(7),
        }
    )


def state(run: Run, seq: int) -> StateManifest:
    return state_of(manifest_of(run, seq))


@pytest.mark.parametrize("shards", [1, 3])
def test_safetensors_has_every_bit_and_tied_arrays_once(
    run: Run, tmp_path: Path, shards: int
) -> None:
    model = a_model()
    seq = Writer(run).save(3, model=model, shards=shards)
    path = tmp_path / "model.safetensors"
    size = export_safetensors(run.packs(), state(run, seq), path, metadata={"step": "3"})
    assert path.stat().st_size == size
    found = safetensors.torch.load_file(path)
    assert set(found) == set(model) - {"head.weight"}
    for name, value in found.items():
        assert value.dtype == model[name].dtype
        assert value.shape == model[name].shape
        assert raw(value) == raw(model[name]), name
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {
            "format": "pt", "step": "3", "head.weight": "embed.weight",
        }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_each_element_type_is_kept_or_refused_by_name(run: Run, tmp_path: Path, dtype: str) -> None:
    value = some(dtype)
    seq = Writer(run).save(1, model={"layer.x": value})
    path = tmp_path / "m.safetensors"
    if dtype in FORMAT_LACKS:
        with pytest.raises(UnsupportedState, match=rf"layer\.x \({dtype}\).*\.pt"):
            export_safetensors(run.packs(), state(run, seq), path)
        assert not path.exists()
        return
    export_safetensors(run.packs(), state(run, seq), path)
    found = safetensors.torch.load_file(path)["layer.x"]
    assert (found.dtype, raw(found)) == (value.dtype, raw(value))


@pytest.mark.parametrize("shards", [1, 3])
def test_arrays_of_any_shape_are_put_together_from_shards(run: Run, shards: int) -> None:
    values = {
        str(n): some("int16", shape) for n, shape in enumerate([(), (7,), (3, 5), (2, 3, 4, 5)])
    }
    manifest = state(run, Writer(run).save(1, model=values, shards=shards))
    for name, _, index in walk_leaves(manifest.objects["model"]):
        assert bytes(read_array(run.packs(), manifest, manifest.arrays[index])) == raw(values[name])


def test_what_is_no_array_is_refused_by_safetensors_with_its_place(
    run: Run, tmp_path: Path
) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    manifest = state(run, Writer(run).save(1, optimizer=optimizer))
    with pytest.raises(UnsupportedState, match=r"param_groups/0/lr = 0\.1.*\.pt"):
        export_safetensors(run.packs(), manifest, tmp_path / "o.safetensors", name="optimizer")


def test_nested_names_are_joined_and_never_mixed_up(run: Run, tmp_path: Path) -> None:
    writer = Writer(run)
    seq = writer.save(1, ema={"a": {"b": torch.ones(2)}, "c": [torch.zeros(1)]})
    path = tmp_path / "ema.safetensors"
    export_safetensors(run.packs(), state(run, seq), path, name="ema")
    assert set(safetensors.torch.load_file(path)) == {"a/b", "c/0"}
    seq = writer.save(2, ema={"a": {"b": torch.ones(2)}, "a/b": torch.zeros(1)})
    with pytest.raises(UnsupportedState, match="'a/b'"):
        export_safetensors(run.packs(), state(run, seq), path, name="ema")


def test_an_unknown_object_is_answered_with_those_that_there_are(run: Run, tmp_path: Path) -> None:
    ranked = [{"loader": {"at": torch.tensor(r)}} for r in range(2)]
    manifest = state(run, Writer(run).save(5, net={"w": torch.ones(1)}, ranked=ranked))
    with pytest.raises(StateMismatch, match="step 5 has no object 'model'; it has loader, net"):
        export_safetensors(run.packs(), manifest, tmp_path / "x.safetensors")
    with pytest.raises(StateMismatch, match=r"of rank 2.*of 2 ranks"):
        export_safetensors(run.packs(), manifest, tmp_path / "x.safetensors", name="loader", rank=2)
    export_safetensors(run.packs(), manifest, tmp_path / "x.safetensors", name="loader", rank=1)
    assert safetensors.torch.load_file(tmp_path / "x.safetensors")["at"].item() == 1


def test_a_checkpoint_of_files_says_what_it_holds() -> None:
    with pytest.raises(StateMismatch, match="files of the script"):
        state_of(FilesManifest(packs=(), files=()))


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_damaged_chunk_leaves_no_file(run: Run, tmp_path: Path, suffix: str) -> None:
    manifest = state(run, Writer(run).save(1, model={"w": torch.rand(1000)}))
    name = manifest.packs[0].name
    data = bytearray(run.packs().read(name))
    data[17] ^= 1
    run.packs().write(name, bytes(data))
    export = export_safetensors if suffix == "safetensors" else export_torch
    with pytest.raises(CorruptObject, match=name):
        export(run.packs(), manifest, tmp_path / f"m.{suffix}")  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named(run: Run, tmp_path: Path) -> None:
    manifest = state(run, Writer(run).save(1, model={"w": torch.rand(10)}))
    with pytest.raises(StorageError, match=r"cannot write .*no/such/m\.safetensors"):
        export_safetensors(run.packs(), manifest, tmp_path / "no/such/m.safetensors")


def test_torch_reads_the_state_with_its_safe_reader(run: Run, tmp_path: Path) -> None:
    model = a_model()
    optimizer = {"state": {0: {"step": np.float64(3), "m": np.arange(4)}}, "groups": [{"lr": 0.1}]}
    manifest = state(run, Writer(run).save(3, model=model, optimizer=optimizer, shards=2))
    export_torch(run.packs(), manifest, tmp_path / "m.pt")
    found = torch.load(tmp_path / "m.pt", weights_only=True)
    assert list(found) == list(model)
    assert all(raw(found[name]) == raw(value) for name, value in model.items())
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr(), "tied"
    export_torch(run.packs(), manifest, tmp_path / "all.pt", names=("model", "optimizer"))
    both = torch.load(tmp_path / "all.pt", weights_only=True)
    assert both["optimizer"]["groups"] == [{"lr": 0.1}]
    assert both["optimizer"]["state"][0]["m"].tolist() == [0, 1, 2, 3]


def test_torchs_format_without_torch_says_what_to_do(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = state(run, Writer(run).save(1, model={"w": torch.rand(10)}))
    (tmp_path / "x.pt").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InvalidSpec, match=r"needs torch.*\.safetensors"):
        export_torch(run.packs(), manifest, tmp_path / "m.pt")
    with pytest.raises(InvalidSpec, match=r"needs torch.*\.safetensors"):
        read_weights([tmp_path / "x.pt"])


def test_safetensors_in_and_out_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import spotfirst.checkpoints.exporting, spotfirst.checkpoints.importing\n"
        "import spotfirst.checkpoints.verifying, spotfirst.checkpoints.comparing\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- import --------------------------------------------------------------------------------------


def test_weights_come_back_as_they_went_out(run: Run, tmp_path: Path) -> None:
    model = a_model()
    path = tmp_path / "in.safetensors"
    safetensors.torch.save_file({n: v.clone() for n, v in model.items()}, path)
    seq = commit_weights(run, read_weights([path]))
    chain = run.chain().refresh()
    assert chain.newest() is not None
    assert chain.released, "a training run may claim at once"
    assert chain.commits[0][1].step == 0
    out = tmp_path / "out.safetensors"
    export_safetensors(run.packs(), state(run, seq), out)
    found = safetensors.torch.load_file(out)
    assert {n: raw(v) for n, v in found.items()} == {n: raw(v) for n, v in model.items()}


class Tied(torch.nn.Module):
    """Weights under several names: a tied head, a layer used twice, a shared buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        layer = torch.nn.Linear(3, 3)
        self.layers = torch.nn.ModuleList([layer, torch.nn.Linear(3, 3), layer, layer])
        self.norm = torch.nn.BatchNorm1d(3)
        self.register_buffer("mean", self.norm.running_mean)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def test_a_model_with_tied_weights_is_loaded_by_safetensors_itself(
    run: Run, tmp_path: Path
) -> None:
    model = Tied(1)
    seq = Writer(run).save(1, model=model.state_dict())
    path = tmp_path / "tied.safetensors"
    export_safetensors(run.packs(), state(run, seq), path)
    other = Tied(2)
    assert safetensors.torch.load_model(other, path) == (set(), [])
    assert weights_sha256(other) == weights_sha256(model)


def test_tied_weights_are_tied_after_an_import(run: Run, tmp_path: Path) -> None:
    model = Tied(1)
    path = tmp_path / "tied.safetensors"
    safetensors.torch.save_model(model, str(path))
    manifest = state(run, commit_weights(run, read_weights([path])))
    assert {n for n, _, _ in walk_leaves(manifest.objects["model"])} == set(model.state_dict())
    out = tmp_path / "out.safetensors"
    export_safetensors(run.packs(), manifest, out)
    other = Tied(2)
    safetensors.torch.load_model(other, out)
    assert weights_sha256(other) == weights_sha256(model)


def test_metadata_that_names_no_array_ties_nothing(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    notes = {"a": "b", "b": "a", "c": "nowhere", "format": "pt"}
    safetensors.torch.save_file({"a": torch.ones(2)}, path, metadata=notes)
    manifest = state(run, commit_weights(run, read_weights([path])))
    assert {n for n, _, _ in walk_leaves(manifest.objects["model"])} == {"a", "b"}


def test_a_training_starts_from_pretrained_weights_with_a_new_optimizer(
    run: Run, storage: Storage, tmp_path: Path
) -> None:
    pretrained = Trainer()
    with torch.no_grad():
        for parameter in pretrained.model.parameters():
            parameter.uniform_(-1, 1)
    path = tmp_path / "base.safetensors"
    safetensors.torch.save_file(pretrained.model.state_dict(), path)
    seq = commit_weights(run, read_weights([path]))
    source = ResumeFrom(run_id="r", step=0, seq=seq)
    spec = msgspec.structs.replace(run.spec(), run_id="tuned", resume_from=source)
    strictly = create_run(storage, msgspec.structs.replace(spec, run_id="strictly"))
    with pytest.raises(StateMismatch, match="optimizer is not in the checkpoint"):
        Trainer(attempt(strictly, 1, tmp_path)).checkpointer.restore()
    trainer = Trainer(attempt(create_run(storage, spec), 1, tmp_path), strict=False)
    assert trainer.checkpointer.restore() == 0
    assert weights_sha256(trainer.model) == weights_sha256(pretrained.model)
    trainer.train(2)


def test_a_model_in_several_files_is_one(run: Run, tmp_path: Path) -> None:
    paths = [tmp_path / f"model-{n}.safetensors" for n in (1, 2)]
    safetensors.torch.save_file({"a": torch.ones(2)}, paths[0])
    safetensors.torch.save_file({"b": torch.zeros(3)}, paths[1])
    manifest = state(run, commit_weights(run, read_weights(paths), name="net", step=7))
    assert manifest.step == 7
    assert {name for name, _, _ in walk_leaves(manifest.objects["net"])} == {"a", "b"}
    with pytest.raises(InvalidSpec, match=r"'a' is in .* and in"):
        read_weights([paths[0], paths[0]])


def test_a_torch_file_keeps_its_tree_and_its_ties(run: Run, tmp_path: Path) -> None:
    tied = torch.rand(4)
    inside = {"state_dict": OrderedDict(a=tied, b=tied), "epoch": 3}
    torch.save(inside, tmp_path / "lightning.ckpt")
    weights = read_weights([tmp_path / "lightning.ckpt"], key="state_dict")
    manifest = state(run, commit_weights(run, weights))
    assert len(manifest.arrays) == 1
    export_torch(run.packs(), manifest, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert raw(found["b"]) == raw(tied)


def test_a_part_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    torch.save({"net": {"w": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(InvalidSpec, match=r"no part 'model'.*\['net'\]"):
        read_weights([tmp_path / "x.pt"], key="model")


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_a_torch_file_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(InvalidSpec, match="safe reader"):
        read_weights([tmp_path / "evil.pt"])
    assert capsys.readouterr().out == ""


def test_a_torch_array_that_repeats_itself_without_end_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1).expand(1 << 40)}, tmp_path / "bomb.pt")
    with pytest.raises(InvalidSpec, match="larger than the file"):
        read_weights([tmp_path / "bomb.pt"])


def test_a_second_import_into_a_run_is_refused(run: Run, tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    weights = read_weights([tmp_path / "a.safetensors"])
    commit_weights(run, weights)
    with pytest.raises(InvalidSpec, match="import into a new run"):
        commit_weights(run, weights)


def test_an_import_that_died_is_begun_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    run.chain().claim(1)  # and no more
    seq = commit_weights(run, read_weights([tmp_path / "a.safetensors"]))
    assert state(run, seq).size_bytes == 8


def _safetensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "empty": b"",
    "short": b"\1\0\0",
    "a header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "no JSON": _safetensors(b"{nothing}"),
    "a list": _safetensors([]),
    "no offsets": _safetensors({"a": {"dtype": "F32", "shape": [2]}}, b"x" * 8),
    "an unknown type": _safetensors({"a": {**F32, "dtype": "Q8"}}, b"x" * 8),
    "a negative shape": _safetensors({"a": {**F32, "shape": [-1, -2]}}, b"x" * 8),
    "a huge shape": _safetensors({"a": {**F32, "shape": [1 << 60]}}, b"x" * 8),
    "an overlap": _safetensors({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, b"x" * 12),
    "a gap": _safetensors({"a": {**F32, "data_offsets": [8, 16]}}, b"x" * 16),
    "bytes behind the end": _safetensors({"a": F32}, b"x" * 7),
    "bytes too many": _safetensors({"a": F32}, b"x" * 9),
    "negative offsets": _safetensors({"a": {**F32, "data_offsets": [-8, 0]}}, b"x" * 8),
    "nested without end": _safetensors(b'{"a":' * 5000 + b"1" + b"}" * 5000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_safetensors_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.safetensors").write_bytes(HOSTILE[name])
    with pytest.raises(InvalidSpec, match=r"x\.safetensors"):
        read_weights([tmp_path / "x.safetensors"])


def test_more_dimensions_than_a_checkpoint_may_have_are_not_committed(
    run: Run, tmp_path: Path
) -> None:
    deep = {"dtype": "F32", "shape": [1] * 70, "data_offsets": [0, 4]}
    (tmp_path / "x.safetensors").write_bytes(_safetensors({"a": deep}, b"xxxx"))
    with pytest.raises(SpotfirstError):
        commit_weights(run, read_weights([tmp_path / "x.safetensors"]))
    assert run.chain().refresh().commits == []


def test_safetensors_with_arrays_of_nothing_is_read(run: Run, tmp_path: Path) -> None:
    values = {"a": torch.zeros(0), "b": torch.ones(3), "c": torch.zeros(2, 0)}
    safetensors.torch.save_file(values, tmp_path / "x.safetensors")
    manifest = state(run, commit_weights(run, read_weights([tmp_path / "x.safetensors"])))
    assert sorted(array.shape for array in manifest.arrays) == [(0,), (2, 0), (3,)]
