"""An epoch that is resumed goes on with the very batches, whatever draws at random."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler

from spotfirst.checkpointer import Checkpointer
from spotfirst.errors import InvalidSpec, StateMismatch
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


class Short(Streamed):
    """Of the same data, one batch."""

    def __iter__(self) -> Any:
        return itertools.islice(super().__iter__(), BATCH)


class OlderGenerator(torch.utils.data.Sampler[int]):
    """It shuffles with NumPy's RandomState, which is older than its Generator."""

    def __init__(self) -> None:
        self._draws = np.random.RandomState(4)

    def __iter__(self) -> Any:
        return iter(self._draws.permutation(SAMPLES).tolist())

    def __len__(self) -> int:
        return SAMPLES


LOADERS: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Noisy(), BATCH),
    "shuffled": lambda: DataLoader(Noisy(), BATCH, shuffle=True),
    "own generator": lambda: DataLoader(
        Noisy(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
    "weighted": lambda: DataLoader(
        Noisy(), BATCH, sampler=WeightedRandomSampler([1.0 + i for i in range(SAMPLES)], SAMPLES)
    ),
    "shuffled by RandomState": lambda: DataLoader(Noisy(), BATCH, sampler=OlderGenerator()),
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


def left_after(loader: ResumableLoader, count: int, *, draws: bool = False) -> dict[str, Any]:
    """Its state after so many batches of several epochs."""
    done = 0
    while True:
        for _ in loader:
            if draws:
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
    state = left_after(ResumableLoader(LOADERS[kind]()), count, draws=True)
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
    state = left_after(loader(), 6)
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
    state = left_after(ResumableLoader(DataLoader(Streamed(), BATCH)), 4)
    resumed = ResumableLoader(DataLoader(Short(), BATCH))
    resumed.load_state_dict(state)
    with pytest.raises(StateMismatch, match="has only 1: train with the data"):
        next(iter(resumed))


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: DataLoader(Noisy(), 8), "batch_size was 16 and is 8"),
        (lambda: DataLoader(Noisy(), BATCH, drop_last=True), "drop_last was False and is True"),
        (
            lambda: DataLoader(Noisy(), BATCH, shuffle=True),
            "sampler was SequentialSampler and is RandomSampler",
        ),
        (lambda: DataLoader(range(BATCH), BATCH), "samples was 92 and is 16"),  # type: ignore[arg-type]
    ],
)
def test_other_batches_in_the_middle_of_an_epoch_are_refused_by_name(
    other: Callable[[], Any], what: str
) -> None:
    seed()
    state = left_after(ResumableLoader(LOADERS["in order"]()), 4)
    with pytest.raises(StateMismatch, match=what):
        ResumableLoader(other()).load_state_dict(state)


def test_other_batches_are_taken_when_an_epoch_begins() -> None:
    loader = ResumableLoader(DataLoader(range(8), 4))  # type: ignore[arg-type]
    assert len(list(loader)) == 2
    resumed = ResumableLoader(DataLoader(range(8), 2))  # type: ignore[arg-type]
    resumed.load_state_dict(loader.state_dict())
    assert resumed.epoch == 1
    assert len(list(resumed)) == 4


def test_map_style_data_may_be_read_by_another_number_of_workers() -> None:
    def loader(workers: int) -> ResumableLoader:
        seed()
        return ResumableLoader(DataLoader(range(60), 4, shuffle=True, num_workers=workers))  # type: ignore[arg-type]

    whole = [batch.tolist() for batch in loader(0)]
    for before, after in ((2, 0), (0, 2)):
        state = left_after(loader(before), 5)
        resumed = loader(after)
        resumed.load_state_dict(state)
        assert [batch.tolist() for batch in resumed] == whole[5:]


def test_workers_that_would_draw_another_order_are_refused() -> None:
    loader = ResumableLoader(DataLoader(range(60), 4, shuffle=True))  # type: ignore[arg-type]
    iterator = iter(loader)
    torch.rand(1)
    next(iterator)
    other = ResumableLoader(DataLoader(range(60), 4, shuffle=True, num_workers=1))  # type: ignore[arg-type]
    with pytest.raises(StateMismatch, match="num_workers was 0 and is 1"):
        other.load_state_dict(loader.state_dict())


def test_streamed_data_of_another_number_of_workers_is_refused() -> None:
    state = left_after(ResumableLoader(DataLoader(Streamed(), BATCH)), 2)
    other = ResumableLoader(DataLoader(Streamed(), BATCH, num_workers=2))
    with pytest.raises(StateMismatch, match="num_workers was 0 and is 2"):
        other.load_state_dict(state)


def test_a_loop_that_breaks_off_after_a_number_of_batches_does_so_again() -> None:
    """What save() in the loop's body cannot know, the epoch before says."""

    def loader() -> ResumableLoader:
        seed()
        return ResumableLoader(DataLoader(range(60), 4, shuffle=True))  # type: ignore[arg-type]

    def epochs(loader: ResumableLoader, saved_at: int) -> tuple[list[Any], Any]:
        seen, state = [], None
        for _ in range(loader.epoch, 4):
            for number, batch in enumerate(loader, 1):
                seen.append(batch.tolist())
                if len(seen) == saved_at:
                    state = loader.state_dict()
                if number == 3:
                    break
        return seen, state

    whole, state = epochs(loader(), 6)
    resumed = loader()
    resumed.load_state_dict(state)
    assert epochs(resumed, 0)[0] == whole[6:]


def test_an_epoch_may_have_a_number_of_batches() -> None:
    def loader() -> ResumableLoader:
        seed()
        return ResumableLoader(DataLoader(range(60), 4, shuffle=True), batches=3)  # type: ignore[arg-type]

    whole = [batch.tolist() for each in [loader()] for _ in range(3) for batch in each]
    assert len(whole) == 9
    assert len(loader()) == 3
    state = left_after(loader(), 3)
    resumed = loader()
    resumed.load_state_dict(state)
    seen = [batch.tolist() for _ in range(resumed.epoch, 3) for batch in resumed]
    assert seen == whole[3:]


def test_two_loops_over_one_loader_at_the_same_time_are_refused() -> None:
    loader = ResumableLoader(LOADERS["in order"]())
    first = iter(loader)
    second = iter(loader)
    next(second)
    with pytest.raises(InvalidSpec, match="wrap a loader of its own for each"):
        next(first)


def test_steps_in_an_outer_and_in_an_inner_loop_are_refused(tmp_path: Any) -> None:
    outer, inner = (ResumableLoader(LOADERS["in order"]()) for _ in range(2))
    checkpointer = Checkpointer(outer=outer, inner=inner, storage=str(tmp_path))
    checkpointer.restore()
    next(iter_of_outer := iter(outer))
    checkpointer.step(1)
    next(iter_of_inner := iter(inner))
    with pytest.raises(InvalidSpec, match="in one of them only"):
        checkpointer.step(2)
    del iter_of_outer, iter_of_inner


def test_what_an_epoch_draws_it_draws_when_it_begins() -> None:
    plain = DataLoader(range(8), 2, shuffle=True)  # type: ignore[arg-type]
    seed()
    iterator = iter(plain)
    expected = (float(torch.rand(())), next(iterator).tolist())
    seed()
    iterator = iter(ResumableLoader(plain))
    assert (float(torch.rand(())), next(iterator).tolist()) == expected


def test_an_iterator_that_was_made_before_the_restore_goes_on_from_there() -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(DataLoader(range(60), 4, shuffle=True))  # type: ignore[arg-type]

    seed()
    whole = [batch.tolist() for batch in loader()]
    seed()
    state = left_after(loader(), 2)
    resumed = loader()
    iterator = iter(resumed)
    resumed.load_state_dict(state)
    assert [batch.tolist() for batch in iterator] == whole[2:]


@pytest.mark.parametrize("is_persistent", [False, True])
def test_what_persistent_workers_draw_differs_and_the_samples_are_the_same(
    is_persistent: bool,
) -> None:
    def loader() -> ResumableLoader:
        seed()
        return ResumableLoader(
            DataLoader(Noisy(), 30, shuffle=True, num_workers=1, persistent_workers=is_persistent)
        )

    def of(batch: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
        slope, noise = batch["x"][:, -1] - batch["x"][:, 0], batch["x"][:, 0]
        return slope.round().tolist(), noise.tolist()

    whole = loader()
    expected = [of(batch) for _ in range(2) for batch in whole][6:]
    resumed, state = loader(), left_after(loader(), 6)
    resumed.load_state_dict(state)
    actual = [of(batch) for _ in range(resumed.epoch, 2) for batch in resumed]
    assert [samples for samples, _ in actual] == [samples for samples, _ in expected]
    assert (actual == expected) == (not is_persistent)


def test_with_another_number_of_workers_what_they_draw_differs() -> None:
    def loader(workers: int) -> ResumableLoader:
        seed()
        return ResumableLoader(DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers))

    expected = [batch["x"] for batch in loader(1)][2:]
    resumed, state = loader(2), left_after(loader(1), 2)
    resumed.load_state_dict(state)
    actual = [batch["x"] for batch in resumed]
    slopes = [[(x[:, -1] - x[:, 0]).round() for x in each] for each in (expected, actual)]
    assert all(a.equal(b) for a, b in zip(*slopes, strict=True))
    assert not all(a.equal(b) for a, b in zip(expected, actual, strict=True))


def reading_ahead(loader: Any) -> Any:
    """A prefetcher: it has read the next batch before it hands out one."""
    iterator = iter(loader)
    batch = next(iterator, None)
    while batch is not None:
        following = next(iterator, None)
        yield batch
        batch = following


def test_a_prefetcher_around_the_loader_loses_what_it_has_read_ahead(tmp_path: Any) -> None:
    def train(folder: str, leave_after: int) -> list[Any]:
        seed()
        loader = ResumableLoader(DataLoader(range(24), 4, shuffle=True))  # type: ignore[arg-type]
        checkpointer = Checkpointer(loader=loader, storage=str(tmp_path / folder), period_s=1e9)
        done, seen = checkpointer.restore(), []
        for batch in reading_ahead(loader):
            seen.append(batch.tolist())
            done += 1
            checkpointer.step(done)
            if done == leave_after:
                checkpointer.save()
                break
        return seen

    whole = train("whole", 0)
    first = train("run", 2)
    assert first == whole[:2]
    assert train("run", 0) == whole[3:]


class Buffered(torch.utils.data.IterableDataset[int]):
    """Shuffles what it streams in a buffer, with the generator that it is given."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __iter__(self) -> Any:
        buffer = list(range(8))
        for sample in range(8, 40):
            place = self.generator.randrange(8)
            yield buffer[place]
            buffer[place] = sample
        yield from buffer


@pytest.mark.parametrize("is_own", [False, True])
def test_a_shuffle_buffer_resumes_exactly_if_it_has_a_generator_of_its_own(is_own: bool) -> None:
    def loader() -> ResumableLoader:
        seed()
        return ResumableLoader(DataLoader(Buffered(random.Random(2) if is_own else random), 4))

    def drawn(loader: ResumableLoader) -> list[Any]:
        return [[*batch.tolist(), random.random()] for batch in loader]

    whole = drawn(loader())
    resumed, state = loader(), left_after(loader(), 4, draws=True)
    resumed.load_state_dict(state)
    assert ([x[:-1] for x in drawn(resumed)] == [x[:-1] for x in whole][4:]) == is_own
