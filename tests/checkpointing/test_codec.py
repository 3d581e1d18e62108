"""Compression changes how bytes lie in a pack, and nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.checkpoints.codec import SHUFFLES, decode, encode, pays
from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.checkpoints.weights import state_digest
from spotfirst.context import TrainerContext
from spotfirst.errors import CorruptObject
from spotfirst.run import Run
from tests.checkpointing.training import Trainer, uninterrupted


@given(st.binary(min_size=1, max_size=300), st.integers(1, 40), st.sampled_from(SHUFFLES))
def test_what_is_packed_comes_back(piece: bytes, times: int, item_bytes: int) -> None:
    data = memoryview(piece * times)
    packed = encode(data, item_bytes)
    if packed is None:
        return
    target = memoryview(bytearray(len(data)))
    decode(memoryview(packed), target, item_bytes)
    assert target == data


def test_noise_is_stored_as_it_is() -> None:
    assert encode(memoryview(np.random.default_rng(0).bytes(10_000)), 4) is None


def test_packed_bytes_that_are_damaged_or_of_another_size_are_refused() -> None:
    packed = encode(memoryview(bytes(10_000)), 4)
    assert packed is not None
    for data, size in ((packed[:-3], 10_000), (packed, 9_999), (b"nonsense", 10_000)):
        with pytest.raises(CorruptObject, match="compressed"):
            decode(memoryview(data), memoryview(bytearray(size)), 4)


def test_it_pays_for_a_slow_storage_only() -> None:
    sample = memoryview((np.arange(100_000) % 7).astype(np.float32).tobytes())
    clock = itertools.count(0.0, 1.0)  # it takes a second
    assert pays(sample, 4, 100.0, threads=1, timer=lambda: next(clock))
    assert not pays(sample, 4, 1e9, threads=1, timer=lambda: next(clock))


def test_compressed_checkpoints_resume_to_the_same_weights(run: Run) -> None:
    context = TrainerContext(run, None)
    Trainer(context, period_s=0, compress=True).train(5)
    assert Trainer(context, period_s=0, compress=True).train() == uninterrupted()
    newest = run.chain().refresh().newest()
    assert newest is not None
    assert state_digest(run.packs(), newest[1]) == uninterrupted()
    manifest = read_manifest(run.packs(), newest[1].manifest, newest[1].digest)
    assert isinstance(manifest, StateManifest)
    assert any(part.packed_bytes for array in manifest.arrays for part in array.parts)
