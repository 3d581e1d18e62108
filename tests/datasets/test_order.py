"""The computed order of samples: every one once an epoch, from any position."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.datasets import SampleOrder

_LENGTH = st.integers(1, 400)
_SEED = st.integers(-(2**70), 2**70)


@given(_LENGTH, _SEED, st.integers(0, 10**12))
def test_every_epoch_holds_every_sample_once(length: int, seed: int, epoch: int) -> None:
    order = SampleOrder(length, seed)
    assert sorted(order.take(epoch * length, length)) == list(range(length))


@given(st.integers(1, 2**63), _SEED, st.integers(0, 2**80))
def test_any_position_of_any_length_has_a_sample(length: int, seed: int, position: int) -> None:
    assert 0 <= SampleOrder(length, seed)[position] < length


@given(_LENGTH, _SEED, st.integers(0, 5000), st.integers(0, 50))
def test_it_can_be_entered_at_any_position(length: int, seed: int, start: int, n: int) -> None:
    order = SampleOrder(length, seed)
    walked = list(itertools.islice(SampleOrder(length, seed), start, start + n))
    assert order.take(start, n) == walked


@given(st.integers(1, 64), st.integers(0, 1000), st.integers(1, 9), _SEED)
def test_the_batch_of_a_step_is_the_same_at_every_world_size(
    size: int, step: int, world_size: int, seed: int
) -> None:
    order = SampleOrder(1000, seed)
    parts = [order.batch(step, size, rank=r, world_size=world_size) for r in range(world_size)]
    assert list(itertools.chain(*parts)) == order.batch(step, size) == order.take(step * size, size)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_epochs_and_seeds_differ() -> None:
    order = SampleOrder(1000, seed=1)
    assert order.take(0, 1000) != order.take(1000, 1000)
    assert order.take(0, 1000) != SampleOrder(1000, seed=2).take(0, 1000)


def test_the_order_never_changes_between_releases() -> None:
    """A resumed run may have a newer Spotfirst: these numbers are part of the format."""
    assert SampleOrder(10, 0).take(0, 10) == [5, 7, 0, 3, 9, 4, 6, 2, 1, 8]
    assert SampleOrder(10**12, 7).take(10**11, 3) == [
        965726252176, 559550842021, 643756472617,
    ]  # fmt: skip


def test_every_sample_is_equally_likely_at_every_place() -> None:
    length, seeds = 7, 3500
    counts = [[0] * length for _ in range(length)]
    for seed in range(seeds):
        for place, sample in enumerate(SampleOrder(length, seed).take(0, length)):
            counts[place][sample] += 1
    expected = seeds / length
    chi_square = sum((n - expected) ** 2 / expected for row in counts for n in row)
    assert chi_square < 75  # 36 degrees of freedom: 99.98 % of fair shuffles


def test_neighbours_are_spread() -> None:
    samples = SampleOrder(100_000, 3).take(0, 2000)
    near = sum(abs(a - b) < 1000 for a, b in itertools.pairwise(samples))
    assert near < 2000 * 0.02 * 1.5  # 2 % by chance


@pytest.mark.parametrize("length", [0, -1])
def test_an_order_needs_samples(length: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SampleOrder(length, 0)


def test_there_is_nothing_before_position_0_and_no_rank_beyond_the_world() -> None:
    with pytest.raises(IndexError):
        SampleOrder(3, 0)[-1]
    with pytest.raises(ValueError, match="rank 2"):
        SampleOrder(3, 0).batch(0, 4, rank=2, world_size=2)


def test_a_training_script_loads_neither_arrow_nor_the_storage_for_it() -> None:
    code = (
        "import sys; from spotfirst.datasets import SampleOrder; SampleOrder(3, 0)[1];"
        "print([m for m in ('pyarrow', 'fsspec', 'torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
