"""Racing controllers, lost answers: one journal, one order, one state."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from spotfirst.errors import CorruptObject, LostRace, NewerFormat, StorageUnavailable
from spotfirst.events import Event, UnknownEvent, Waiting, decode_event
from spotfirst.journal import Journal
from spotfirst.sequence import Sequence
from spotfirst.signing import Seal, default_keys
from spotfirst.state import RunState, fold
from spotfirst.storage import Storage
from tests.contract.faults import Lossy, entries, fresh

NOW = datetime(2026, 1, 2, tzinfo=timezone.utc)
_writers = st.integers(0, 2)
_fates = st.sampled_from(["fine", "fine", "lost", "refused"])


class RacingControllers(RuleBasedStateMachine):
    """Every interleaving of refresh and append of three controllers, with faults."""

    def __init__(self) -> None:
        super().__init__()
        self.fate = "fine"
        self.storage = fresh()
        lossy: Storage = Lossy(self.storage, lambda: self.fate)  # type: ignore[assignment]
        self.journals = [Journal(lossy, by=f"c{n}") for n in range(3)]
        self.sent = 0
        self.confirmed: list[str] = []
        self.refused: list[str] = []
        self.unsure: list[str] = []

    @rule(writer=_writers)
    def refresh(self, writer: int) -> None:
        self.journals[writer].refresh()

    @rule(writer=_writers)
    def restart(self, writer: int) -> None:
        self.journals[writer] = Journal(self.journals[writer]._entries._storage, by=f"c{writer}")

    @rule(writer=_writers, fate=_fates)
    def append(self, writer: int, fate: str) -> None:
        self.sent += 1
        name = f"event {self.sent}"
        self.fate = fate
        try:
            self.journals[writer].append(Waiting(at=NOW, reason=name))
            self.confirmed.append(name)
        except LostRace:
            self.refused.append(name)
        except StorageUnavailable:
            (self.refused if fate == "refused" else self.unsure).append(name)
        finally:
            self.fate = "fine"

    @invariant()
    def what_was_confirmed_is_there_once_and_the_rest_never(self) -> None:
        there = [_reason(data) for data in entries(self.storage, "journal")]
        assert len(there) == len(set(there))
        assert set(self.confirmed) <= set(there) <= {*self.confirmed, *self.unsure}
        assert not set(there) & set(self.refused)
        numbers = self.storage.list("journal")
        assert numbers == [f"{n:08d}.json" for n in range(1, len(numbers) + 1)]

    @invariant()
    def all_readers_fold_to_the_same_state(self) -> None:
        whole = Journal(self.storage)
        whole.refresh()
        for journal in self.journals:
            seen = len(journal.events)
            assert journal.events == whole.events[:seen]
            assert journal.state == fold(whole.events[:seen])


def _reason(data: bytes) -> str:
    event = decode_event(data, path="x")
    assert isinstance(event, Waiting)
    return event.reason


RacingControllers.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None
)
TestRacingControllers = RacingControllers.TestCase


def test_the_second_of_two_controllers_learns_that_it_lost(storage: Storage) -> None:
    first, second = Journal(storage, by="first"), Journal(storage, by="second")
    first.append(Waiting(at=NOW, reason="first"))
    with pytest.raises(LostRace, match=r"00000001.json.*refresh, and decide again"):
        second.append(Waiting(at=NOW, reason="second"))
    state = second.refresh()
    assert state == first.state
    assert second.append(Waiting(at=NOW, reason="second")).seq == 2


def test_deciding_goes_on_until_it_wins_or_there_is_nothing_to_do(memory: Storage) -> None:
    mine, other = Journal(memory), Journal(memory)
    asked: list[int] = []

    def choose(state: RunState) -> Event | None:
        asked.append(state.seq)
        if state.seq < 3:
            other.refresh()
            other.append(Waiting(at=NOW, reason="other"))
        return Waiting(at=NOW, reason="mine")

    assert mine.decide(choose).seq == 4
    assert asked == [0, 1, 2, 3]
    assert mine.decide(lambda _: None).seq == 4


def test_deciding_gives_up_on_a_controller_in_a_loop(memory: Storage) -> None:
    mine, other = Journal(memory), Journal(memory)

    def choose(state: RunState) -> Event:
        other.refresh()
        other.append(Waiting(at=NOW, reason="other"))
        return Waiting(at=NOW, reason="mine")

    with pytest.raises(LostRace, match="5 races in a row"):
        mine.decide(choose, tries=5)


@pytest.mark.parametrize(
    ("bad", "error"), [(b"half of an eve", CorruptObject), (b'{"v":99,"kind":"x"}', NewerFormat)]
)
def test_an_event_that_cannot_be_read_is_never_skipped(
    memory: Storage, bad: bytes, error: type[Exception]
) -> None:
    journal = Journal(memory)
    for reason in ("one", "two", "three"):
        journal.append(Waiting(at=NOW, reason=reason))
    good = memory.read("journal/00000002.json")
    memory.write("journal/00000002.json", bad)
    reader = Journal(memory)
    for _ in range(2):
        with pytest.raises(error, match=r"journal/00000002.json"):
            reader.refresh()
        assert reader.state.seq == 1
    memory.write("journal/00000002.json", good)
    assert reader.refresh() == journal.state


def test_an_event_that_others_could_not_read_is_not_written(memory: Storage) -> None:
    with pytest.raises((CorruptObject, TypeError)):
        Journal(memory).append(Waiting(at=NOW, reason=object()))  # type: ignore[arg-type]
    with pytest.raises(CorruptObject):
        Journal(memory).append(Waiting(at=NOW, reason=3))  # type: ignore[arg-type]
    assert memory.list("journal") == []


def test_an_unknown_event_counts(memory: Storage) -> None:
    event = b'{"v":1,"kind":"later","at":"2026-01-02T00:00:00Z"}'
    data, _ = Seal(default_keys(), "", memory.url).close(event, path="journal/00000001.json")
    memory.write("journal/00000001.json", data)
    journal = Journal(memory)
    assert journal.refresh().seq == 1
    assert isinstance(journal.events[0], UnknownEvent)
    journal.append(Waiting(at=NOW, reason="on top"))
    assert memory.list("journal") == ["00000001.json", "00000002.json"]


class _OldListing:
    """A listing that is older than the objects, as some servers give."""

    def __init__(self, inner: Storage, names: list[str]) -> None:
        self._inner, self._names = inner, names

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)

    def list(self, prefix: str) -> list[str]:
        return self._names


@pytest.mark.parametrize("shown", [[], [1], [1, 3], [2, 3], [1, 2, 3]])
def test_a_listing_that_lags_hides_nothing(memory: Storage, shown: list[int]) -> None:
    for number in (1, 2, 3):
        memory.write(f"s/{number:08d}.json", b"%d" % number)
    lagging: Storage = _OldListing(memory, [f"{n:08d}.json" for n in shown])  # type: ignore[assignment]
    sequence = Sequence(lagging, "s")
    assert [data for _, data in sequence.read_new()] == [b"1", b"2", b"3"]
    assert sequence.length == 3
    assert sequence.read_new() == []


def test_other_files_in_the_folder_are_no_entries(storage: Storage) -> None:
    for name in ("00000001.json", "1.json", "00000002.json.bak", "readme"):
        storage.write(f"s/{name}", b"x")
    assert [path for path, _ in Sequence(storage, "s").read_new()] == ["s/00000001.json"]
