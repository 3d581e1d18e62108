from __future__ import annotations

import enum
import io
import math
import subprocess
import sys
import warnings
import zoneinfo
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import datetime, timedelta, timezone
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst.checkpoints.memory import Arena
from spotfirst.checkpoints.statetree import ITEM_BYTES, unflatten
from spotfirst.errors import UnsupportedState
from spotfirst.storage import Storage, open_storage
from tests.checkpointing.states import load, manifest_of, same, save


def opened(data: bytes, position: int) -> io.BytesIO:
    file = io.BytesIO(data)
    file.seek(position)
    return file


keys = st.text(max_size=5) | st.integers()
hashables = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.binary(max_size=5)
    | st.dates() | st.uuids() | st.sampled_from([torch.float32, torch.bfloat16]),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)  # fmt: skip
offsets = st.integers(-1439, 1439).map(lambda m: timezone(timedelta(minutes=m)))
cheap = (
    st.complex_numbers() | st.sets(hashables, max_size=4) | st.frozensets(hashables, max_size=4)
    | st.decimals(allow_nan=False) | st.uuids() | st.dates() | st.times() | st.timedeltas()
    | st.datetimes() | st.datetimes(timezones=offsets)
    | st.binary(max_size=9).map(bytearray)
    | st.builds(opened, st.binary(max_size=9), st.integers(0, 12))
    | st.text("ab/. é", max_size=9).map(Path) | st.text("ab/. é", max_size=9).map(PurePosixPath)
    | st.builds(range, st.integers(), st.integers(), st.integers(1))
    | st.slices(10)
    | st.sampled_from([torch.float8_e4m3fn, torch.complex64, torch.int8, torch.bool])
    | st.sampled_from(["cpu", "cuda", "cuda:3", "meta", "mps:0"]).map(torch.device)
    | st.lists(st.integers(0, 1 << 40), max_size=4).map(torch.Size)
)  # fmt: skip
leaves = (
    cheap
    | st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=50)
    | st.builds(
        lambda n, value: torch.full((n, 2), value), st.integers(0, 3), st.floats(width=32)
    )
    | st.builds(lambda n: np.arange(n, dtype=np.int16), st.integers(0, 5))
    | st.builds(np.float64, st.floats())
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(0, 5))
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_any_tree_comes_back_as_it_was(state: Any) -> None:
    packs = open_storage("memory://trees")
    assert same(load(packs, save(packs, state)), state)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.parametrize("shape", [(), (0, 3), (4, 6)])
def test_every_dtype_comes_back_bit_for_bit(
    packs: Storage, dtype: str, shape: tuple[int, ...]
) -> None:
    kind = getattr(torch, dtype)
    assert ITEM_BYTES[dtype] == kind.itemsize
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex32 is experimental, says torch
        raw = torch.arange(math.prod(shape) * kind.itemsize, dtype=torch.uint8)
        if dtype == "bool":
            raw %= 2
        tensor = raw.view(kind).view(shape) if raw.numel() else torch.empty(shape, dtype=kind)
        assert same(load(packs, save(packs, tensor)), tensor)


def test_views_are_stored_by_what_they_show(packs: Storage) -> None:
    base = torch.arange(24, dtype=torch.float32).view(4, 6)
    wave = torch.tensor([1 + 2j, 3 - 4j])
    state = {
        "transposed": base.t(), "strided": base[::2, 1::3], "expanded": base[:1].expand(3, 6),
        "conjugate": wave.conj(), "plain": wave, "negative": wave.conj().imag,
    }  # fmt: skip
    loaded = load(packs, save(packs, state))
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor.resolve_conj().resolve_neg()), name


def test_tied_tensors_are_stored_once_and_come_back_tied(packs: Storage) -> None:
    weight = torch.ones(3)
    commit = save(packs, {"embedding": weight, "head": weight, "other": torch.ones(3)})
    assert len(manifest_of(packs, commit).arrays) == 2
    loaded = load(packs, commit)
    assert loaded["embedding"] is loaded["head"]
    assert loaded["embedding"] is not loaded["other"]


def test_small_tensors_share_a_pack(packs: Storage) -> None:
    state = {f"bias{i}": torch.full((10,), float(i)) for i in range(20)}
    commit = save(packs, state)
    assert len(manifest_of(packs, commit).packs) == 1
    assert same(load(packs, commit), state)


def test_an_array_of_several_chunks_comes_back(
    packs: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spotfirst.checkpoints.packs.CHUNK_BYTES", 4096)
    state = {"weight": torch.arange(3001, dtype=torch.float32), "bias": torch.ones(3)}
    commit = save(packs, state)
    sizes = [
        [part.size_bytes for part in array.parts] for array in manifest_of(packs, commit).arrays
    ]
    assert sizes == [[4096, 4096, 3812], [12]]
    assert same(load(packs, commit), state)


def test_only_tensors_that_changed_are_written_again(packs: Storage) -> None:
    frozen, trained = torch.zeros(100_000), torch.zeros(10)
    first = save(packs, {"frozen": frozen, "trained": trained})
    trained += 1
    second = save(packs, {"frozen": frozen, "trained": trained}, before=first)
    assert second.new_bytes == 40
    assert same(load(packs, second), {"frozen": frozen, "trained": trained})


def test_module_versions_survive(packs: Storage) -> None:
    module = torch.nn.BatchNorm1d(3)
    state = module.state_dict()
    loaded = load(packs, save(packs, state))
    assert loaded._metadata == state._metadata  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
        torch.optim.lr_scheduler.ReduceLROnPlateau,
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [
                torch.optim.lr_scheduler.LinearLR(o),
                torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
            ],
            [3],
        ),
    ],
)
def test_torchs_schedulers_and_optimizers_can_be_stored(packs: Storage, make: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.ones(2)
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "scheduler": make(optimizer).state_dict()}
    assert same(load(packs, save(packs, state)), state)


def test_counters_keep_their_kind(packs: Storage) -> None:
    assert same(load(packs, save(packs, Counter([2, 2, 4]))), Counter([2, 2, 4]))


Point = namedtuple("Point", "x y")  # noqa: PYI024 - the untyped kind is what users have


class Mode(enum.IntEnum):
    ON = 1


class Own(frozenset[Any]):
    pass


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), "builtins.object"),
        (lambda: None, "builtins.function"),
        ({1, io}, "builtins.module"),
        ({1, frozenset([torch.ones(1)])}, "torch.Tensor"),
        (Mode.ON, "Mode"),
        (Own((1,)), "Own"),
        (datetime(2026, 1, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Rome")), "Europe/Rome"),
        (Point(1, 2), "Point"),
        (defaultdict(int), "defaultdict"),
        (io.StringIO(), "StringIO"),
        (torch.eye(2).to_sparse(), "sparse_coo"),
        (torch.empty(2, device="meta"), "meta"),
        (np.array(["a"]), "<U1"),
        (np.array([object()]), "object"),
        ({1.5: 0}, "key 1.5"),
        ({True: 0}, "key True"),
        ("\ud800", "Unicode"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name_and_place(
    packs: Storage, value: Any, named: str
) -> None:
    with pytest.raises(UnsupportedState) as refusal:
        save(packs, {"a": [0, {"b": value}]})
    assert named in str(refusal.value)
    assert "state['a'][1]['b']" in str(refusal.value)


def test_quantised_tensors_are_refused_by_name(packs: Storage) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(UnsupportedState, match="qint8"):
        save(packs, tensor)


def test_a_state_that_contains_itself_is_refused(packs: Storage) -> None:
    state: dict[str, Any] = {}
    state["self"] = state
    with pytest.raises(UnsupportedState, match="contain itself"):
        save(packs, state)


def test_nothing_is_pickled(packs: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("pickle was used")

    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    state = {"a": torch.ones(3), "b": np.ones(2), "c": [None]}
    assert same(load(packs, save(packs, state)), state)


def test_memory_is_used_again(packs: Storage) -> None:
    arena = Arena()
    save(packs, torch.ones(8), arena=arena)
    first = arena.fit(1).address
    commit = save(packs, torch.zeros(8), arena=arena)
    assert arena.fit(1).address == first
    assert same(load(packs, commit), torch.zeros(8))


def test_types_of_torch_are_read_as_text_where_there_is_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from spotfirst.checkpoints.statetree import unflatten\n"
        "nodes = [{'dtype': 'bfloat16'}, {'device': 'cuda:1'}, {'size': [2, 3]}]\n"
        "print(unflatten(nodes, None))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "['torch.bfloat16', 'cuda:1', (2, 3)]\n"


@pytest.mark.parametrize(
    "node",
    [
        {"dtype": "load"}, {"dtype": "__class__"}, {"dtype": "a.b"}, {"device": "cuda:1; x"},
        {"device": "nowhere"}, {"complex": "00"}, {"decimal": "x"}, {"decimal": []}, {"uuid": "x"},
        {"datetime": "yesterday"}, {"timedelta": [1e300]}, {"timedelta": ["a"]}, {"size": ["a"]},
        {"range": [1, 2, 0]}, {"range": []}, {"slice": []}, {"set": [[]]}, {"set": [{"tensor": 0}]},
        {"deque": []}, {"deque": [-1]}, {"deque": ["a", 1]}, {"path": 3},
        {"bytesio": []}, {"bytesio": [0, 1]}, {"bytesio": [-1, ""]}, {"bytesio": [0, "?"]},
    ],
)  # fmt: skip
def test_a_node_that_is_never_written_is_refused(node: Any) -> None:
    with pytest.raises(ValueError):
        unflatten(node, lambda _tag, _index: None)
