"""What other processes wrote is bounded: numbers, times, texts, and the size of an object."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spotfirst import events as e
from spotfirst.channel import Channel
from spotfirst.checkpoints.chain import CheckpointChain, Commit
from spotfirst.errors import CorruptObject, FormatError, InvalidSpec, ObjectMissing
from spotfirst.heartbeat import ExitReport, Heartbeat, Progress, clipped
from spotfirst.market import Notice, Pool
from spotfirst.run import SEGMENT_LIMIT_BYTES, Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.state import fold
from spotfirst.steptimes import StepTimes
from spotfirst.storage import Storage, open_storage
from spotfirst.wire import LIMIT_BYTES, decode, encode, plausible
from spotfirst_airflow.costs import bill, promised_usd

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
POOL = Pool(instance_type="g6.xlarge", zone="a")
LAUNCHED = e.Launched(
    at=NOW, attempt=1, instance_id="i", started_at=NOW, price_usd_h=Decimal(1), price_source="",
    price_at=NOW, on_demand_usd_h=Decimal(2), read_usd_gb=Decimal(1), write_usd_gb=Decimal(1),
)  # fmt: skip
ENDED = e.Ended(
    at=NOW, attempt=1, cause="completed", ended_at=NOW, start_step=1, step=2, checkpoint_step=2,
    training_s=1.0, startup_s=1.0, moved_bytes=1, restored_bytes=1, written_bytes=1,
    step_times=StepTimes(count=2, mean_s=1.0, spread_s=1.0), price_timeline=((NOW, Decimal(1)),),
)  # fmt: skip
LAUNCHING = e.Launching(at=NOW, attempt=1, token="t", market="spot", pool=POOL, reason="")  # type: ignore[arg-type]
ODD_AMOUNTS = ["NaN", "sNaN", "Infinity", "-Infinity", "-5", "-1E-9", "1E+6000", "1E+999999999"]
ODD_NUMBERS = ["NaN", "Infinity", -1, -0.5, 1e300, 10**30, 10**400]


def odd(record: Any, *path: str, value: object) -> bytes:
    fields = json.loads(encode(record))
    inner = fields
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner[path[-1]] = value
    return json.dumps(fields).encode()


@pytest.mark.parametrize("name", ["price_usd_h", "on_demand_usd_h", "read_usd_gb", "write_usd_gb"])
@pytest.mark.parametrize("value", ODD_AMOUNTS)
def test_an_amount_that_is_none_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(CorruptObject, match=rf"s3://b/x .*{name} is"):
        decode(odd(LAUNCHED, name, value=value), e.Launched, path="s3://b/x")


@pytest.mark.parametrize("value", ODD_NUMBERS)
@pytest.mark.parametrize(
    "name",
    ["attempt", "start_step", "step", "checkpoint_step", "training_s", "startup_s", "moved_bytes",
     "restored_bytes", "written_bytes", "step_times.mean_s", "step_times.count"],
)  # fmt: skip
def test_a_number_that_no_attempt_can_have_is_refused(name: str, value: object) -> None:
    with pytest.raises(CorruptObject, match="x is not"):
        decode(odd(ENDED, *name.split("."), value=value), e.Ended, path="x")


@pytest.mark.parametrize("value", ["NaN", "-1", "1E+99"])
def test_a_price_of_a_timeline_is_refused_like_any_other(value: str) -> None:
    timeline = [[NOW.isoformat(), "1"], [NOW.isoformat(), value]]
    with pytest.raises(CorruptObject, match="price_timeline"):
        decode(odd(ENDED, "price_timeline", value=timeline), e.Ended, path="x")


@pytest.mark.parametrize("rate", [0, -1, 1e9, "NaN"])
def test_a_clock_that_stands_still_or_races_is_refused(rate: object) -> None:
    with pytest.raises(CorruptObject, match="clock_rate"):
        decode(odd(LAUNCHED, "clock_rate", value=rate), e.Launched, path="x")


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59Z"])
def test_a_time_of_no_known_century_is_refused(time: str) -> None:
    notice = e.Noticed(at=NOW, attempt=1, notice=Notice(kind="interruption", seen_at=NOW, time=NOW))
    with pytest.raises(CorruptObject, match=r"notice\.time"):
        decode(odd(notice, "notice", "time", value=time), e.Noticed, path="x")


def test_a_metric_may_be_any_number_and_an_exit_code_negative() -> None:
    metrics = {"loss": float("inf"), "reward": -1e300, "score": -3.0}
    assert decode(encode(Progress(metrics=metrics)), Progress, path="x").metrics == metrics
    ended = e.Ended(at=NOW, attempt=1, cause="killed", ended_at=NOW, exit_code=-9)
    assert decode(encode(ended), e.Ended, path="x") == ended


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_is_accepted_can_be_billed(data: st.DataObject) -> None:
    """No sum of accepted numbers overflows, is no number, or is below 0."""
    amounts = st.decimals(allow_nan=True) | st.sampled_from([Decimal(10**9), Decimal("1E-30")])
    numbers = st.floats() | st.sampled_from([1e10, 1e6, 5e-324])
    counts = st.integers(-1, 10**15)
    times = st.sampled_from([f"{year}-01-01T00:00:00Z" for year in (1, 2000, 2026, 2300, 9999)])
    launched, ended = json.loads(encode(LAUNCHED)), json.loads(encode(ENDED))
    for fields in (launched, ended):
        for name in list(fields):
            if name.endswith(("usd_h", "usd_gb")):
                fields[name] = str(data.draw(amounts))
            elif name.endswith("_s") or name == "clock_rate":
                fields[name] = (
                    str(data.draw(numbers)).replace("inf", "Infinity").replace("nan", "NaN")
                )
            elif name.endswith(("_bytes", "step")):
                fields[name] = data.draw(counts)
            elif name.endswith("_at"):
                fields[name] = data.draw(times)
    ended["price_timeline"] = [[data.draw(times), str(data.draw(amounts))] for _ in range(2)]
    ended["kept_until"] = data.draw(times)
    try:
        events = [
            LAUNCHING,
            decode(json.dumps(launched).encode(), e.Launched, path="x"),
            decode(json.dumps(ended).encode(), e.Ended, path="x"),
        ]
    except CorruptObject:
        return
    state = fold(events)
    for frozen in (True, False):
        account = bill(state, now=NOW, frozen_prices=frozen)
        assert account.total_usd >= 0
        assert account.on_demand_usd >= 0
    assert promised_usd(state, now=NOW).is_finite()


@pytest.fixture
def storage(tmp_path: Any) -> Storage:
    return open_storage(str(tmp_path / "store"))


@pytest.fixture
def run(storage: Storage) -> Run:
    return create_run(storage, RunSpec(run_id="r", created_at=NOW, command=("true",)))


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_a_larger_object_than_the_limit_is_refused_by_its_url(
    kind: str, request: pytest.FixtureRequest
) -> None:
    urls = {"memory": "memory://limits"}
    fixture = {"local": "tmp_path", "s3": "s3_url"}.get(kind, "tmp_path")
    storage = open_storage(urls.get(kind) or str(request.getfixturevalue(fixture)))
    storage.write("empty", b"")
    assert storage.read("empty", limit_bytes=5) == b""
    assert storage.read_many(["empty"], limit_bytes=5) == {"empty": b""}
    assert storage.read_tail("empty", 5) == b""
    assert storage.read_or_none("none", limit_bytes=5) is None
    with pytest.raises(ObjectMissing):
        storage.read_many(["none"], limit_bytes=5)
    storage.write("a", b"12345")
    assert storage.read("a", limit_bytes=5) == b"12345"
    assert storage.read_many(["a"], limit_bytes=5) == {"a": b"12345"}
    assert storage.read_tail("a", 2) == b"45"
    assert storage.read_tail("a", 9) == b"12345"
    for read in (storage.read, storage.read_or_none):
        with pytest.raises(CorruptObject, match=f"{storage.url}/a has more than 4 bytes"):
            read("a", limit_bytes=4)
    with pytest.raises(CorruptObject, match=f"{storage.url}/a has more than 4 bytes"):
        storage.read_many(["a"], limit_bytes=4)


CLAIMS = {
    "a heartbeat of 100 MB": ("heartbeat.json", b" " * 10**8, "more than"),
    "a heartbeat of garbage": ("heartbeat.json", b"\xff\xfe", "not JSON"),
    "a heartbeat of the wrong types": ("heartbeat.json", b'{"v":1,"attempt":"one"}', "not a valid"),
    "a heartbeat of a newer format": ("heartbeat.json", b'{"v":99}', "format 99"),
    "a report of the end of 100 MB": ("exit.json", b" " * 10**8, "more than"),
    "a report of the end with odd numbers": (
        "exit.json",
        odd(ExitReport(attempt=1, at=NOW, cause="lost"), "progress", value={"step": -1}),
        "step is -1",
    ),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_what_an_attempt_claims_and_cannot_be_read_counts_as_none_and_is_told(
    run: Run, name: str
) -> None:
    file, data, said = CLAIMS[name]
    run.storage.write(run.attempt_path(1, file), data)
    told: list[str] = []
    read = run.heartbeat if file == "heartbeat.json" else run.exit_report
    assert read(1, warn=told.append) is None
    [text] = told
    assert said in text
    assert f"{run.url}/attempts/1/{file}" in text


def test_a_handover_that_cannot_be_read_is_named_by_its_url(run: Run) -> None:
    run.storage.write(run.attempt_path(1, "handover.json"), b" " * (LIMIT_BYTES + 1))
    with pytest.raises(CorruptObject, match=f"{run.url}/attempts/1/handover.json"):
        run.handover(1)


def test_a_piece_of_output_of_any_size_is_read_to_its_bound(run: Run) -> None:
    run.storage.write(run.log_path(1, 1), b"x" * (SEGMENT_LIMIT_BYTES * 3))
    text = run.log_segment(1, 1)
    assert text is not None
    assert len(text) < SEGMENT_LIMIT_BYTES + 500
    assert "left out" in text
    run.storage.write(run.log_path(1, 2), b"y" * SEGMENT_LIMIT_BYTES)
    assert run.log_segment(1, 2) == "y" * SEGMENT_LIMIT_BYTES
    assert run.log_segment(1, 3) is None


@pytest.mark.parametrize("data", [b"{", b"[]", b" " * (LIMIT_BYTES + 1), b'{"v":99}'])
def test_errors_name_the_whole_url_of_the_object(run: Run, data: bytes) -> None:
    for storage, path, read in (
        (run.storage, "checkpoints/00000001.json", lambda: run.chain().refresh()),
        (run.control, "journal/00000001.json", lambda: run.journal().refresh()),
        (run.control, "amendments/00000001.json", run.spec),
        (run.control, "spec.json", run.original_spec),
    ):
        storage.write(path, data)
        with pytest.raises(FormatError, match=f"{storage.url}/{path}"):
            read()


def test_a_chain_entry_with_odd_numbers_is_refused() -> None:
    fields = {"attempt": 1, "at": NOW, "nonce": "0a", "manifest": "m", "digest": "d"}
    entry = Commit(step=1, content="state", **fields)  # type: ignore[arg-type]
    storage = open_storage("memory://odd-chain")
    storage.write("checkpoints/00000001.json", odd(entry, "step", value=-3))
    with pytest.raises(CorruptObject, match=r"memory://odd-chain/checkpoints/00000001.json"):
        CheckpointChain(storage).refresh()


def test_an_event_or_a_spec_too_large_for_readers_is_not_written(run: Run) -> None:
    journal = run.journal()
    with pytest.raises(InvalidSpec, match="shorten"):
        journal.append(e.Warned(at=NOW, message="x" * (LIMIT_BYTES + 1)))
    assert run.journal().refresh().seq == journal.state.seq
    spec = RunSpec(run_id="large", created_at=NOW, command=("x" * LIMIT_BYTES,))
    with pytest.raises(InvalidSpec, match="readers take"):
        create_run(run.root, spec)


def test_an_agent_sends_what_is_plausible_and_leaves_out_the_rest() -> None:
    told = Progress(
        step=-1, total_steps=10, checkpoint_s=float("nan"), drain_s=-2.0,
        step_times=StepTimes(count=3, mean_s=float("inf")), metrics={"loss": float("nan")},
    )  # fmt: skip
    sent = plausible(told)
    assert (sent.step, sent.total_steps, sent.checkpoint_s, sent.step_times) == (
        None,
        10,
        None,
        None,
    )
    assert "loss" in sent.metrics
    read = decode(encode(sent), Progress, path="x")
    assert read.total_steps == 10
    assert plausible(read) == read


def test_texts_and_metrics_of_any_length_fit_into_a_heartbeat() -> None:
    progress = Progress(
        metrics={f"{number}-{'m' * 5000}": 1.0 for number in range(3000)},
        warnings=tuple(f"{number}-{'w' * 10**5}" for number in range(100)),
    )
    beat = clipped(Heartbeat(attempt=1, beat=1, at=NOW, phase="training", progress=progress))
    assert len(encode(beat)) < LIMIT_BYTES
    assert beat.progress.warnings[-1].startswith("99-")
    report = ExitReport(
        attempt=1, at=NOW, cause="lost", message="x" * 10**7, log_tail=("y" * 10**7,) * 99,
        progress=progress,
    )  # fmt: skip
    assert len(encode(clipped(report))) < LIMIT_BYTES


def test_a_huge_progress_of_the_script_is_not_read(tmp_path: Any, caplog: Any) -> None:
    caplog.set_level(logging.ERROR)
    channel = Channel(tmp_path)
    (tmp_path / "progress.json").write_bytes(b" " * (LIMIT_BYTES + 10) + encode(Progress(step=1)))
    assert channel.progress() is None
