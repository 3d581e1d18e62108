"""An epoch that is resumed goes on with the very batches, whatever draws at random."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

from spotfirst.checkpointer import Checkpointer
from spotfirst.errors import StateMismatch
from spotfirst.integrations.dataloader import ResumableLoader
from tests.integrations.data import SAMPLES, Noisy, Streamed, seed

BATCH = 16
BATCHES = 6


class ReadsAhead:
    """Reads a batch before it gives out the one before, as Accelerate's loaders do."""

    def __init__(self) -> None:
        self._loader = DataLoader(Noisy(), BATCH, shuffle=True)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Any:
        iterator = iter(self._loader)
        batch = next(iterator)
        for following in iterator:
            yield batch
            batch = following
        yield batch


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Noisy(), BATCH),
    "shuffled": lambda: DataLoader(Noisy(), BATCH, shuffle=True),
    "own generator": lambda: DataLoader(
        Noisy(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "weighted": lambda: DataLoader(
        Noisy(), BATCH, sampler=WeightedRandomSampler([1.0 + i for i in range(SAMPLES)], SAMPLES)
    ),
    "streamed": lambda: DataLoader(Streamed(), BATCH),
    "two workers": lambda: DataLoader(Noisy(), BATCH, shuffle=True, num_workers=2),
    "reads ahead": ReadsAhead,
}


def batches(loader: ResumableLoader, epochs: int) -> list[torch.Tensor]:
    """What a training sees that draws at random itself."""
    seen = []
    for _ in range(loader.epoch, epochs):
        for batch in loader:
            torch.rand(random.randint(1, 3))
            seen.append(batch["x"])
    return seen


def left_after(loader: ResumableLoader, count: int) -> dict[str, Any]:
    """Its state after so many batches of several epochs."""
    done = 0
    while True:
        for _ in loader:
            torch.rand(random.randint(1, 3))
            done += 1
            if done == count:
                return loader.state_dict()


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("count", [1, BATCHES, BATCHES + 4])
def test_the_batches_that_follow_are_those_that_would_have(kind: str, count: int) -> None:
    seed()
    expected = batches(ResumableLoader(LOADERS[kind]()), epochs=2)[count:]
    seed()
    state = left_after(ResumableLoader(LOADERS[kind]()), count)
    seed()
    resumed = ResumableLoader(LOADERS[kind]())
    resumed.load_state_dict(state)
    torch.rand(7)  # what a framework draws before it begins changes nothing
    actual = batches(resumed, epochs=2)
    assert len(actual) == len(expected)
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


def test_it_changes_nothing_for_a_training_without_interruption() -> None:
    seed()
    plain = DataLoader(Noisy(), BATCH, shuffle=True)
    expected = [batch["x"] for _ in range(2) for batch in plain]
    seed()
    resumable = ResumableLoader(DataLoader(Noisy(), BATCH, shuffle=True))
    actual = [batch["x"] for _ in range(2) for batch in resumable]
    assert all(a.equal(b) for a, b in zip(actual, expected, strict=True))


def test_persistent_workers_get_the_order_that_would_have_been() -> None:
    def loader() -> ResumableLoader:
        seed()
        return ResumableLoader(
            DataLoader(list(range(60)), BATCH, shuffle=True, num_workers=1, persistent_workers=True)  # type: ignore[arg-type]
        )

    whole = loader()
    expected = [batch.tolist() for _ in range(3) for batch in whole]
    first = loader()
    seen = 0
    while seen < 6:
        for _ in first:
            seen += 1
            if seen == 6:
                break
    state = first.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    actual = [batch.tolist() for _ in range(resumed.epoch, 3) for batch in resumed]
    assert actual == expected[6:]


def test_without_workers_the_used_samples_are_not_read_again() -> None:
    read = []

    class Counted(Noisy):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            read.append(index)
            return super().__getitem__(index)

    seed()
    first = ResumableLoader(DataLoader(Counted(), BATCH, shuffle=True))
    state = left_after(first, 4)
    read.clear()
    resumed = ResumableLoader(DataLoader(Counted(), BATCH, shuffle=True))
    resumed.load_state_dict(state)
    next(iter(resumed))
    assert len(read) == BATCH


def test_batches_are_skipped_as_the_caller_says() -> None:
    seed()
    state = left_after(ResumableLoader(LOADERS["in order"]()), 2)
    rest = DataLoader([{"x": torch.full((1,), 9.0)}], None)  # type: ignore[arg-type]
    asked = []

    def skip(_: Any, count: int) -> Any:
        asked.append(count)
        return rest

    resumed = ResumableLoader(LOADERS["in order"](), skip=skip)
    resumed.load_state_dict(state)
    assert [batch["x"].item() for batch in resumed] == [9.0]
    assert asked == [2]
    assert resumed.epoch == 1


def test_data_with_fewer_batches_than_were_used_is_refused() -> None:
    seed()
    state = left_after(ResumableLoader(LOADERS["in order"]()), 4)
    resumed = ResumableLoader(DataLoader(range(BATCH), BATCH))  # type: ignore[arg-type]
    resumed.load_state_dict(state)
    with pytest.raises(StateMismatch, match="has only 1: train with the data"):
        next(iter(resumed))


def test_a_position_is_not_restored_when_data_was_read_before() -> None:
    seed()
    state = left_after(ResumableLoader(LOADERS["in order"]()), 4)
    begun = ResumableLoader(LOADERS["in order"]())
    next(iter(begun))
    with pytest.raises(StateMismatch, match="restore the checkpoint first"):
        begun.load_state_dict(state)


def test_an_epoch_that_was_left_counts() -> None:
    loader = ResumableLoader(LOADERS["in order"]())
    for epoch in range(3):
        for _ in loader:
            assert loader.epoch == epoch
            break
    assert loader.fetched == 1


def test_a_checkpoint_holds_the_position(tmp_path: Any) -> None:
    seed()
    loader = ResumableLoader(LOADERS["shuffled"]())
    checkpointer = Checkpointer(loader=loader, storage=str(tmp_path))
    checkpointer.restore()
    iterator = iter(loader)
    next(iterator)
    checkpointer.step(1)
    checkpointer.close()
    expected = next(iterator)["x"]
    again = ResumableLoader(LOADERS["shuffled"]())
    assert Checkpointer(loader=again, storage=str(tmp_path)).restore() == 1
    assert next(iter(again))["x"].equal(expected)
