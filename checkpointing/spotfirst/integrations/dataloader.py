"""A position in the data that survives an interruption, for any loop.

::

    loader = ResumableLoader(DataLoader(dataset, shuffle=True, num_workers=4))
    checkpointer = Checkpointer(model=model, optimizer=optimizer, loader=loader)
    done = checkpointer.restore()
    for _ in range(loader.epoch, epochs):
        for batch in loader:
            train_one_step(batch)
            done += 1
            checkpointer.step(done)
    checkpointer.close()

A position is the epoch, how many of its batches were handed out, and whether the epoch is still to
be begun, open, or over. The order itself is not stored: the random number generators from which the
epoch began are. A resumed epoch begins from them again and passes over the batches that were used.

A step is over when the loop asks for its next batch or leaves the loop, so checkpoints are taken
there: then it is known whether the loop went on or broke off.

Several loaders of one Checkpointer are resumed together: side by side (``zip``), one after the
other, or one inside another. On its way back to the place of the checkpoint, the script repeats the
outer loop's body. Random draws come back by this rule:

- A loader that answers what it has answered before (the batch of an outer loop, the end of a loop
  that is over) leaves the generators as they were after that answer. So what the script draws in
  an outer loop's body, or between two loops, it draws again, and it is the same.
- The loader with which the training goes on first sets all generators to those of the checkpoint,
  once for all loaders. A step without any loader does as much: from then on they are the training's.
- A batch is read again from the generators before it was first read, however often it was handed
  out. A loop without steps before the one with steps is run again as a whole.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from spotfirst.checkpoints.rng import (
    generator_state,
    is_generator,
    restore_rng,
    rng_state,
    set_generator,
)
from spotfirst.errors import InvalidSpec, StateMismatch

__all__ = ["ResumableLoader"]

_MOST_AGAIN = 1000
"""Batches that are handed out again. The generators before each are kept: about 10 KB."""

_clock = itertools.count(1)
"""The order of events of all loaders."""


class ResumableLoader:
    """``loader`` with ``state_dict`` and ``load_state_dict``; other attributes are the loader's.

    Resuming reads the epoch's used batches again, in the loader's workers; a plain torch
    ``DataLoader`` without workers only counts them. ``skip`` avoids that: ``skip(loader, batches)``
    returns a loader without the first batches, such as accelerate's ``skip_first_batches``. Then
    what workers draw at random is not what it would have been.

    ``batches`` ends each epoch after so many batches. Use it in place of a ``break`` when the loop
    calls ``checkpointer.save()`` itself: ``save()`` cannot know that a ``break`` follows.

    ``before_fetch`` is called before each batch is read and before an epoch begins. ``ahead``
    returns how many batches the framework has read and not used. Both are for integrations.

    Not exact: what *persistent* workers draw at random, as they carry it from epoch to epoch.
    """

    def __init__(
        self,
        loader: Any,
        *,
        batches: int | None = None,
        skip: Callable[[Any, int], Any] | None = None,
        before_fetch: Callable[[], None] = lambda: None,
        ahead: Callable[[], int] | None = None,
    ) -> None:
        self._loader = loader
        self._batches = batches
        self._skip = skip
        self._before_fetch = before_fetch
        self._ahead = ahead or (lambda: 0)
        # 50 us. Of torch's own loader the last batch is read again only where it was not used.
        self._keeps = ahead is not None or type(loader) is not torch.utils.data.DataLoader
        self._peers: Callable[[], Sequence[ResumableLoader]] = lambda: [self]
        self._epoch = 0
        self._stage = "new"  # or "open", or "over"
        self.fetched = 0
        """Batches that the newest epoch has handed out."""
        self._iteration: Callable[[], _Iteration | None] = lambda: None
        self._restored: dict[str, Any] | None = None
        self._sets_generators = False
        self._begun_times = 0
        self._was_read = self._was_trained = False
        self._left_after = 0
        self._step_over: Callable[[], None] | None = None
        self._read: Sequence[ResumableLoader] = ()
        self._trains = False
        """Whether a step was made while its loop was in the body."""
        self._asked = self._used = False
        self._first_begun = self._begun = self._gave = self._ended = 0
        self._stepped = self._made_step = self._trained_last = 0
        self._reads: list[dict[str, Any]] = []
        """The generators before each batch that was read since the last step or loop began."""
        self._inside: list[ResumableLoader] = []
        self._after_step = self._is_beginning = False
        self._epochs: list[int | None] = []
        self._start = self._first = self._last = self._end = self._generators()
        self._when_begun = torch.empty(0)
        self._is_prompt = True

    @property
    def epoch(self) -> int:
        """The epoch to be trained, from 0 on: how many were completed, or left for another."""
        self._notice_break()
        return self._epoch + (self._stage == "over" and self._restored is None)

    @property
    def used(self) -> int:
        """Batches of the epoch to be trained that were used before: 0 but after a resume within it.

        A loop that counts its batches counts on from there: ``enumerate(loader, loader.used)``.
        """
        position = self._restored
        if position is None or position["stage"] != "open":
            return 0
        return int(position["fetched"] - position["again"])

    def __len__(self) -> int:
        length = len(self._loader)
        return length if self._batches is None else min(length, self._batches)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    @property
    def worker_init_fn(self) -> Any:
        """The loader's own; Lightning sets it."""
        return self._loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, value: Any) -> None:
        self._loader.worker_init_fn = value

    # -- the epoch --------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        self._notice_break()
        self.leave()
        # What it is inside of: loaders that handed out a batch after its own epoch before this.
        self._inside = [
            p for p in self._others() if p.is_open and p.fetched and p._gave > self._ended
        ]
        self._after_step = any(p._stepped > p._gave for p in self._inside)
        self._begun = next(_clock)
        self._first_begun = self._first_begun or self._begun
        self._is_beginning = True
        try:
            self._ask()
        finally:
            self._is_beginning = False
        iteration = _Iteration(self)
        self._iteration = weakref.ref(iteration, self._iteration_gone)
        if self._restored is None:
            self._begin(iteration)
        else:
            self._begun_times += 1
        return iteration

    def leave(self) -> None:
        """Take the open epoch for over: the next batch is of another one."""
        if self._restored is None and self._stage == "open":
            self._over()

    @property
    def is_open(self) -> bool:
        """Whether an epoch was begun and is neither exhausted nor left."""
        self._notice_break()
        return self._stage == "open" and self._restored is None

    @property
    def _in_use(self) -> bool:
        """Open, or about to be: a checkpoint may be taken before it begins."""
        return self.is_open or self._is_beginning

    def _notice_break(self) -> None:
        if self._restored is None and self._stage == "open" and self._iteration() is None:
            self._left_after = self.fetched
            self._over()

    def _iteration_gone(self, gone: weakref.ref[_Iteration]) -> None:
        """Keep the generators as they are at a ``break``, which is only noticed later."""
        if sys.is_finalizing() or gone is not self._iteration:
            return
        if self._restored is None and self._stage == "open":
            self._end = self._generators()

    def _over(self) -> None:
        self._stage, self._ended = "over", next(_clock)

    def _begin(self, iteration: _Iteration) -> None:
        self._epoch += self._stage == "over"
        self._stage, self.fetched = "open", 0
        self._epochs = self._sampler_epochs()
        self._start = self._first = self._last = self._generators()
        iteration.source = iter(self._loader)
        self._when_begun = torch.get_rng_state()

    def _ask(self) -> None:
        """The loop asks for a batch or for an epoch: the step before is over."""
        self._asked, self._used = True, False
        if self._step_over is not None and self._ends_the_step():
            action, self._step_over = self._step_over, None
            action()
        self._before_fetch()

    def _ends_the_step(self) -> bool:
        """Not when it is read within the body of a loop over another, such as for a validation."""
        if self._after_step:
            return False
        is_in_turn = self._is_beginning or self._trains or self in self._read
        return is_in_turn or not any(p.is_open for p in self._read)

    def _next(self, iteration: _Iteration) -> Any:
        if self._iteration() is not iteration:
            msg = (
                "two loops read from the same ResumableLoader at the same time: wrap a loader of "
                "its own for each"
            )
            raise InvalidSpec(msg)
        if self._stage == "open":
            self._ask()
        if self._restored is not None:
            self._resume_all()
        if self._stage == "over" or self.fetched == self._batches:
            batch = _NOTHING
        else:
            if not iteration.ready:
                self._keep_generators()
            batch = iteration.read()
        if batch is _NOTHING:
            self._asked = False
            if self._stage == "open":
                self._end = self._generators()
                self._last = self._reads[-1] if self._reads else self._last
            self.leave()
            raise StopIteration
        self.fetched += 1
        self._was_read = self._used = True
        self._asked = False
        peers = self._peers()
        if len(peers) > 1:
            if self._gave < max(max(p._begun, p._made_step) for p in peers):
                self._reads = []
            self._reads = [*self._reads[-_MOST_AGAIN:], self._last]
        self._gave, self._trained_last = next(_clock), 0
        return batch

    def _keep_generators(self) -> None:
        """A batch is about to be read. One that is only handed out again was read before."""
        if self._keeps_last or not self.fetched:
            self._last = self._generators()
            if not self.fetched:
                self._first = self._last
                self._is_prompt = torch.get_rng_state().equal(self._when_begun)

    @property
    def _keeps_last(self) -> bool:
        return self._keeps or len(self._peers()) > 1

    # -- steps ------------------------------------------------------------------------------

    def beside(self, peers: Callable[[], Sequence[ResumableLoader]]) -> None:
        """Resume together with ``peers()``, which has this one as well."""
        self._peers = peers

    def _others(self) -> list[ResumableLoader]:
        return [peer for peer in self._peers() if peer is not self]

    def stepped(self) -> bool:
        """Note a training step; whether its batch is of this loader.

        Raises :class:`InvalidSpec` when the loop's body has made a step before this one's loop.
        """
        used, self._used = self._used, False
        self._was_trained |= used
        inside = self._open_inside()
        if any(other._after_step for other in inside):
            msg = (
                "training steps are made both in the body of a loop and in a loop inside it, "
                "each over a ResumableLoader: such a loop cannot be resumed in its middle. Make "
                "the steps in one of them only"
            )
            raise InvalidSpec(msg)
        self._made_step = next(_clock)
        self._trained_last = self._trained_last or self._made_step
        if not inside:
            self._stepped = self._made_step
        self.generators_are_set()  # what was drawn since the restore belongs to the training
        self._trains = self._trains or (used and self.is_open)
        return used

    @property
    def holds_a_batch(self) -> bool:
        """Whether its loop is in the body, with a batch that was handed out."""
        return self.is_open and self.fetched > 0 and not self._asked

    def when_asked(self, action: Callable[[], None], read: Sequence[ResumableLoader]) -> None:
        """Call ``action`` once, when the loop asks for the next batch or begins another epoch.

        ``read`` are the loaders whose batches the step has used.
        """
        self._step_over, self._read = action, read

    # -- its state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is: plain values and a few kilobytes of generators' states."""
        if self._restored is not None:
            if self._sets_generators:
                return self._restored
            return {**self._restored, "now": _packed(self._generators())}
        self._notice_break()
        epoch, stage = self._epoch, self._stage
        if stage == "over" and not self._is_awaited():
            epoch, stage = epoch + 1, "new"
        is_repeated = stage == "over" and self._is_preparation()
        if is_repeated:
            stage = "new"
        is_outer = stage == "open" and self._is_outer()
        if stage == "over" and self._is_of_body():
            stage, is_outer = "open", True
        again = self._ahead() if stage == "open" else 0
        if is_outer:
            again = max(again, len(self._reads))
            if again > _MOST_AGAIN:
                msg = (
                    f"more than {_MOST_AGAIN} batches of a ResumableLoader were taken between two "
                    "steps, before a loop over another began: this cannot be resumed in its "
                    "middle. Take them in a loop over the loader"
                )
                raise InvalidSpec(msg)
        return {
            "epoch": epoch,
            "stage": stage,
            "fetched": self.fetched if stage == "open" else 0,
            "again": min(again, self.fetched),
            "repeats": is_outer or is_repeated,
            "trained": self._was_trained,
            "asked": any(peer._asked for peer in self._peers()),
            "left_after": self._left_after,
            "kind": self._kind(),
            "workers": self._workers(),
            "prompt": self._is_prompt,
            "epochs": self._epochs if stage == "open" or is_repeated else self._sampler_epochs(),
            "iteration": getattr(self._loader, "iteration", None),
            "start": _packed(self._start),
            "first": _packed(self._first),
            "last": _packed(self._last),
            "before": [_packed(each) for each in self._reads[:-1]] if is_outer else [],
            "end": _packed(self._end),
            "now": _packed(self._generators()),
        }

    def _is_awaited(self) -> bool:
        """Whether this loader is exhausted, and a loader beside it or after it still goes on."""
        return any(
            other not in self._inside
            and (other._begun < self._ended or self._first_begun < other._first_begun)
            for other in self._others()
            if other._in_use
        )

    def _is_outer(self) -> bool:
        """Whether another loader is read for each batch of this one, and its loop goes on."""
        return not self._asked and bool(self._open_inside())

    def _is_preparation(self) -> bool:
        """Whether it was read from end to end, without a step, for the loop that is going on."""
        return not self._was_trained and any(
            self._ended < other._begun
            and not 0 < self._trained_last < other._begun
            and all(outer._gave < self._begun for outer in other._inside)
            for other in self._others()
            if other._in_use
        )

    def _is_of_body(self) -> bool:
        """Whether its last batches were taken in the body of another's loop, before one inside."""
        return any(
            outer._gave < self._gave < inner._begun
            and not 0 < self._trained_last < inner._begun
            and outer._is_outer()
            for outer in self._others()
            if outer.is_open
            for inner in outer._open_inside()
        )

    def _open_inside(self) -> list[ResumableLoader]:
        """The open loaders that were begun in the body of this one's loop, for its last batch."""
        return [
            other
            for other in self._others()
            if other._in_use and self in other._inside and other._begun > self._gave
        ]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next epoch that is begun goes on from there. Raises :class:`StateMismatch`."""
        if self._was_read:
            msg = (
                "the data was read before its position was restored: restore the checkpoint first, "
                "then take the first batch"
            )
            raise StateMismatch(msg)
        if "stage" not in state:
            msg = (
                "the position in the data is of an older Spotfirst: go on with that, or start anew"
            )
            raise StateMismatch(msg)
        state = dict(state)
        if state["stage"] == "open" and state["fetched"]:
            repeats = state.get("repeats", False)
            if not state["asked"] and not repeats and state["fetched"] == state["left_after"]:
                # As the epoch before: its loop breaks off after this batch.
                state |= {"epoch": state["epoch"] + 1, "stage": "new", "fetched": 0}
            else:
                self._check_kind(state)
        self._restored = state
        self._epoch, self._stage, self.fetched = state["epoch"], state["stage"], state["fetched"]
        self._left_after, self._sets_generators = state["left_after"], True
        self._was_trained = state.get("trained", True)
        self._begun_times = int(self._iteration() is not None)
        if state["iteration"] is not None and hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(state["iteration"])

    def _kind(self) -> dict[str, Any]:
        """What decides which samples a batch has."""
        loader = self._loader
        dataset = getattr(loader, "dataset", None)
        streamed = isinstance(dataset, torch.utils.data.IterableDataset)
        size = getattr(loader, "batch_size", None)
        if size is None:
            size = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        kind = {"batch_size": size, "drop_last": getattr(loader, "drop_last", None)}
        if type(loader) is torch.utils.data.DataLoader and not streamed:
            kind |= {
                name: _class_of(getattr(loader, name)) for name in ("sampler", "batch_sampler")
            }
        if streamed:
            kind["num_workers"] = getattr(loader, "num_workers", None)
        elif hasattr(type(dataset), "__len__"):
            kind["samples"] = len(dataset)  # type: ignore[arg-type]
        return {k: v for k, v in kind.items() if isinstance(v, (bool, int, str))}

    def _workers(self) -> int:
        return getattr(self._loader, "num_workers", None) or 0

    def _check_kind(self, state: dict[str, Any]) -> None:
        stored, here = state["kind"], self._kind()
        if not state["workers"] and self._workers() and not state["prompt"]:
            # Workers draw the order when the epoch begins, and without them it was drawn later.
            stored, here = stored | {"num_workers": 0}, here | {"num_workers": self._workers()}
        changed = [
            f"{name} was {stored.get(name)} and is {here.get(name)}"
            for name in sorted(stored.keys() | here)
            if stored.get(name) != here.get(name)
            and not ("sampler" in name and None in {stored.get(name), here.get(name)})
        ]
        if changed:
            msg = (
                f"the checkpoint is {state['fetched']} batches into an epoch of other batches: "
                f"{', '.join(changed)}. Samples would be left out or used twice. Go on with the "
                "old values until the epoch is over, or start a new run with the new ones"
            )
            raise StateMismatch(msg)

    # -- resuming ---------------------------------------------------------------------------

    def _resume_all(self) -> None:
        """Open this loader's epoch, and those that were begun beside it, as they were begun."""
        waiting = [p for p in self._peers() if p._restored is not None and p._iteration()]
        goes_on = any(_goes_on(p._restored) for p in waiting)
        repeats = self._sets_generators and not goes_on
        if self._sets_generators and goes_on:
            assert self._restored is not None
            restore_rng(_unpacked(self._restored["now"])["global"])
            for peer in self._peers():
                peer.generators_are_set()
        for peer in sorted(waiting, key=lambda p: p._begun):
            peer._resume(repeats=repeats)

    def generators_are_set(self) -> bool:
        """Leave the global generators to the caller when resuming; whether they were not set yet."""
        was_to_set, self._sets_generators = self._sets_generators, False
        if was_to_set and self._restored is not None:
            self._set_own(_unpacked(self._restored["now"])["own"])
        return was_to_set

    def _resume(self, *, repeats: bool) -> None:
        """``repeats``: the script does again what it did before the checkpoint."""
        position, iteration = self._restored, self._iteration()
        assert position is not None
        assert iteration is not None
        self._restored = None
        stage = position["stage"]
        overrule = stage == "open" or position.get("repeats", False)
        self._set_sampler_epochs(position["epochs"], overrule=overrule)
        if stage == "open":
            generators = self._generators()
            self._replay(position, iteration, repeats=repeats)
            self._set(generators)
        elif stage == "over":
            self._ended = next(_clock)
            self._end = _unpacked(position.get("end", position["now"]))
            if repeats:
                self._set(self._end)
        else:
            if repeats:
                self._set(_unpacked(position["start"]))
            for _ in range(1, self._begun_times):
                iter(self._loader)  # each would have drawn
            self._begin(iteration)

    def _replay(self, position: dict[str, Any], iteration: _Iteration, *, repeats: bool) -> None:
        """Begin the epoch again and pass over what was used of it."""
        fetched, again = position["fetched"], position["again"]
        self._start, self._first, self._last = (
            _unpacked(position[name]) for name in ("start", "first", "last")
        )
        self._epochs, self._is_prompt = position["epochs"], position["prompt"]
        if getattr(self._loader, "persistent_workers", False) and self._epoch:
            iter(self._loader)  # they start once, with a random number, and not with every epoch
        self._set(self._start)
        if self._skip is not None and not again:
            iteration.source = iter(self._skip(self._loader, fetched))
            self._last = self._generators()
            for batch in itertools.islice(iteration.source, 1):  # it may begin only now
                iteration.ready.append((batch, self._last, None))
            return
        source: Any = iter(self._loader)
        iteration.source = source
        count_only = _reads_nothing_ahead(self._loader)
        read_from = [_unpacked(each) for each in position.get("before", [])]
        if self._keeps_last:  # else it is the first, from which a stream would begin again
            read_from.append(self._last)
        for number in range(fetched):
            if number == 0 and not position["workers"]:
                self._set(self._first)
            if number >= fetched - len(read_from):
                # A loader that reads ahead reads a batch now that is still to be used.
                self._set(read_from[number - fetched])
            try:
                if count_only and number < fetched - again:
                    source._next_index()
                    continue
                batch = next(source)
            except StopIteration:
                msg = (
                    f"the checkpoint is {fetched} batches into an epoch, and the data has only "
                    f"{number}: train with the data that the run began with"
                )
                raise StateMismatch(msg) from None
            if number >= fetched - again:
                before = read_from[max(number - fetched, -len(read_from))]
                after = self._generators() if repeats else None
                iteration.ready.append((batch, before, after))
        self.fetched = fetched - again

    # -- generators -------------------------------------------------------------------------

    def _parts(self) -> list[Any]:
        """The objects that decide about the order: samplers and data, of all loaders inside."""
        found: list[Any] = []
        waiting = [self._loader]
        while waiting:
            part = waiting.pop(0)
            if part is None or any(part is known for known in found):
                continue
            if isinstance(part, (list, tuple)):
                waiting += [p for p in part if hasattr(p, "__iter__")][:64]
                continue
            found.append(part)
            for name in ("sampler", "batch_sampler", "dataset", "flattened"):
                value = getattr(part, name, None)
                # A data set may be a list of samples, which are none of its parts.
                if name == "flattened" or not isinstance(value, (list, tuple, dict)):
                    waiting.append(value)
        return found

    def _own_generators(self) -> dict[str, Any]:
        return {
            f"{number} {name}": value
            for number, part in enumerate(self._parts())
            for name, value in getattr(part, "__dict__", {}).items()
            if is_generator(value)
        }

    def _generators(self) -> dict[str, Any]:
        own = {name: generator_state(value) for name, value in self._own_generators().items()}
        return {"global": rng_state(), "own": own}

    def _set(self, state: dict[str, Any]) -> None:
        restore_rng(state["global"])
        self._set_own(state["own"])

    def _set_own(self, state: dict[str, Any]) -> None:
        for name, generator in self._own_generators().items():
            if name in state:
                set_generator(generator, state[name])

    def _sampler_epochs(self) -> list[int | None]:
        """Which epoch each part is in, by its own count or by ``set_epoch``; None: it has none."""
        return [_epoch_of(part)[1] for part in self._parts()]

    def _set_sampler_epochs(self, epochs: list[int | None], *, overrule: bool) -> None:
        """Set them. What the script sets by ``set_epoch`` is only overruled in an open epoch."""
        for part, epoch in zip(self._parts(), epochs, strict=False):
            name, here = _epoch_of(part)
            by_script = callable(getattr(part, "set_epoch", None))
            if epoch is None or here is None or here == epoch or (by_script and not overrule):
                continue
            if by_script:
                part.set_epoch(epoch)
            else:
                setattr(part, name, epoch)


def _goes_on(position: dict[str, Any] | None) -> bool:
    """Whether the training goes on with this loader, instead of being led back to where it was."""
    if position is None or position.get("repeats", False):
        return False
    return position["stage"] != "over" or "end" not in position


_NOTHING = object()


class _Iteration(Iterator[Any]):
    """One loop over a loader. When it is gone and was not exhausted, the loop was left."""

    def __init__(self, loader: ResumableLoader) -> None:
        self._loader = loader
        self.source: Iterator[Any] | None = None
        self.ready: list[tuple[Any, dict[str, Any], dict[str, Any] | None]] = []
        """Batches that were read before, and the generators before and after each."""

    def __iter__(self) -> _Iteration:
        return self

    def __next__(self) -> Any:
        return self._loader._next(self)

    def read(self) -> Any:
        """The next batch, or ``_NOTHING``."""
        if self.ready:
            batch, self._loader._last, after = self.ready.pop(0)
            if after is not None:
                self._loader._set(after)
            return batch
        assert self.source is not None
        return next(self.source, _NOTHING)


def _class_of(sampler: Any) -> str | None:
    """``None`` for the samplers that come and go with the number of ranks."""
    if sampler is None or isinstance(sampler, torch.utils.data.DistributedSampler):
        return None
    return type(sampler).__qualname__


def _epoch_of(part: Any) -> tuple[str, int | None]:
    for name in ("epoch", "_epoch"):
        value = getattr(part, "__dict__", {}).get(name)
        if type(value) is int:
            return name, value
    return "", None


def _packed(state: dict[str, Any]) -> dict[str, Any]:
    """Python's generator is 625 numbers: as a tensor they do not burden the manifest."""
    return {
        "global": {**state["global"], "python": _pack(state["global"]["python"])},
        "own": {k: _pack(v) if isinstance(v, tuple) else v for k, v in state["own"].items()},
    }


def _unpacked(packed: dict[str, Any]) -> dict[str, Any]:
    return {
        "global": {**packed["global"], "python": _unpack(packed["global"]["python"])},
        "own": {k: _unpack(v) if isinstance(v, list) else v for k, v in packed["own"].items()},
    }


def _pack(python: Any) -> list[Any]:
    version, words, gauss = python
    return [version, torch.tensor(words, dtype=torch.int64), gauss]


def _unpack(packed: Any) -> tuple[Any, ...]:
    version, words, gauss = packed
    return version, tuple(words.tolist()), gauss


def _reads_nothing_ahead(loader: Any) -> bool:
    """Whether batches are read one by one in this process, so that indices can be passed over."""
    return (
        type(loader) is torch.utils.data.DataLoader
        and not loader.num_workers
        and not isinstance(loader.dataset, torch.utils.data.IterableDataset)
    )
