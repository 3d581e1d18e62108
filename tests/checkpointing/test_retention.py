"""Which checkpoints stay, and that nothing goes which one of them needs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from spotfirst.checkpointer import Checkpointer
from spotfirst.checkpoints.chain import Commit
from spotfirst.checkpoints.retention import Retention, collect, kept, prune
from spotfirst.errors import (
    ClaimLost,
    CorruptObject,
    InvalidSpec,
    ObjectMissing,
    StorageUnavailable,
)
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import Storage, open_storage
from tests.checkpointing.conftest import LONG_AGO
from tests.checkpointing.states import known_of, load, manifest_of, same, snapshot, store
from tests.checkpointing.storages import faulty
from tests.checkpointing.training import attempt, progress

_names = itertools.count()


def _commits(*steps: int, **metrics: list[float]) -> list[tuple[int, Commit]]:
    return [
        (
            10 + number,
            Commit(
                attempt=1, at=LONG_AGO, nonce="n", step=step, manifest="m", digest="d",
                content="state", metrics={name: values[number] for name, values in metrics.items()},
            ),
        )
        for number, step in enumerate(steps)
    ]  # fmt: skip


# -- which stay -------------------------------------------------------------------------------


def test_the_last_ones_stay() -> None:
    assert kept(_commits(1, 2, 3, 4), Retention(last=2)) == {12, 13}
    assert kept(_commits(1, 2, 3, 4), Retention(last=None)) == {10, 11, 12, 13}
    assert kept([], Retention()) == set()


def test_of_several_of_one_step_the_newest_counts_for_all() -> None:
    assert kept(_commits(1, 2, 2, 3, 3, 3), Retention(last=2)) == {12, 15}
    assert kept(_commits(1, 1, 2, 2), Retention(last=1, every_steps=10)) == {11, 13}


def test_the_first_one_in_each_so_many_steps_stays() -> None:
    commits = _commits(5, 90, 101, 130, 199, 200, 201)
    assert kept(commits, Retention(last=1, every_steps=100)) == {10, 12, 15, 16}


@pytest.mark.parametrize(("mode", "best"), [("min", {11, 13}), ("max", {10, 12})])
def test_the_best_ones_stay(mode: Any, best: set[int]) -> None:
    commits = _commits(1, 2, 3, 4, 5, loss=[3.0, 1.0, 4.0, 2.0, 2.5])
    assert kept(commits, Retention(last=1, best=2, mode=mode)) == best | {14}


def test_one_without_the_metric_is_not_among_the_best() -> None:
    commits = [
        *_commits(1),
        *((20 + seq, c) for seq, c in _commits(2, 3, loss=[float("nan"), 1.0])),
    ]
    assert kept(commits, Retention(last=1, best=3)) == {31}


@pytest.mark.parametrize(
    "wrong", [{"last": 0}, {"every_steps": 0}, {"best": -1}, {"best": 1, "metric": ""}]
)
def test_what_keeps_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec, match="retention"):
        Retention(**wrong).check()


@given(
    steps=st.lists(st.integers(0, 50), min_size=1, max_size=20).map(sorted),
    last=st.none() | st.integers(1, 5),
    every_steps=st.none() | st.integers(1, 20),
    best=st.integers(0, 4),
    data=st.data(),
)
def test_the_newest_always_stays_and_pruning_again_prunes_nothing(
    steps: list[int], last: int | None, every_steps: int | None, best: int, data: st.DataObject
) -> None:
    losses = data.draw(st.lists(st.floats(-9, 9), min_size=len(steps), max_size=len(steps)))
    commits = _commits(*steps, loss=losses)
    retention = Retention(last=last, every_steps=every_steps, best=best)
    keep = kept(commits, retention)
    assert commits[-1][0] in keep
    rest = [(seq, commit) for seq, commit in commits if seq in keep]
    assert kept(rest, retention) == keep


# -- what goes --------------------------------------------------------------------------------


class Process:
    """One that trains: claims, restores, saves, commits, prunes, collects."""

    def __init__(self, storage: Storage, attempt: int, retention: Retention) -> None:
        self.run = Run(storage, "r")
        self.retention = retention
        self.attempt = attempt
        self.chain = self.run.chain()
        self.chain.claim(attempt)
        self.claim = self.chain.claims[-1]
        newest = self.chain.newest()
        self.known = known_of(self.run.packs(), newest[1] if newest else None)
        self.step = newest[1].step if newest else 0
        self.saves = 0
        self.stored: Commit | None = None

    def write(self, state: Any) -> Commit:
        """All of a checkpoint but the commit."""
        self.saves += 1
        self.step += 1
        packs = self.run.packs()
        self.stored = store(
            packs, snapshot(state), known=self.known, claim=self.claim, save=self.saves
        )
        return self.stored

    def commit(self) -> int:
        assert self.stored is not None
        stored = self.stored
        seq = self.chain.commit(
            self.attempt, step=self.step, manifest=stored.manifest, digest=stored.digest,
            content="state", metrics={"loss": self.step * 7 % 5},
        )  # fmt: skip
        self.known, self.stored = known_of(self.run.packs(), stored), None
        return seq

    def clean(self) -> tuple[int, int]:
        prune(self.chain, self.attempt, self.retention)
        return self.collect()

    def collect(self) -> tuple[int, int]:
        return collect(self.run.packs(), self.chain, self.run.pinned())


def _objects(run: Run) -> set[str]:
    return {name for name, _ in run.packs().walk("")}


def _named(run: Run, commits: list[Commit]) -> set[str]:
    packs = run.packs()
    names = {pack.name for commit in commits for pack in manifest_of(packs, commit).packs}
    return names | {commit.manifest for commit in commits}


def _state(value: float) -> dict[str, torch.Tensor]:
    return {"trained": torch.full((5,), value), "frozen": torch.arange(9.0)}


@pytest.fixture
def process(run: Run) -> Process:
    return Process(run.root, 1, Retention(last=2))


def test_what_no_kept_checkpoint_names_is_removed(run: Run, process: Process) -> None:
    for value in range(4):
        process.write(_state(value))
        process.commit()
    everything = _objects(run)
    removed, size = process.clean()
    left = _objects(run)
    assert left == _named(run, [commit for _, commit in process.chain.commits])
    assert (len(everything) - len(left), size > 0) == (removed, True)
    for (_, commit), value in zip(process.chain.commits, (2, 3), strict=True):
        assert same(load(run.packs(), commit), _state(value))
    assert process.clean() == (0, 0)


def test_what_a_pinned_checkpoint_names_stays(run: Run, process: Process) -> None:
    process.write(_state(0))
    first = process.commit()
    run.pin(first, by="replay")
    for value in range(1, 4):
        process.write(_state(value))
        process.commit()
    process.clean()
    assert first in process.chain.pruned
    assert same(load(run.packs(), process.chain.pruned[first]), _state(0))


def test_a_save_that_is_under_way_is_not_touched(run: Run, process: Process) -> None:
    process.write(_state(0))
    process.commit()
    newer = Process(run.root, 2, Retention(last=1))
    newer.write(_state(1))
    before = _objects(run)
    process.collect()  # by one that does not know that it is fenced
    assert _objects(run) == before
    newer.commit()
    newer.clean()
    assert same(load(run.packs(), newer.chain.commits[-1][1]), _state(1))


def test_what_a_dead_attempt_left_behind_is_removed(run: Run, process: Process) -> None:
    process.write(_state(0))
    process.commit()
    process.write(_state(1))  # and dies
    orphans = _objects(run) - _named(run, [process.chain.commits[0][1]])
    assert len(orphans) == 2
    newer = Process(run.root, 2, Retention(last=5))
    newer.write(_state(2))
    newer.commit()
    newer.clean()
    assert not orphans & _objects(run)


def test_a_fenced_process_prunes_nothing(run: Run, process: Process) -> None:
    for value in range(4):
        process.write(_state(value))
        process.commit()
    Process(run.root, 2, Retention())
    with pytest.raises(ClaimLost):
        process.clean()
    assert len(run.chain().refresh().commits) == 4


def test_nothing_is_collected_while_the_newest_manifest_cannot_be_read(
    run: Run, process: Process
) -> None:
    for value in range(4):
        process.write(_state(value))
        process.commit()
    newest = process.chain.commits[-1][1].manifest
    run.packs().write(newest, b"?")
    before = _objects(run)
    with pytest.raises(CorruptObject):
        process.clean()
    assert _objects(run) == before


def test_other_files_are_left_alone(run: Run, process: Process) -> None:
    run.packs().write("00000000/readme.txt", b"mine")
    for value in range(4):
        process.write(_state(value))
        process.commit()
    process.clean()
    assert run.packs().read("00000000/readme.txt") == b"mine"


def test_the_checkpointer_keeps_what_its_retention_says(run: Run, tmp_path: Path) -> None:
    context = attempt(run, 1, tmp_path)
    checkpointer = Checkpointer(
        model=torch.nn.Linear(3, 3), context=context, retention=Retention(last=2, every_steps=4)
    )
    checkpointer.restore()
    for step in range(1, 11):
        checkpointer.step(step)
        checkpointer.save()
    chain = run.chain().refresh()
    assert [commit.step for _, commit in chain.commits] == [1, 4, 8, 9, 10]
    assert _objects(run) == _named(run, [commit for _, commit in chain.commits])


def test_a_collection_that_fails_fails_no_save(run: Run, tmp_path: Path) -> None:
    def refuse(verb: str, path: str) -> None:
        if verb.startswith("delete"):
            raise StorageUnavailable(path)

    context = attempt(Run(faulty(run.root, before=refuse), "r"), 1, tmp_path)
    checkpointer = Checkpointer(
        model=torch.nn.Linear(3, 3), context=context, retention=Retention(last=1)
    )
    checkpointer.restore()
    for step in range(1, 4):
        checkpointer.step(step)
        checkpointer.save()
    assert [commit.step for _, commit in run.chain().refresh().commits] == [3]
    assert not progress(context).warnings


# -- anything, in any order -------------------------------------------------------------------


class Crash(BaseException):
    """The process is gone, right here."""


_crashes = st.sampled_from([None] * 30 + list(range(15)))
_values = st.tuples(st.integers(0, 3), st.integers(0, 2))


class AnyOrder(RuleBasedStateMachine):
    """Two processes and a replay, with a crash before or after any call to the storage."""

    @initialize(last=st.integers(1, 3), every=st.none() | st.integers(2, 4), best=st.integers(0, 1))
    def begin(self, last: int, every: int | None, best: int) -> None:
        self.storage = open_storage(f"memory://retention-{next(_names)}")
        self.run = create_run(
            self.storage, RunSpec(run_id="r", created_at=LONG_AGO, command=("train",))
        )
        self.retention = Retention(last=last, every_steps=every, best=best)
        self.processes: dict[str, Process] = {}
        self.states: dict[str, Any] = {}
        self.pinned: set[int] = set()

    def _at_a_call(self, crash: int | None) -> Storage:
        calls = itertools.count()

        def count(*_: str) -> None:
            if next(calls) == crash:
                raise Crash

        return faulty(self.storage, before=count, after=count)

    @contextlib.contextmanager
    def _may_crash(self, name: str, crash: int | None) -> Iterator[None]:
        process = self.processes.get(name)
        if process is not None:
            process.run = Run(self._at_a_call(crash), "r")
            process.chain._entries._storage = process.run.storage
        try:
            yield
        except Crash:
            self.processes.pop(name, None)
        except ClaimLost:
            holder = self.run.chain().refresh()
            assert name in self.processes
            assert holder.claims[-1] != self.processes[name].claim

    @rule(name=st.sampled_from("ab"), again=st.booleans(), crash=_crashes)
    def claim(self, name: str, again: bool, crash: int | None) -> None:
        number = (self.run.chain().refresh().holder or 0) + (0 if again else 1)
        self.processes.pop(name, None)
        with self._may_crash(name, crash):
            self.processes[name] = Process(self._at_a_call(crash), max(1, number), self.retention)

    @rule(name=st.sampled_from("ab"), values=_values, crash=_crashes)
    def write(self, name: str, values: tuple[int, int], crash: int | None) -> None:
        process = self.processes.get(name)
        if process is None:
            return
        state = {"a": torch.full((4,), float(values[0])), "b": torch.full((9,), values[1] + 0.5)}
        with self._may_crash(name, crash):
            stored = process.write(state)
            self.states[stored.manifest] = state

    @rule(name=st.sampled_from("ab"), states=st.lists(_values, min_size=1, max_size=3))
    def train(self, name: str, states: list[tuple[int, int]]) -> None:
        if name not in self.processes:
            self.claim(name, again=False, crash=None)
        for values in states:
            self.write(name, values, None)
            self.commit(name, None)

    @rule(name=st.sampled_from("ab"), crash=_crashes)
    def commit(self, name: str, crash: int | None) -> None:
        process = self.processes.get(name)
        if process is None or process.stored is None:
            return
        with self._may_crash(name, crash):
            process.commit()
            process.clean()
            assert process.collect() == (0, 0)
            chain = self.run.chain().refresh()
            assert {seq for seq, _ in chain.commits} == kept(chain.commits, self.retention)
            staying = [commit for _, commit in chain.commits]
            staying += [chain.pruned[seq] for seq in self.pinned & chain.pruned.keys()]
            newest = chain.commits[-1][1].manifest
            unneeded = _objects(self.run) - _named(self.run, staying)
            assert all(name[:15] > newest[:15] for name in unneeded)

    @rule(name=st.sampled_from("ab"), crash=_crashes)
    def collect(self, name: str, crash: int | None) -> None:
        process = self.processes.get(name)
        if process is None:
            return
        with self._may_crash(name, crash):
            try:
                process.collect()
            except ObjectMissing:  # fenced long ago, and what it knows is pruned and gone
                assert self.run.chain().refresh().claims[-1] != process.claim

    @rule(which=st.integers(0, 9))
    def pin(self, which: int) -> None:
        commits = self.run.chain().refresh().commits
        if not commits:
            return
        seq = commits[which % len(commits)][0]
        self.run.pin(seq, by="replay")
        if seq in dict(self.run.chain().refresh().commits):
            self.pinned.add(seq)

    def teardown(self) -> None:
        if hasattr(self, "storage"):
            for path, _ in list(self.storage.walk("")):
                self.storage.delete(path)

    @invariant()
    def every_checkpoint_that_is_kept_or_pinned_is_whole(self) -> None:
        if not hasattr(self, "run"):
            return
        chain = self.run.chain().refresh()
        staying = [commit for _, commit in chain.commits]
        staying += [chain.pruned[seq] for seq in self.pinned & chain.pruned.keys()]
        for commit in staying:
            assert same(load(self.run.packs(), commit), self.states[commit.manifest])


AnyOrder.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestAnyOrder = AnyOrder.TestCase
