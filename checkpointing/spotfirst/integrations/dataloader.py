"""A position in the data that survives: the batches of an epoch that is resumed in its middle.

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

It knows nothing of samplers and workers. It remembers the random number generators from which the
epoch began, begins it again from them, and drops the batches that were used: so the order, and
what a dataset draws at random in this process or in workers, are those that would have been.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from spotfirst.checkpoints.rng import restore_rng, rng_state
from spotfirst.errors import StateMismatch

__all__ = ["ResumableLoader"]


class ResumableLoader:
    """``loader`` with ``state_dict`` and ``load_state_dict``; other attributes are the loader's.

    Resuming costs the time to read the epoch's used batches again, in the loader's workers; a
    plain torch ``DataLoader`` without workers only counts. ``skip`` avoids that cost:
    ``skip(loader, batches)`` is a loader without the first batches, such as accelerate's
    ``skip_first_batches``. Then what workers draw at random is not what it would have been.

    ``before_fetch`` is called before each batch is read: for a framework, that is where a step with
    all that belongs to it is over. ``ahead`` says how many batches have been read and not used, if
    the framework reads ahead of itself.

    Not exact: what *persistent* workers draw at random, as they carry it from epoch to epoch.
    """

    def __init__(
        self,
        loader: Any,
        *,
        skip: Callable[[Any, int], Any] | None = None,
        before_fetch: Callable[[], None] = lambda: None,
        ahead: Callable[[], int] | None = None,
    ) -> None:
        self._loader = loader
        self._skip = skip
        self._before_fetch = before_fetch
        self._ahead = ahead or (lambda: 0)
        # Torch's own loader draws nothing for a batch that is still to be used: save the 50 us.
        self._keeps_last = ahead is not None or type(loader) is not torch.utils.data.DataLoader
        self._epoch = 0
        self._begun = False
        self._used_here = False
        self.fetched = 0
        """Batches that the epoch has given out so far."""
        self._start = self._last = self._generators()
        self._position: dict[str, Any] | None = None

    @property
    def epoch(self) -> int:
        """The epoch to be trained, from 0 on: how many were completed, or left for another."""
        return self._epoch

    def __len__(self) -> int:
        return len(self._loader)

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
        # A generator, so the epoch begins with its first batch: until then it may be restored.
        source: Any = self._loader
        asked = True  # whether the framework knows that the next batch is about to be read
        position, self._position = self._position, None
        if position is None or not position["fetched"]:
            if self._begun:
                self._epoch += 1
            self._begun, self.fetched = True, 0
            self._before_fetch()
            if position is not None:
                self._start_workers()
                self._set_generators(position["now"])
            self._start = self._last = self._generators()
            iterator = iter(source)
        else:
            self._begun = True
            source, iterator, ahead = self._found(position)
            yield from ahead
            asked = not ahead
        self._used_here = True
        while True:
            if not asked:
                self._before_fetch()
            asked = False
            if self._keeps_last:
                self._last = self._generators()
            try:
                batch = next(iterator)
            except StopIteration:
                break
            self.fetched += 1
            yield batch
        if source is not self._loader and hasattr(self._loader, "iteration"):
            self._loader.iteration = source.iteration
        self._epoch += 1
        self._begun, self.fetched = False, 0

    def _found(self, position: dict[str, Any]) -> tuple[Any, Iterator[Any], list[Any]]:
        """The epoch where it was: its loader and iterator, and what had been read but not used."""
        fetched, ahead = position["fetched"], position["ahead"]
        self._start_workers()
        self._start = self._unpacked(position["start"])
        self._last = self._unpacked(position["last"])
        self._set_generators(position["start"])
        if self._skip is not None and not ahead:
            source = self._skip(self._loader, fetched)
            skipping = iter(source)
            first = list(itertools.islice(skipping, 1))  # it may begin only now, and draw
            self._set_generators(position["now"])
            self.fetched += len(first)
            return source, skipping, first
        iterator: Any = iter(self._loader)
        kept = []
        number = 0
        count_only = not ahead and _reads_nothing_ahead(self._loader)
        try:
            for number in range(fetched):
                if count_only:
                    iterator._next_index()
                    continue
                if number == fetched - 1:
                    # A loader that reads ahead reads a batch now that is still to be used.
                    self._set_generators(position["last"])
                batch = next(iterator)
                if number >= fetched - ahead:
                    kept.append(batch)
        except StopIteration:
            msg = (
                f"the checkpoint is {fetched} batches into an epoch, and the data has only "
                f"{number}: train with the data that the run began with"
            )
            raise StateMismatch(msg) from None
        self._set_generators(position["now"])
        return self._loader, iterator, kept

    def _start_workers(self) -> None:
        # Persistent workers start once, with a random number, and not with every epoch.
        persistent = getattr(self._loader, "persistent_workers", False)
        if persistent and self._epoch and not self._used_here:
            iter(self._loader)

    # -- its state --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is: plain values and a few kilobytes of generators' states."""
        if self._position is not None:
            return self._position
        return {
            "epoch": self._epoch,
            "begun": self._begun,
            "fetched": self.fetched,
            "ahead": min(self._ahead(), self.fetched),
            "iteration": getattr(self._loader, "iteration", None),
            "start": _packed(self._start),
            "last": _packed(self._last),
            "now": _packed(self._generators()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next epoch that is begun goes on from there. Raises :class:`StateMismatch`."""
        if self._begun:
            msg = (
                "the data was read before its position was restored: restore the checkpoint first, "
                "then take the first batch"
            )
            raise StateMismatch(msg)
        self._position = dict(state)
        self._epoch, self.fetched = state["epoch"], state["fetched"]
        if state["iteration"] is not None and hasattr(self._loader, "set_epoch"):
            self._loader.set_epoch(state["iteration"])

    def _generators(self) -> dict[str, Any]:
        own = {name: value.get_state() for name, value in self._own_generators().items()}
        return {"global": rng_state(), "own": own}

    def _own_generators(self) -> dict[str, torch.Generator]:
        loader = self._loader
        holders = {"loader": loader, "sampler": getattr(loader, "sampler", None)}
        holders["batches"] = getattr(loader, "batch_sampler", None)
        holders["samples"] = getattr(holders["batches"], "sampler", None)
        found = {name: getattr(holder, "generator", None) for name, holder in holders.items()}
        return {name: value for name, value in found.items() if isinstance(value, torch.Generator)}

    def _set_generators(self, packed: dict[str, Any]) -> None:
        state = self._unpacked(packed)
        restore_rng(state["global"])
        for name, generator in self._own_generators().items():
            if name in state["own"]:
                generator.set_state(state["own"][name])

    @staticmethod
    def _unpacked(packed: dict[str, Any]) -> dict[str, Any]:
        version, words, gauss = packed["global"]["python"]
        python = (version, tuple(words.tolist()), gauss)
        return {**packed, "global": {**packed["global"], "python": python}}


def _packed(state: dict[str, Any]) -> dict[str, Any]:
    """Python's generator is 625 numbers: as a tensor they do not burden the manifest."""
    version, words, gauss = state["global"]["python"]
    python = [version, torch.tensor(words, dtype=torch.int64), gauss]
    return {**state, "global": {**state["global"], "python": python}}


def _reads_nothing_ahead(loader: Any) -> bool:
    """Whether batches are read one by one in this process, so that indices can be passed over."""
    return (
        type(loader) is torch.utils.data.DataLoader
        and not loader.num_workers
        and not isinstance(loader.dataset, torch.utils.data.IterableDataset)
    )
