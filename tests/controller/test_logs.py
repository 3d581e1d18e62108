"""Following output: whole lines once, a glimpse of a progress bar, and bounds on everything."""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from datetime import datetime, timezone
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.storage import open_storage
from spotfirst_airflow.logs import LogFollower

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)
SEGMENT = 256 * 1024
_numbers = itertools.count()


def new_run(url: str) -> Run:
    spec = RunSpec(run_id="r", created_at=NOW, command=("true",))
    return create_run(open_storage(url), spec)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(str(tmp_path))


class Ticking:
    """A clock that is stepped."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def ship(run: Run, *segments: bytes, attempt: int = 1, first: int = 1) -> None:
    for number, data in enumerate(segments, start=first):
        run.storage.write(run.log_path(attempt, number), data)


def test_each_line_comes_once_and_a_half_one_with_its_rest(run: Run) -> None:
    follower = LogFollower(run)
    ship(run, b"one\ntw", b"o\n\nthree")
    assert follower.new_lines(1) == [(1, "one"), (1, "two"), (1, "")]
    assert follower.new_lines(1) == []
    assert follower.rest() == [(1, "three")]
    assert follower.rest() == []


def test_a_progress_bar_is_shown_as_a_terminal_would_from_time_to_time(run: Run) -> None:
    clock = Ticking()
    follower = LogFollower(run, monotonic=clock)
    shown: list[str] = []
    for percent in range(1, 101):
        ship(run, b"\r%d%%" % percent, first=percent)
        clock.now_s += 1.0
        shown += [line for _, line in follower.new_lines(1)]
    assert shown == [f"{percent}%" for percent in range(11, 92, 10)]
    ship(run, b"\n", first=101)
    assert follower.new_lines(1) == [(1, "100%")]
    assert follower.rest() == []


@pytest.mark.parametrize(
    ("written", "lines"),
    [
        (b"\r 10%\r 20%\r100%\n", ["100%"]),
        (b"10%\r20%\r100%\r\n", ["100%"]),
        (b"first\r\nsecond\r\n", ["first", "second"]),
        (b"\r\n", [""]),
        (b"\xff\xfe\x00binary\n", ["\ufffd\ufffd\x00binary"]),
    ],
)
def test_what_a_return_overwrites_is_left_out(run: Run, written: bytes, lines: list[str]) -> None:
    for cut in range(1, len(written)):
        follower = LogFollower(run)
        ship(run, written[:cut], written[cut:], attempt=cut)
        follower.skip_to_end(cut - 1)
        got = [text for number, text in follower.new_lines(cut) if number == cut]
        assert [text.strip() for text in got] == [text.strip() for text in lines], cut


def test_a_bar_that_ends_each_state_with_a_return_is_shown_too(run: Run) -> None:
    clock = Ticking()
    follower = LogFollower(run, monotonic=clock)
    ship(run, b"10%\r", b"20%\r")
    assert follower.new_lines(1) == []
    clock.now_s = 60.0
    assert follower.new_lines(1) == [(1, "20%")]
    ship(run, b"30%\r", first=3)
    assert follower.new_lines(1) == []
    assert follower.rest() == [(1, "30%")]


def test_a_question_without_a_newline_is_shown_and_then_its_whole_line(run: Run) -> None:
    clock = Ticking()
    follower = LogFollower(run, monotonic=clock)
    ship(run, b"Loading data ...")
    assert follower.new_lines(1) == []
    clock.now_s = 60.0
    assert follower.new_lines(1) == [(1, "Loading data ...")]
    assert follower.new_lines(1) == []
    ship(run, b" done\n", first=2)
    assert follower.new_lines(1) == [(1, "Loading data ... done")]


@pytest.mark.parametrize("content", [b"\r 50%|#####", b"x", b"\x00\xff", b"\r"])
def test_text_without_a_newline_is_kept_within_a_bound(run: Run, content: bytes) -> None:
    follower = LogFollower(run)
    data = (content * (SEGMENT // len(content) + 1))[:SEGMENT]
    shown = 0
    tracemalloc.start()
    try:
        for number in range(1, 41):
            ship(run, data, first=number)
            shown += len(follower.new_lines(1))
        gc.collect()  # the traceback of a missing segment is a cycle
        kept_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept_bytes < 1 << 20
    assert shown or content == b"\r"


def test_one_look_reads_a_bounded_amount_and_says_that_there_is_more(run: Run) -> None:
    ship(run, *[b"x" * 1023 + b"\n"] * 50)
    ship(run, *[(b"y" * 1023 + b"\n") * 256] * 100, first=51)
    follower = LogFollower(run)
    first = follower.new_lines(1)
    assert follower.is_behind
    assert sum(len(line) for _, line in first) < 10 << 20
    looks = [first]
    while follower.is_behind:
        looks.append(follower.new_lines(1))
    assert sum(len(lines) for lines in looks) == 50 + 256 * 100


def test_who_cannot_show_everything_gets_the_end_and_a_note(run: Run) -> None:
    ship(run, *[(b"y" * 1023 + b"\n") * 256] * 100, b"the end")
    follower = LogFollower(run)
    lines = [line for _, line in follower.newest_lines(1, is_last=True)]
    assert "left out" in lines[0]
    assert lines[-1] == "the end"
    assert len(lines) < 2000


def test_coming_back_skips_what_was_shipped_and_gives_what_comes(run: Run) -> None:
    ship(run, b"old\n")
    ship(run, b"old as well\n", attempt=2)
    run.storage.write(run.attempt_path(2, "log/not-a-segment"), b"x")
    follower = LogFollower(run)
    follower.skip_to_end(2)
    assert follower.new_lines(2) == []
    ship(run, b"new\n", attempt=2, first=2)
    assert follower.new_lines(2) == [(2, "new")]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=6000)),
    st.data(),
)
def test_no_character_is_lost_however_output_is_cut(lines: list[str], data: st.DataObject) -> None:
    run = new_run(f"memory://logs-{next(_numbers)}")
    text = "".join(f"{line}\n" for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)]) if a < b]
    follower = LogFollower(run, monotonic=lambda: 0.0)
    got = ""
    for number, piece in enumerate(pieces, start=1):
        ship(run, piece.encode(), first=number)
        got += "".join(line for _, line in follower.new_lines(1))
    assert got == "".join(lines)
