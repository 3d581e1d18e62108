"""At most one attempt can commit, whatever is lost, repeated or interleaved."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spotfirst.checkpoints.chain import CheckpointChain, Claim, Commit, Release, _decode
from spotfirst.errors import ClaimLost, CorruptObject, StorageUnavailable
from spotfirst.storage import Storage
from tests.contract.faults import Lossy, entries, fresh

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
_attempts = st.integers(1, 3)
_fates = st.sampled_from(["fine", "fine", "lost", "refused"])


def _chain(storage: Any) -> CheckpointChain:
    return CheckpointChain(storage, clock=lambda: NOW)


class Attempts(RuleBasedStateMachine):
    """Every interleaving of three attempts that claim, commit, release, crash, hear nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.fate = "fine"
        self.storage = fresh()
        self.lossy = Lossy(self.storage, lambda: self.fate)
        self.chains = {number: _chain(self.lossy) for number in (1, 2, 3)}
        self.step = 0
        self.written: set[int] = set()
        self.numbers: dict[int, int] = {}
        self.unsure: set[int] = set()
        self.pending: dict[int, int] = {}

    def _entries(self) -> list[Claim | Commit | Release]:
        return [_decode(data, "x") for data in entries(self.storage, "checkpoints")]

    @rule(attempt=_attempts, fate=_fates)
    def claim(self, attempt: int, fate: str) -> None:
        before = [entry.attempt for entry in self._entries() if isinstance(entry, Claim)]
        self.fate = fate
        try:
            self.chains[attempt].claim(attempt)
        except ClaimLost:
            assert before[-1] > attempt
        except StorageUnavailable:
            pass
        else:
            assert self.chains[attempt].holder == attempt
            assert not self.chains[attempt].released
        finally:
            self.fate = "fine"

    @rule(attempt=_attempts, fate=_fates, again=st.booleans())
    def commit(self, attempt: int, fate: str, again: bool) -> None:
        if not (again and attempt in self.pending):
            self.step += 1
            self.pending[attempt] = self.step
            self.written.add(self.step)  # its blobs and manifest are there from here on
        step = self.pending[attempt]
        journal = self._entries()
        claims = [entry.attempt for entry in journal if isinstance(entry, Claim)]
        there = step in [entry.step for entry in journal if isinstance(entry, Commit)]
        released = isinstance(_last_of_holder(journal), Release)
        self.fate = fate
        try:
            number = self.chains[attempt].commit(
                attempt, step=step, manifest=f"m{step}", content="state"
            )
        except ClaimLost:
            # Never by mistake: someone newer holds the chain, or this attempt has let go of it,
            # or has not read that it claimed.
            holds = bool(claims) and claims[-1] == attempt and not released
            chain = self.chains[attempt]
            assert not holds or chain.holder != attempt or chain.released
        except StorageUnavailable:
            self.unsure.add(step)
        else:
            assert there or (claims[-1] == attempt and not released)
            self.numbers[step] = number
            del self.pending[attempt]
        finally:
            self.fate = "fine"

    @rule(attempt=_attempts, fate=_fates)
    def release(self, attempt: int, fate: str) -> None:
        self.fate = fate
        try:
            self.chains[attempt].release(attempt)
        except (ClaimLost, StorageUnavailable):
            pass
        else:
            assert self.chains[attempt].released
        finally:
            self.fate = "fine"

    @rule(attempt=_attempts)
    def crash(self, attempt: int) -> None:
        self.chains[attempt] = _chain(self.lossy)
        self.pending.pop(attempt, None)

    @invariant()
    def only_the_newest_claim_commits(self) -> None:
        holder: int | None = None
        for entry in self._entries():
            if isinstance(entry, Claim):
                assert holder is None or entry.attempt >= holder
                holder = entry.attempt
            else:
                assert entry.attempt == holder

    @invariant()
    def every_commit_is_whole_and_there_once(self) -> None:
        steps = [entry.step for entry in self._entries() if isinstance(entry, Commit)]
        assert len(steps) == len(set(steps))
        assert set(steps) <= self.written
        reader = _chain(self.storage).refresh()
        by_step = {commit.step: number for number, commit in reader.commits}
        assert self.numbers.items() <= by_step.items()
        assert set(steps) <= set(self.numbers) | self.unsure


def _last_of_holder(journal: list[Claim | Commit | Release]) -> object:
    return next((e for e in reversed(journal) if not isinstance(e, Commit)), None)


Attempts.TestCase.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
TestAttempts = Attempts.TestCase


def test_a_newer_claim_fences_the_older_attempt(storage: Storage) -> None:
    older, newer = _chain(storage), _chain(storage)
    older.claim(1)
    older.commit(1, step=10, manifest="m10", content="state")
    newer.claim(2)
    with pytest.raises(ClaimLost, match="attempt 2 has claimed the chain; stop") as raised:
        older.commit(1, step=20, manifest="m20", content="state")
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
        chain.commit(1, step=10, manifest="m10", content="state")
    fate[0] = "fine"
    assert chain.commit(1, step=10, manifest="m10", content="state") == 2
    assert chain.commit(1, step=20, manifest="m20", content="state") == 3


def test_the_next_commit_after_a_lost_answer_does_not_lose_the_claim(memory: Storage) -> None:
    fate = ["fine"]
    chain = _chain(Lossy(memory, lambda: fate[0]))
    chain.claim(1)
    fate[0] = "lost"
    with pytest.raises(StorageUnavailable):
        chain.commit(1, step=10, manifest="m10", content="state")
    fate[0] = "fine"
    assert chain.commit(1, step=20, manifest="m20", content="state") == 3
    assert [commit.step for _, commit in chain.commits] == [10, 20]


def test_committing_the_same_again_adds_nothing(memory: Storage) -> None:
    chain = _chain(memory)
    chain.claim(1)
    first = chain.commit(1, step=10, manifest="m10", content="state")
    assert chain.commit(1, step=10, manifest="m10", content="state") == first


def test_releasing_twice_is_releasing_once(memory: Storage) -> None:
    chain = _chain(memory)
    chain.claim(1)
    chain.release(1)
    chain.release(1)
    assert len(memory.list("checkpoints")) == 2


def test_what_was_released_must_be_claimed_again(memory: Storage) -> None:
    chain = _chain(memory)
    with pytest.raises(ClaimLost, match="claim it first"):
        chain.commit(1, step=1, manifest="m", content="state")
    chain.claim(1)
    chain.release(1)
    with pytest.raises(ClaimLost, match="claim it again"):
        chain.commit(1, step=1, manifest="m", content="state")
    chain.claim(1)
    assert chain.commit(1, step=1, manifest="m", content="state") == 4


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
