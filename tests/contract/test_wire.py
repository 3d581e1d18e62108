"""Records come back as they were written, or are refused by name."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
from datetime import datetime, timezone

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spotfirst.errors import CorruptObject, NewerFormat
from spotfirst.events import (
    Created,
    Event,
    Succeeded,
    UnknownEvent,
    decode_event,
    encode_event,
)
from spotfirst.heartbeat import ExitReport, Progress
from spotfirst.market import Pool
from spotfirst.state import fold
from spotfirst.wire import FORMAT_VERSION, Record, decode, encode
from tests.contract.records import EVENTS, RECORDS, any_event, built
from tests.waiting import PATIENCE_S

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
_quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_every_record_comes_back_as_it_was(kind: type[Record]) -> None:
    @_quick
    @given(built(kind))
    def check(record: Record) -> None:
        assert decode(encode(record), kind, path="x") == record

    check()


@_quick
@given(any_event)
def test_every_event_comes_back_as_it_was(event: Event) -> None:
    assert decode_event(encode_event(event, nonce="0a"), path="x") == event


def test_every_kind_of_event_is_tested() -> None:
    assert {kind.__name__ for kind in EVENTS} | {"UnknownEvent"} == {
        kind.__name__ for kind in Event.__subclasses__()
    }


def test_two_writes_of_an_event_differ() -> None:
    event = Created(at=NOW)
    assert encode_event(event, nonce="0a") != encode_event(event, nonce="0b")


def test_a_newer_format_is_refused_by_name() -> None:
    data = b'{"v":%d,"instance_type":"a","zone":"b"}' % (FORMAT_VERSION + 1)
    with pytest.raises(NewerFormat, match=r"runs/x/spec.json.*upgrade spotfirst"):
        decode(data, Pool, path="runs/x/spec.json")
    with pytest.raises(NewerFormat):
        decode_event(data, path="x")


def test_fields_of_a_later_release_are_ignored() -> None:
    data = b'{"v":1,"instance_type":"a","zone":"b","colour":"red"}'
    assert decode(data, Pool, path="x") == Pool(instance_type="a", zone="b")


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"v":"one"}', b'{"v":1}', b"[" * 100_000,
     b'{"v":1,"instance_type":1,"zone":"b"}'],
    ids=range(9),
)  # fmt: skip
def test_what_is_no_record_is_corrupt_and_named(data: bytes) -> None:
    with pytest.raises(CorruptObject, match=r"some/path.*restore it or remove the run"):
        decode(data, Pool, path="some/path")
    with pytest.raises(CorruptObject, match="some/path"):
        decode_event(data, path="some/path")


@given(st.binary())
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    for read in (lambda: decode(data, Progress, path="x"), lambda: decode_event(data, path="x")):
        with contextlib.suppress(CorruptObject, NewerFormat):
            read()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_comes_back(value: float) -> None:
    written = Progress(step=3, metrics={"loss": value, "accuracy": 0.5})
    read = decode(encode(written), Progress, path="x")
    assert read.step == 3
    assert read.metrics["accuracy"] == 0.5
    assert read.metrics["loss"] == value or (math.isnan(read.metrics["loss"]) and math.isnan(value))
    event = Succeeded(at=NOW, attempt=1, metrics={"loss": value})
    assert str(decode_event(encode_event(event, nonce="0a"), path="x")) == str(event)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    metrics = {
        "a": numpy.float64(0.5),
        "b": numpy.float32(0.25),
        "c": numpy.int64(3),
        "d": numpy.float32("nan"),
    }
    read = decode(encode(Progress(metrics=metrics)), Progress, path="x")
    assert (read.metrics["a"], read.metrics["b"], read.metrics["c"]) == (0.5, 0.25, 3)
    assert math.isnan(read.metrics["d"])


def test_output_that_is_no_text_does_not_stop_a_report() -> None:
    report = ExitReport(attempt=1, at=NOW, cause="script_failed", log_tail=("file \udcff",))
    assert decode(encode(report), ExitReport, path="x").log_tail == ("file ?",)


def test_what_is_no_json_is_refused_when_written() -> None:
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        encode(Progress(metrics={"loss": object()}))


def test_a_time_without_a_zone_is_refused() -> None:
    naive = datetime(2026, 1, 2)  # noqa: DTZ001
    with pytest.raises(ValueError, match=r"Created\.at.*without a time zone"):
        Created(at=naive)
    with pytest.raises(CorruptObject, match="without a time zone"):
        decode_event(b'{"v":1,"kind":"created","at":"2026-01-02T00:00:00"}', path="x")


def test_an_event_of_a_later_release_is_kept_and_does_not_stop_the_fold() -> None:
    data = b'{"v":1,"kind":"teleported","at":"2026-01-02T03:04:05Z","by":"me","to":{"zone":"x"}}'
    event = decode_event(data, path="x")
    assert isinstance(event, UnknownEvent)
    assert (event.at, event.by) == (NOW, "me")
    assert event.original == msgspec.json.decode(data)
    state = fold([Created(at=NOW), event, Created(at=NOW)])
    assert state.seq == 3


SECOND_THREAD = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
from spotfirst.wire import Record, decode

looking = threading.Event()

def slowly():
    looking.set()
    time.sleep(0.2)
    return int

class Inner(Record):
    number: "slowly()"

class Outer(Record):
    inner: "Inner"
    text: "str"

with ThreadPoolExecutor(2) as pool:
    def read():
        return decode(b'{"v":1,"inner":{"number":3},"text":"x"}', Outer, path="x")
    first = pool.submit(read)
    looking.wait()
    assert pool.submit(read).result() == first.result() == Outer(inner=Inner(number=3), text="x")
"""


def test_a_second_thread_may_read_a_record_while_the_first_still_looks_up_its_fields() -> None:
    """msgspec would crash, or wait for ever: therefore in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SECOND_THREAD],
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
