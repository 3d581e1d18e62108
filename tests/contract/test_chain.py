"""At most one attempt can commit, whatever is lost, repeated or interleaved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spotfirst.checkpoints.chain import CheckpointChain, Claim, Commit, Prune, Release, _decode
from spotfirst.errors import ClaimLost, CorruptObject, FormatError, StorageUnavailable
from spotfirst.storage import Storage
from tests.contract.faults import Lossy, entries, fresh

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
_PROCESSES = {"one": 1, "two": 2, "another of two": 2, "three": 3}
"""Processes, and the attempts that they are of."""
_processes = st.sampled_from(sorted(_PROCESSES))
_fates = st.sampled_from(["fine", "fine", "lost", "refused"])
_Entry = Claim | Commit | Release | Prune


def _chain(storage: Any) -> CheckpointChain:
    return CheckpointChain(storage, clock=lambda: NOW)


def _commit(chain: CheckpointChain, attempt: int, step: int) -> int:
    return chain.commit(
        attempt, step=step, manifest=f"{step}.json", digest=f"{step:064x}", content="state"
    )


class Attempts(RuleBasedStateMachine):
    """Every interleaving of processes that claim, commit, prune, release, crash, hear nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fate = "fine"
        self.storage = fresh()
        self.lossy = Lossy(self.storage, lambda: self.fate)
        self.chains = {name: _chain(self.lossy) for name in _PROCESSES}
        self.step = 0
        self.writers: list[str] = []
        self.written: set[int] = set()
        self.numbers: dict[int, int] = {}
        self.unsure: set[int] = set()
        self.pending: dict[str, int] = {}
        self.pruned: set[int] = set()

    def _entries(self) -> list[_Entry]:
        return [_decode(data, "x") for data in entries(self.storage, "checkpoints")]

    def _holds(self, name: str) -> bool:
        """Whether the chain, as it is written, is this process's."""
        claims = [n for n, entry in enumerate(self._entries()) if isinstance(entry, Claim)]
        if not claims or self.writers[claims[-1]] != self.chains[name]._writer:
            return False
        return not any(isinstance(entry, Release) for entry in self._entries()[claims[-1] :])

    @contextmanager
    def _acting(self, name: str, fate: str) -> Iterator[tuple[CheckpointChain, int]]:
        chain = self.chains[name]
        self.fate = fate
        try:
            yield chain, _PROCESSES[name]
        finally:
            self.fate = "fine"
            new = len(self._entries()) - len(self.writers)
            self.writers += [chain._writer] * new

    @rule(name=_processes, fate=_fates)
    def claim(self, name: str, fate: str) -> None:
        before = [entry.attempt for entry in self._entries() if isinstance(entry, Claim)]
        with self._acting(name, fate) as (chain, attempt):
            try:
                chain.claim(attempt)
            except ClaimLost:
                assert before[-1] > attempt
                return
            except StorageUnavailable:
                return
        assert chain.holder == attempt
        assert not chain.released
        assert self._holds(name)

    @rule(name=_processes, fate=_fates, again=st.booleans())
    def commit(self, name: str, fate: str, again: bool) -> None:
        if not (again and name in self.pending):
            self.step += 1
            self.pending[name] = self.step
            self.written.add(self.step)  # its packs and manifest are there from here on
        step = self.pending[name]
        holds = self._holds(name)
        there = step in [entry.step for entry in self._entries() if isinstance(entry, Commit)]
        with self._acting(name, fate) as (chain, attempt):
            try:
                number = _commit(chain, attempt, step)
            except ClaimLost:
                # Never by mistake: someone else holds the chain, or this process has let go of
                # it, or has not read that it claimed.
                assert not holds or not chain._is_ours(attempt)
                return
            except StorageUnavailable:
                self.unsure.add(step)
                return
        assert there or holds
        self.numbers[step] = number
        del self.pending[name]

    @rule(name=_processes, fate=_fates, which=st.integers(0, 5))
    def prune(self, name: str, fate: str, which: int) -> None:
        commits = [seq for seq, _ in self.chains[name].commits[:-1]]
        if not commits:
            return
        gone = commits[which % len(commits)]
        holds = self._holds(name)
        with self._acting(name, fate) as (chain, attempt):
            try:
                chain.prune(attempt, [gone])
            except ClaimLost:
                assert not holds or not chain._is_ours(attempt)
            except StorageUnavailable:
                pass
            else:
                assert gone in chain.pruned
                self.pruned.add(gone)

    @rule(name=_processes, fate=_fates)
    def release(self, name: str, fate: str) -> None:
        with self._acting(name, fate) as (chain, attempt):
            try:
                chain.release(attempt)
            except (ClaimLost, StorageUnavailable):
                pass
            else:
                assert chain.released

    @rule(name=_processes)
    def crash(self, name: str) -> None:
        self.chains[name] = _chain(self.lossy)
        self.pending.pop(name, None)

    @invariant()
    def only_the_newest_claim_writes(self) -> None:
        attempt, writer = 0, ""
        for entry, by in zip(self._entries(), self.writers, strict=True):
            if isinstance(entry, Claim):
                assert entry.attempt >= attempt
                attempt, writer = entry.attempt, by
            else:
                assert (entry.attempt, by) == (attempt, writer)

    @invariant()
    def every_commit_is_whole_and_there_once(self) -> None:
        steps = [entry.step for entry in self._entries() if isinstance(entry, Commit)]
        assert len(steps) == len(set(steps))
        assert set(steps) <= self.written
        reader = _chain(self.storage).refresh()
        there = [*reader.commits, *reader.pruned.items()]
        by_step = {commit.step: number for number, commit in there}
        assert len(by_step) == len(there)
        assert self.numbers.items() <= by_step.items()
        assert set(steps) <= set(self.numbers) | self.unsure
        assert self.pruned <= reader.pruned.keys()


Attempts.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestAttempts = Attempts.TestCase


def test_a_newer_claim_fences_the_older_attempt(storage: Storage) -> None:
    older, newer = _chain(storage), _chain(storage)
    older.claim(1)
    _commit(older, 1, 10)
    newer.claim(2)
    with pytest.raises(ClaimLost, match="attempt 2 has claimed the chain; stop") as raised:
        _commit(older, 1, 20)
    assert raised.value.holder == 2
    with pytest.raises(ClaimLost):
        older.release(1)
    with pytest.raises(ClaimLost):
        older.claim(1)
    found = newer.newest()
    assert found is not None
    assert (found[0], found[1].step) == (2, 10)


def test_a_commit_whose_answer_was_lost_is_found_when_repeated(memory: Storage) -> None:
    fate = ["fine"]
    chain = _chain(Lossy(memory, lambda: fate[0]))
    chain.claim(1)
    fate[0] = "lost"
    with pytest.raises(StorageUnavailable):
        _commit(chain, 1, 10)
    fate[0] = "fine"
    assert _commit(chain, 1, 10) == 2
    assert _commit(chain, 1, 20) == 3


def test_the_next_commit_after_a_lost_answer_does_not_lose_the_claim(memory: Storage) -> None:
    fate = ["fine"]
    chain = _chain(Lossy(memory, lambda: fate[0]))
    chain.claim(1)
    fate[0] = "lost"
    with pytest.raises(StorageUnavailable):
        _commit(chain, 1, 10)
    fate[0] = "fine"
    assert _commit(chain, 1, 20) == 3
    assert [commit.step for _, commit in chain.commits] == [10, 20]


def test_committing_the_same_again_adds_nothing(memory: Storage) -> None:
    chain = _chain(memory)
    chain.claim(1)
    first = _commit(chain, 1, 10)
    assert _commit(chain, 1, 10) == first


def test_releasing_twice_is_releasing_once(memory: Storage) -> None:
    chain = _chain(memory)
    chain.claim(1)
    chain.release(1)
    chain.release(1)
    assert len(memory.list("checkpoints")) == 2


def test_what_was_released_must_be_claimed_again(memory: Storage) -> None:
    chain = _chain(memory)
    with pytest.raises(ClaimLost, match="claim it first"):
        _commit(chain, 1, 1)
    chain.claim(1)
    chain.release(1)
    with pytest.raises(ClaimLost, match="claim it again"):
        _commit(chain, 1, 1)
    chain.claim(1)
    assert _commit(chain, 1, 1) == 4


def test_an_entry_that_cannot_be_read_stops_everyone_each_time(memory: Storage) -> None:
    chain = _chain(memory)
    chain.claim(1)
    memory.write("checkpoints/00000002.json", b'{"v":1,"kind":"later","attempt":1}')
    chain_2 = _chain(memory)
    for _ in range(2):
        with pytest.raises(CorruptObject, match=r"checkpoints/00000002.json"):
            chain_2.refresh()
        with pytest.raises(CorruptObject):
            chain_2.claim(2)
    assert chain_2.holder == 1


def test_a_second_process_of_an_attempt_fences_the_first(memory: Storage) -> None:
    first, second = _chain(memory), _chain(memory)
    first.claim(1)
    _commit(first, 1, 10)
    second.claim(1)
    assert second.claims == [1, 3]
    for act in (
        lambda: _commit(first, 1, 20),
        lambda: first.release(1),
        lambda: first.prune(1, [2]),
    ):
        with pytest.raises(ClaimLost, match="another process of this attempt"):
            act()
    assert _commit(second, 1, 20) == 4


def test_claiming_again_in_the_same_process_adds_nothing(memory: Storage) -> None:
    chain = _chain(memory)
    chain.claim(1)
    chain.claim(1)
    assert chain.claims == [1]


def test_a_pruned_checkpoint_is_no_longer_among_the_commits(memory: Storage) -> None:
    chain = _chain(memory)
    chain.claim(1)
    one, two, three = (_commit(chain, 1, step) for step in (10, 20, 30))
    chain.prune(1, [one, two, 99])
    chain.prune(1, [one])
    reader = _chain(memory).refresh()
    assert [seq for seq, _ in reader.commits] == [three]
    assert sorted(reader.pruned) == [one, two]
    assert len(memory.list("checkpoints")) == 5


def test_a_flipped_bit_anywhere_in_an_entry_is_never_taken_for_another_content(
    memory: Storage,
) -> None:
    chain = _chain(memory)
    chain.claim(1)
    _commit(chain, 1, 10)
    path = "checkpoints/00000002.json"
    data = memory.read(path)
    right = _chain(memory).refresh().commits
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        memory.write(path, bytes(damaged))
        try:
            read = _chain(memory).refresh().commits
        except FormatError:
            continue
        # A bit of the checksum's own name: the content is as it was.
        assert [(n, msgspec.structs.replace(c, check="")) for n, c in read] == [
            (n, msgspec.structs.replace(c, check="")) for n, c in right
        ]
