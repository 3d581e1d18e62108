"""A standby reads beforehand what will not change, and restores the same state as without."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spotfirst.checkpointer import Checkpointer, Drained, weights_sha256
from spotfirst.checkpoints import packs as packs_module
from spotfirst.checkpoints.claiming import READY_PATIENCE_S, wait_for_claim
from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.checkpoints.packs import Wanted
from spotfirst.checkpoints.prefetching import Prefetch
from spotfirst.errors import ObjectMissing
from spotfirst.run import Run
from spotfirst.storage import Storage
from tests.checkpointing.conftest import LONG_AGO
from tests.checkpointing.storages import faulty
from tests.checkpointing.training import attempt
from tests.waiting import PATIENCE_S


class FineTuned(torch.nn.Module):
    """A large frozen part, and a small one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.frozen = torch.nn.Parameter(torch.randn(600_000), requires_grad=False)
        self.adapter = torch.nn.Parameter(torch.zeros(1000))


def train(run: Run, folder: Path, number: int, *, steps: int) -> Checkpointer:
    """One attempt from wherever the run is, with a checkpoint after every step."""
    model = FineTuned()
    checkpointer = Checkpointer(model=model, context=attempt(run, number, folder))
    first = checkpointer.restore()
    for step in range(first, first + steps):
        with torch.no_grad():
            model.adapter += step + 1
        checkpointer.step(step + 1)
        checkpointer.save(wait=True)
    return checkpointer


def newest(run: Run) -> StateManifest:
    _, commit = run.chain().refresh().commits[-1]
    manifest = read_manifest(run.packs(), commit.manifest, commit.digest)
    assert isinstance(manifest, StateManifest)
    return manifest


def wanted(run: Run) -> list[Wanted]:
    manifest = newest(run)
    return [
        Wanted(manifest.packs[p.pack].name, p, memoryview(bytearray(p.size_bytes)))
        for array in manifest.arrays
        for shard in array.regions
        for p in shard.parts
    ]


def read_all(run: Run) -> Prefetch:
    prefetch = Prefetch(run)
    prefetch.start()
    prefetch._thread.join()
    return prefetch


def test_what_the_last_two_checkpoints_share_is_read_and_nothing_else(
    run: Run, tmp_path: Path
) -> None:
    train(run, tmp_path, 1, steps=3)
    prefetch = read_all(run)
    assert prefetch.ready
    # The frozen part and generators that nobody used, but not the adapter.
    assert 600_000 * 4 <= prefetch.size_bytes < 600_000 * 4 + 10_000
    missing = prefetch.take(wanted(run))
    assert 0 < sum(each.part.size_bytes for each in missing) < 50_000
    assert prefetch.size_bytes == 0


def test_of_a_first_checkpoint_all_is_read(run: Run, tmp_path: Path) -> None:
    train(run, tmp_path, 1, steps=1)
    assert read_all(run).take(wanted(run)) == []


def test_where_nobody_holds_the_run_nothing_is_read(run: Run) -> None:
    assert read_all(run).size_bytes == 0


def test_the_restored_state_is_the_same_and_no_byte_is_read_twice(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(run, tmp_path, 1, steps=3)
    reads: Counter[tuple[str, int]] = Counter()
    read_run = packs_module._read_run

    def counting(packs: Storage, wanted: list[Wanted]) -> int:
        reads.update((each.pack, each.part.offset) for each in wanted)
        return read_run(packs, wanted)

    def hand_over(run: Run, number: int, handover: object) -> None:
        """The holder lets go as soon as it is asked."""
        assert number == 1
        assert first._saver is not None
        first._saver.release()

    monkeypatch.setattr(packs_module, "_read_run", counting)
    monkeypatch.setattr(Run, "request_handover", hand_over)
    model = FineTuned()
    with torch.no_grad():
        model.frozen.zero_()
    assert Checkpointer(model=model, context=attempt(run, 2, tmp_path)).restore() == 3
    before = first._objects["model"]
    assert isinstance(before, FineTuned)
    assert weights_sha256(model) == weights_sha256(before)
    assert max(reads.values()) == 1


def test_a_release_in_the_middle_ends_the_reading(run: Run, tmp_path: Path) -> None:
    train(run, tmp_path, 1, steps=2)
    entered, go_on = threading.Event(), threading.Event()

    def before(name: str, path: str) -> None:
        if threading.current_thread().name.startswith("spotfirst-read"):
            entered.set()
            go_on.wait(PATIENCE_S)

    prefetch = Prefetch(Run(faulty(run.root, before=before), run.run_id))
    prefetch.start()
    assert entered.wait(PATIENCE_S)
    assert not prefetch.ready
    go_on.set()
    prefetch.stop()
    assert prefetch.ready


def test_a_pack_that_is_gone_or_damaged_is_left_to_the_restore(run: Run, tmp_path: Path) -> None:
    train(run, tmp_path, 1, steps=2)
    packs = run.packs()
    for pack in newest(run).packs:
        packs.write(pack.name, b"\0" * pack.size_bytes)
    prefetch = read_all(run)
    assert prefetch.size_bytes == 0
    assert len(prefetch.take(wanted(run))) == len(wanted(run))


def test_the_holder_is_asked_only_once_all_is_read(run: Run) -> None:
    run.chain().refresh().claim(1)
    now_s, asked_at, ready_at = [0.0], [-1.0], [40.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds
        if asked_at[0] < 0 and run.handover(1) is not None:
            asked_at[0] = now_s[0]

    def claim(is_ready: Callable[[], bool]) -> bool:
        return wait_for_claim(
            run, run.chain(), 2, is_ready=is_ready, monotonic=lambda: now_s[0], sleep=sleep,
            clock=lambda: LONG_AGO,
        )  # fmt: skip

    assert claim(lambda: now_s[0] >= ready_at[0])
    assert 40.0 <= asked_at[0] < 41.0 < READY_PATIENCE_S


def test_a_handover_of_a_fenced_standby_stops_its_reading(run: Run, tmp_path: Path) -> None:
    train(run, tmp_path, 1, steps=2)
    context = attempt(run, 2, tmp_path)
    assert context.channel is not None
    checkpointer = Checkpointer(model=FineTuned(), context=context)
    checkpointer._channel = type(
        "Asked", (), {"drain": lambda self: LONG_AGO, "tell": lambda self, p: None}
    )()  # type: ignore[assignment]
    with pytest.raises(Drained):
        checkpointer.restore()
    assert not any(t.name == "spotfirst-prefetch" for t in threading.enumerate())


def test_missing_objects_are_no_error_of_the_standby(run: Run, tmp_path: Path) -> None:
    train(run, tmp_path, 1, steps=2)

    gone = run.chain().refresh().commits[-1][1].manifest

    def before(name: str, path: str) -> None:
        if gone.endswith(path.rpartition("/")[2]) and name.startswith("read"):
            raise ObjectMissing(path)

    prefetch = read_all(Run(faulty(run.root, before=before), run.run_id))
    assert prefetch.ready
    assert prefetch.size_bytes == 0
