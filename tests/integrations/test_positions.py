"""Any loop over loaders, interrupted at any step, sees the samples that it would have seen."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset

from spotfirst.channel import Channel, Drain
from spotfirst.checkpointer import Checkpointer, Drained
from spotfirst.context import TrainerContext
from spotfirst.integrations.dataloader import ResumableLoader
from spotfirst.run import Run
from spotfirst.storage import open_storage

Loaders = list[Any]
Step = Callable[..., None]
"""Ends a training step that used these batches."""
EPOCHS = 3


class Stream(IterableDataset[int]):
    """Its order is another in each epoch, when it is told which one it is."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self._samples))
        random.Random(self.epoch).shuffle(order)
        return iter(order)


class Counting(torch.utils.data.Sampler[int]):
    """A sampler that counts its epochs by itself."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self.epoch = -1

    def __len__(self) -> int:
        return self._samples

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        order = list(range(self._samples))
        random.Random(self.epoch).shuffle(order)
        return iter(order)


class Augmented(torch.utils.data.Dataset[Any]):
    """Draws from the global generator, and from one of its own."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._own = random.Random(3)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> float:
        return index + float(torch.rand(())) / 2 + self._own.random() / 2


class Perturbed(IterableDataset[float]):
    """A stream with noise from the global generator."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[float]:
        return (index + float(torch.rand(())) / 2 for index in range(self._samples))


class Buffered(IterableDataset[int]):
    """A stream that is shuffled in a buffer, with a generator of its own."""

    def __init__(self, samples: int) -> None:
        self._samples, self._own = samples, random.Random(3)

    def __iter__(self) -> Iterator[int]:
        buffer = list(range(min(3, self._samples)))
        for sample in range(3, self._samples):
            place = self._own.randrange(3)
            yield buffer[place]
            buffer[place] = sample
        yield from buffer


class Part(torch.utils.data.Dataset[Any]):
    """The first samples of data that several loaders read."""

    def __init__(self, whole: Augmented, samples: int) -> None:
        self.dataset, self._samples = whole, samples

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> float:
        return self.dataset[index]


def each(make: Callable[[int], Any]) -> Callable[[tuple[int, ...]], Loaders]:
    return lambda samples: [make(n) for n in samples]


def with_one_generator(samples: tuple[int, ...]) -> Loaders:
    generator = torch.Generator().manual_seed(5)
    return [DataLoader(range(n), 2, shuffle=True, generator=generator) for n in samples]  # type: ignore[arg-type]


def of_one_data_set(samples: tuple[int, ...]) -> Loaders:
    whole = Augmented(max(samples))
    return [DataLoader(Part(whole, n), 2, shuffle=True) for n in samples]


KINDS: dict[str, Callable[[tuple[int, ...]], Loaders]] = {
    "shuffled": each(lambda n: DataLoader(range(n), 2, shuffle=True)),  # type: ignore[arg-type]
    "in order": each(lambda n: DataLoader(range(n), 2)),  # type: ignore[arg-type]
    "own generator": each(
        lambda n: DataLoader(
            range(n),  # type: ignore[arg-type]
            2,
            shuffle=True,
            generator=torch.Generator().manual_seed(n),
        )
    ),
    "one generator": with_one_generator,
    "augmented": each(lambda n: DataLoader(Augmented(n), 2, shuffle=True)),
    "one data set": of_one_data_set,
    "streamed": each(lambda n: DataLoader(Stream(n), 2)),
    "perturbed stream": each(lambda n: DataLoader(Perturbed(n), 2)),
    "shuffle buffer": each(lambda n: DataLoader(Buffered(n), 2)),
    "counting sampler": each(lambda n: DataLoader(range(n), 2, sampler=Counting(n))),  # type: ignore[arg-type]
}


def one_epoch_after_the_other(loaders: Loaders, step: Step) -> None:
    loader = loaders[0]
    for epoch in range(getattr(loader, "epoch", 0), EPOCHS):
        if isinstance(loader.dataset, Stream):
            loader.dataset.set_epoch(epoch)
        for batch in loader:
            step(batch)


def left_by_break(loaders: Loaders, step: Step) -> None:
    loader = loaders[0]
    for _ in range(getattr(loader, "epoch", 0), EPOCHS):
        for number, batch in enumerate(loader):  # noqa: B007
            step(batch)
            if float(batch.sum()) > 14:
                break


def side_by_side(loaders: Loaders, step: Step) -> None:
    a, b, *_ = loaders
    for _ in range(getattr(a, "epoch", 0), EPOCHS):
        for batches in zip(a, b):  # noqa: B905 - the shorter one ends it
            step(*batches)


def side_by_side_to_the_end_of_the_longer(loaders: Loaders, step: Step) -> None:
    a, b, c = loaders
    for _ in range(min(getattr(each, "epoch", 0) for each in loaders), EPOCHS):
        for batches in itertools.zip_longest(a, b, c):
            step(*batches)


def the_shorter_one_again_and_again(loaders: Loaders, step: Step) -> None:
    a, b, *_ = loaders
    again = iter(b)
    for _ in range(getattr(a, "epoch", 0), EPOCHS):
        for batch in a:
            try:
                other = next(again)
            except StopIteration:
                again = iter(b)
                other = next(again)
            step(batch, other)


def one_loader_after_the_other(loaders: Loaders, step: Step) -> None:
    for _ in range(min(getattr(each, "epoch", 0) for each in loaders), EPOCHS):
        for loader in loaders:
            for batch in loader:
                step(batch)


def one_inside_the_other(loaders: Loaders, step: Step) -> None:
    a, b, *_ = loaders
    for _ in range(getattr(a, "epoch", 0), 2):
        for batch in a:
            for other in b:
                step(batch, other)


def one_inside_the_other_with_draws_between(loaders: Loaders, step: Step) -> None:
    a, b, *_ = loaders
    for _ in range(getattr(a, "epoch", 0), 2):
        for batch in a:
            noise = torch.rand(()) + random.random()
            for other in b:
                step(batch, other, noise)


def three_levels(loaders: Loaders, step: Step) -> None:
    a, b, c = loaders
    for _ in range(getattr(a, "epoch", 0), 2):
        for x in a:
            noise = torch.rand(())
            for y in b:
                more = torch.rand(())
                for z in c:
                    step(x, y, z, noise, more)


def side_by_side_inside_another(loaders: Loaders, step: Step) -> None:
    a, b, c = loaders
    for _ in range(getattr(a, "epoch", 0), 2):
        for x in a:
            noise = torch.rand(())
            for y, z in itertools.zip_longest(b, c):
                step(x, y, z, noise)


def side_by_side_around_another(loaders: Loaders, step: Step) -> None:
    a, b, c = loaders
    for _ in range(getattr(a, "epoch", 0), 2):
        for x, y in itertools.zip_longest(a, b):
            noise = torch.rand(())
            for z in c:
                step(x, y, z, noise)


def two_loops_inside_another(loaders: Loaders, step: Step) -> None:
    a, b, c = loaders
    for _ in range(getattr(a, "epoch", 0), 2):
        for x in a:
            for y in b:
                step(x, y)
            noise = torch.rand(())
            for z in c:
                step(x, z, noise)


def left_by_break_inside_another(loaders: Loaders, step: Step) -> None:
    a, b, c = loaders
    for _ in range(getattr(a, "epoch", 0), 2):
        for x in a:
            for y in b:
                step(x, y)
                if float(y.sum()) > 3:
                    break
            noise = torch.rand(())
            for z in c:
                step(x, z, noise)


def one_after_the_other_with_draws_between(loaders: Loaders, step: Step) -> None:
    for _ in range(min(getattr(each, "epoch", 0) for each in loaders), EPOCHS):
        noise = torch.zeros(())
        for loader in loaders:
            for batch in loader:
                step(batch, noise)
            noise = torch.rand(())


def one_after_the_other_left_by_break(loaders: Loaders, step: Step) -> None:
    for _ in range(min(getattr(each, "epoch", 0) for each in loaders), EPOCHS):
        noise = torch.zeros(())
        for loader in loaders:
            for batch in loader:
                step(batch, noise)
                if float(batch.sum()) > 5:
                    break
            noise = torch.rand(())


def a_loop_without_steps_before_the_one_with(loaders: Loaders, step: Step) -> None:
    a, b, *_ = loaders
    for _ in range(getattr(a, "epoch", 0), EPOCHS):
        seen = torch.stack([batch.float().sum() for batch in b])
        for batch in a:
            step(batch, seen)


def a_loop_without_steps_inside_another(loaders: Loaders, step: Step) -> None:
    a, b, c = loaders
    for _ in range(getattr(a, "epoch", 0), 2):
        for x in a:
            seen = torch.stack([batch.float().sum() for batch in c])
            for y in b:
                step(x, y, seen)


def a_loop_without_steps_after_each_step(loaders: Loaders, step: Step) -> None:
    """An evaluation, over a loader that is resumed as well."""
    a, b, *_ = loaders
    for _ in range(getattr(a, "epoch", 0), EPOCHS):
        for batch in a:
            step(batch)
            for other in b:
                torch.rand(int(other.sum()) % 3)


def some_batches_of_another_in_the_body(loaders: Loaders, step: Step) -> None:
    a, b, c = loaders
    for _ in range(getattr(a, "epoch", 0), 2):
        for x in a:
            others = iter(b)
            some = [next(others), next(others, None)]
            for z in c:
                step(x, *some, z)


def some_batches_at_a_time_of_a_loader_that_goes_on(loaders: Loaders, step: Step) -> None:
    a, b, c = loaders
    others = iter(b)
    for _ in range(getattr(a, "epoch", 0), 2):
        for x in a:
            some = [next(others, None), next(others, None)]
            noise = torch.rand(())
            for z in c:
                step(x, *some, z, noise)


def a_loop_inside_for_two_batches(loaders: Loaders, step: Step) -> None:
    a, b, *_ = loaders
    for _ in range(getattr(a, "epoch", 0), EPOCHS):
        kept = []
        for x in a:
            kept.append(x)
            if len(kept) == 2:
                for y in b:
                    step(*kept, y)
                kept = []


def one_step_for_a_whole_loop_inside(loaders: Loaders, step: Step) -> None:
    a, b, *_ = loaders
    for _ in range(getattr(a, "epoch", 0), EPOCHS):
        for x in a:
            step(x, *b)


def a_fresh_iterator_for_each_step(loaders: Loaders, step: Step) -> None:
    while True:
        step(next(iter(loaders[0])))


def two_batches_a_step(loaders: Loaders, step: Step) -> None:
    loader = loaders[0]
    for _ in range(getattr(loader, "epoch", 0), EPOCHS):
        kept = []
        for batch in loader:
            kept.append(batch)
            if len(kept) == 2:
                step(*kept)
                kept = []


SHAPES = [
    one_epoch_after_the_other,
    left_by_break,
    side_by_side,
    side_by_side_to_the_end_of_the_longer,
    the_shorter_one_again_and_again,
    one_loader_after_the_other,
    one_inside_the_other,
    one_inside_the_other_with_draws_between,
    three_levels,
    side_by_side_inside_another,
    side_by_side_around_another,
    two_loops_inside_another,
    left_by_break_inside_another,
    one_after_the_other_with_draws_between,
    one_after_the_other_left_by_break,
    a_loop_without_steps_before_the_one_with,
    a_loop_without_steps_inside_another,
    a_loop_without_steps_after_each_step,
    some_batches_of_another_in_the_body,
    some_batches_at_a_time_of_a_loader_that_goes_on,
    a_loop_inside_for_two_batches,
    one_step_for_a_whole_loop_inside,
    a_fresh_iterator_for_each_step,
    two_batches_a_step,
]
MOST_STEPS = 16


class _Enough(Exception):
    pass


class World:
    """Trains in one storage, again and again."""

    def __init__(self, folder: Path, kind: str, samples: tuple[int, ...]) -> None:
        self._folder = folder
        self._kind, self._samples = kind, samples
        self._attempts = 0

    def _loaders(self) -> Loaders:
        torch.manual_seed(1)
        random.seed(1)
        return KINDS[self._kind](self._samples)

    def alone(self, shape: Callable[[Loaders, Step], None]) -> list[Any]:
        """What a training sees that knows nothing of Spotfirst."""
        seen: list[Any] = []

        def step(*batches: Any) -> None:
            seen.append(_facts(batches))
            if len(seen) == MOST_STEPS:
                raise _Enough

        with contextlib.suppress(_Enough):
            shape(self._loaders(), step)
        return seen

    def attempt(self, shape: Callable[[Loaders, Step], None], left_after: int = 0) -> list[Any]:
        """What the next attempt sees; it gets a notice in that step."""
        self._attempts += 1
        folder = self._folder / f"channel-{self._attempts}"
        folder.mkdir()
        channel = Channel(folder)
        context = TrainerContext(Run(open_storage(str(self._folder / "s")), "r"), None, channel)
        loaders = [ResumableLoader(loader) for loader in self._loaders()]
        objects = {f"loader{number}": loader for number, loader in enumerate(loaders)}
        checkpointer = Checkpointer(context=context, period_s=1e9, **objects)
        done = checkpointer.restore()
        seen: list[Any] = []

        def step(*batches: Any) -> None:
            nonlocal done
            seen.append(_facts(batches))
            done += 1
            if done == left_after:
                channel.ask_to_drain(Drain(reason="interruption"))
            checkpointer.step(done)
            if done == MOST_STEPS:
                raise _Enough

        if done == MOST_STEPS:
            return seen
        try:
            shape(loaders, step)
        except Drained:
            return seen
        except _Enough:
            pass
        checkpointer.close()
        return seen


def _facts(batches: tuple[Any, ...]) -> list[Any]:
    values = [batch if batch is None else batch.tolist() for batch in batches]
    return [*values, float(torch.rand(())), random.random()]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *itertools.product(["augmented"], SHAPES),
        *itertools.product(KINDS, [one_epoch_after_the_other]),
    ],
)
def test_interrupted_at_any_step_a_loop_goes_on_with_what_it_would_have_seen(
    kind: str, shape: Callable[[Loaders, Step], None], tmp_path: Path
) -> None:
    samples = (4, 6, 3)
    whole = World(tmp_path, kind, samples).alone(shape)
    assert whole
    for step in range(1, len(whole) + 1):
        folder = tmp_path / str(step)
        folder.mkdir()
        world = World(folder, kind, samples)
        first = world.attempt(shape, left_after=step)
        assert first == whole[:step], f"step {step}"
        assert first + world.attempt(shape) == whole, f"step {step}"


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_loop_of_any_shape_may_be_interrupted_again_and_again(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shape = data.draw(st.sampled_from(SHAPES))
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    samples = data.draw(st.tuples(*[st.integers(1, 9)] * 3))
    world = World(tmp_path_factory.mktemp("w"), kind, samples)
    whole = world.alone(shape)
    steps = data.draw(st.lists(st.integers(1, max(1, len(whole))), max_size=4).map(sorted))
    seen: list[Any] = []
    for step in steps:
        if step > len(seen):
            seen += world.attempt(shape, left_after=step)
    assert seen + world.attempt(shape) == whole


def test_nested_loaders_that_draw_are_interrupted_twice(tmp_path: Path) -> None:
    shape = next(shape for shape in SHAPES if shape.__name__ == "one_inside_the_other")
    world = World(tmp_path, "augmented", (3, 5, 1))
    whole = world.alone(shape)
    seen = world.attempt(shape, left_after=7)
    seen += world.attempt(shape, left_after=8)
    assert seen + world.attempt(shape) == whole


def test_a_loader_that_was_not_read_since_the_restore_keeps_its_place_and_no_old_draws(
    tmp_path: Path,
) -> None:
    """Epochs of one loader and of another take turns; each ends with a checkpoint."""

    def train(folder: Path, epochs: int) -> list[Any]:
        torch.manual_seed(1)
        even, odd = (ResumableLoader(loader) for loader in with_one_generator((7, 6)))
        checkpointer = Checkpointer(even=even, odd=odd, storage=str(folder), period_s=1e9)
        done, seen = checkpointer.restore(), []
        while even.epoch + odd.epoch < epochs:
            loader = odd if even.epoch > odd.epoch else even
            for batch in loader:
                seen.append([*batch.tolist(), float(torch.rand(()))])
                done += 1
                checkpointer.step(done)
        checkpointer.close()
        return seen

    whole = train(tmp_path / "whole", 6)
    parts = [batch for epochs in (1, 3, 4, 6) for batch in train(tmp_path / "parts", epochs)]
    assert parts == whole


def test_steps_without_a_loader_before_the_first_with_one_keep_their_draws(tmp_path: Path) -> None:
    def train(folder: Path, steps: int) -> list[Any]:
        torch.manual_seed(1)
        loader = ResumableLoader(KINDS["augmented"]((8,))[0])
        checkpointer = Checkpointer(loader=loader, storage=str(folder), period_s=1e9)
        done, seen = checkpointer.restore(), []
        while done < min(steps, 4):
            seen.append(float(torch.rand(())))
            done += 1
            checkpointer.step(done)
        while done < steps:
            for batch in loader:
                seen.append([*batch.tolist(), float(torch.rand(()))])
                done += 1
                checkpointer.step(done)
        checkpointer.close()
        return seen

    whole = train(tmp_path / "whole", 12)
    parts = [step for steps in (2, 4, 8, 12) for step in train(tmp_path / "parts", steps)]
    assert parts == whole


def test_what_is_drawn_before_an_epochs_first_batch_is_drawn_again_and_differs(
    tmp_path: Path,
) -> None:
    """The samples and the draws in steps are the same all the same."""

    def shape(loaders: Loaders, step: Step) -> None:
        for _ in range(getattr(loaders[0], "epoch", 0), EPOCHS):
            noise = torch.rand(())
            for batch in loaders[0]:
                step(batch, noise)

    world = World(tmp_path, "augmented", (6,))
    whole = world.alone(shape)
    seen = world.attempt(shape, left_after=4) + world.attempt(shape)
    assert [[batch, *rest] for batch, _, *rest in seen] == [
        [batch, *rest] for batch, _, *rest in whole
    ]
    assert seen[:4] == whole[:4]
    assert seen[4][1] != whole[4][1]
    assert seen[6:] == whole[6:]


@pytest.mark.parametrize("saved", [2, 5, 6])
def test_a_loop_inside_another_may_save_in_its_body(saved: int, tmp_path: Path) -> None:
    def train(folder: Path, save_at: int = 0) -> list[Any]:
        torch.manual_seed(1)
        a, b = (ResumableLoader(loader) for loader in KINDS["augmented"]((6, 5)))
        checkpointer = Checkpointer(a=a, b=b, storage=str(folder), period_s=1e9)
        done, seen = checkpointer.restore(), []
        for _ in range(a.epoch, 2):
            for number, x in enumerate(a):
                for y in b:
                    seen.append([x.tolist(), y.tolist(), float(torch.rand(()))])
                    done += 1
                    checkpointer.step(done)
                    if done == save_at:
                        checkpointer.save()
                        return seen  # as if it were killed
                if number == 9:
                    break
        checkpointer.close()
        return seen

    whole = train(tmp_path / "whole")
    parts = train(tmp_path / "parts", saved) + train(tmp_path / "parts")
    assert parts == whole
