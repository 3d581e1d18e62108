"""Output as numbered segments."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.agent.logs import TAIL_BYTES, LogShipper


class Shelf:
    """Where segments go; ``away`` makes it refuse them."""

    def __init__(self) -> None:
        self.segments: dict[int, bytes] = {}
        self.away = False

    def put(self, number: int, data: bytes) -> None:
        if self.away:
            raise OSError
        assert self.segments.setdefault(number, data) == data
        assert list(self.segments) == list(range(1, len(self.segments) + 1))

    @property
    def text(self) -> bytes:
        return b"".join(self.segments.values())


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


def test_segments_are_whole_lines_numbered_from_1(shelf: Shelf) -> None:
    logs = LogShipper(shelf.put)
    logs.feed(b"one\ntwo\nthr")
    logs.ship()
    logs.feed(b"ee\n")
    logs.ship()
    assert shelf.segments == {1: b"one\ntwo\n", 2: b"three\n"}


def test_nothing_new_ships_nothing(shelf: Shelf) -> None:
    logs = LogShipper(shelf.put)
    logs.ship()
    assert (shelf.segments, logs.segments) == ({}, 0)


def test_an_unfinished_line_waits_for_one_call_only(shelf: Shelf) -> None:
    logs = LogShipper(shelf.put)
    logs.feed(b"50 %")
    logs.ship()
    assert shelf.segments == {}
    logs.ship()
    assert shelf.segments == {1: b"50 %"}


def test_a_segment_is_bounded(shelf: Shelf) -> None:
    logs = LogShipper(shelf.put, segment_bytes=100)
    logs.feed(b"x" * 30 + b"\n" + b"y" * 250)
    logs.ship(rest=True)
    assert shelf.text == b"x" * 30 + b"\n" + b"y" * 250
    assert max(map(len, shelf.segments.values())) <= 100


@given(text=st.text(min_size=1), size=st.integers(4, 40))
def test_every_byte_arrives_once_and_no_character_is_cut(text: str, size: int) -> None:
    shelf = Shelf()
    logs = LogShipper(shelf.put, segment_bytes=size)
    data = text.encode()
    for start in range(0, len(data), 7):
        logs.feed(data[start : start + 7])
        logs.ship()
    logs.ship(rest=True)
    assert shelf.text == data
    for segment in shelf.segments.values():
        segment.decode()


@given(data=st.binary(), size=st.integers(1, 40))
def test_bytes_that_are_no_text_arrive_as_well(data: bytes, size: int) -> None:
    shelf = Shelf()
    logs = LogShipper(shelf.put, segment_bytes=size)
    logs.feed(data)
    logs.ship(rest=True)
    assert shelf.text == data


def test_a_segment_that_failed_is_repeated_with_the_same_bytes(shelf: Shelf) -> None:
    logs = LogShipper(shelf.put)
    seen: list[bytes] = []
    answers = iter([OSError("the answer was lost"), None])

    def put(_number: int, data: bytes) -> None:
        seen.append(data)
        if error := next(answers):
            raise error

    logs = LogShipper(put)
    logs.feed(b"one\n")
    with pytest.raises(OSError, match="lost"):
        logs.ship()
    logs.feed(b"two\n")
    assert logs.segments == 0
    answers = iter([None, None])
    logs.ship()
    assert seen == [b"one\n", b"one\n", b"two\n"]


def test_a_long_outage_drops_the_oldest_and_says_so(shelf: Shelf) -> None:
    logs = LogShipper(shelf.put, backlog_bytes=1000)
    for number in range(500):
        logs.feed(b"line %03d\n" % number)
    logs.ship()
    first, *rest = shelf.text.splitlines()
    assert first == b"[spotfirst] 3501 bytes of output were dropped here"
    assert rest[-1] == b"line 499"
    assert len(rest) == 111


def test_the_end_is_given_up_after_a_while(shelf: Shelf) -> None:
    logs = LogShipper(shelf.put)
    logs.feed(b"x")
    shelf.away = True
    assert not logs.finish(within_s=0)
    shelf.away = False
    assert logs.finish(within_s=0)
    assert shelf.text == b"x"


def test_a_full_disk_does_not_stop_the_log(shelf: Shelf, caplog: pytest.LogCaptureFixture) -> None:
    logs = LogShipper(shelf.put, local=Path("/dev/full"))
    logs.feed(b"one\n")
    logs.feed(b"two\n")
    logs.ship()
    assert shelf.text == b"one\ntwo\n"
    assert [r.message for r in caplog.records] == [
        "the local copy of the log ends here: [Errno 28] No space left on device"
    ]


def test_the_local_copy_is_bounded(shelf: Shelf, tmp_path: Path) -> None:
    logs = LogShipper(shelf.put, local=tmp_path / "log", local_bytes=10)
    logs.feed(b"12345678\n")
    logs.feed(b"12345678\n")
    logs.feed(b"1")
    assert (tmp_path / "log").read_bytes() == b"12345678\n"


def test_the_tail_is_the_last_lines_of_the_command(shelf: Shelf) -> None:
    logs = LogShipper(shelf.put)
    for number in range(80):
        logs.feed(f"line {number}\n".encode())
    logs.note("a line of the agent's own")
    assert logs.tail() == tuple(f"line {n}" for n in range(30, 80))


def test_the_tail_is_bounded_and_never_half_a_character(shelf: Shelf) -> None:
    logs = LogShipper(shelf.put)
    logs.feed(b"a" + "€".encode() * 20_000)
    (line,) = logs.tail()
    assert set(line) == {"€"}
    assert TAIL_BYTES - 3 < len(line.encode()) <= TAIL_BYTES


def test_a_progress_bar_is_shown_as_a_terminal_would(shelf: Shelf) -> None:
    logs = LogShipper(shelf.put)
    logs.feed(b"10 %\r20 %\r30 %\nnext\r\n")
    assert logs.tail() == ("30 %", "next")


def test_a_note_waits_for_the_end_of_the_commands_line() -> None:
    stored: list[bytes] = []
    logs = LogShipper(lambda _, data: stored.append(data))
    logs.feed(b"weights abc")
    logs.note("a checkpoint every second")
    logs.feed(b"\nnext\n")
    logs.ship()
    assert b"".join(stored) == b"weights abc\n[spotfirst] a checkpoint every second\nnext\n"


def test_a_note_does_not_wait_for_a_line_that_does_not_end() -> None:
    stored: list[bytes] = []
    logs = LogShipper(lambda _, data: stored.append(data))
    logs.feed(b"\r10 %")
    logs.note("notice")
    for _ in range(2):
        logs.ship()
    assert b"".join(stored) == b"\r10 %\n[spotfirst] notice\n"


def test_the_last_notes_are_not_lost_with_the_last_line() -> None:
    stored: list[bytes] = []
    logs = LogShipper(lambda _, data: stored.append(data))
    logs.feed(b"half a line")
    logs.note("ended")
    assert logs.finish(within_s=0)
    assert b"".join(stored) == b"half a line\n[spotfirst] ended\n"
