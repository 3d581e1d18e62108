from __future__ import annotations

import hashlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spotfirst.checkpointer import Checkpointer, weights_sha256
from spotfirst.checkpoints import snapshot as snapshot_module
from spotfirst.checkpoints.memory import Arena, Lending
from spotfirst.checkpoints.packs import PackWriter
from spotfirst.checkpoints.retention import Retention
from spotfirst.checkpoints.snapshot import Torn, settled_until_step
from spotfirst.checkpoints.weights import state_digest
from spotfirst.errors import UnsupportedState
from spotfirst.run import Run
from spotfirst.storage import Storage
from tests.checkpointing.states import load, same, save, snapshot, store
from tests.checkpointing.storages import faulty
from tests.checkpointing.training import attempt, progress
from tests.waiting import PATIENCE_S

WIDE = 300  # a Linear of this width is large enough to be copied lazily


class Training:
    """A model with everything that changes at different times."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(WIDE, WIDE), torch.nn.BatchNorm1d(WIDE), torch.nn.Linear(WIDE, WIDE),
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.train()

    def forward_and_backward(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, WIDE)).square().mean().backward()

    def train(self) -> None:
        self.forward_and_backward()
        self.optimizer.step()

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    @property
    def settled(self) -> frozenset[int]:
        return settled_until_step([self.model, self.optimizer])


@pytest.fixture
def training() -> Training:
    return Training()


# -- lazy -----------------------------------------------------------------------------------


def test_a_lazy_copy_is_that_of_the_moment_it_was_taken(packs: Storage, training: Training) -> None:
    eager = save(packs, training.state)
    lazy = snapshot(training.state, settled=training.settled)
    assert not lazy.is_copied
    for _ in range(3):
        training.forward_and_backward()  # changes BatchNorm's buffers, and the gradients
    commit = store(packs, lazy)
    assert lazy.is_copied
    assert same(load(packs, commit), load(packs, eager))


def test_training_beside_the_saves_changes_no_bit_of_them(run: Run, tmp_path: Path) -> None:
    """The copy runs on its own thread while forward and backward passes go on."""
    training = Training()
    checkpointer = Checkpointer(
        model=training.model, optimizer=training.optimizer, period_s=0,
        context=attempt(run, 1, tmp_path), retention=Retention(last=None),
    )  # fmt: skip
    expected: dict[int, str] = {0: ""}
    for step in checkpointer.steps(25):
        training.train()
        expected[step + 1] = weights_sha256(training.model)
    commits = run.chain().refresh().commits
    assert len(commits) > 3
    for _, commit in commits:
        assert state_digest(run.packs(), commit) == expected[commit.step]
    assert not any("copied at once" in w for w in progress(attempt(run, 1, tmp_path)).warnings)


def test_optimizer_step_waits_for_the_copy(run: Run, tmp_path: Path) -> None:
    training = Training()
    gate, entered = threading.Event(), threading.Event()
    checkpointer = Checkpointer(
        model=training.model, optimizer=training.optimizer, context=attempt(run, 1, tmp_path)
    )
    checkpointer.restore()
    checkpointer.step(1)
    populate = Arena.populate

    def held_up(arena: Arena, end: int) -> None:
        entered.set()
        assert gate.wait(PATIENCE_S)
        populate(arena, end)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Arena, "populate", held_up)
        saved = weights_sha256(training.model)
        weight = training.model[0].weight
        before = weight.detach().clone()
        assert checkpointer.save(wait=False)
        assert entered.wait(PATIENCE_S)
        training.forward_and_backward()
        stepping = threading.Thread(target=training.optimizer.step)
        stepping.start()
        time.sleep(0.05)
        assert stepping.is_alive()
        assert torch.equal(weight, before)
        gate.set()
        stepping.join(20)
    assert not torch.equal(weight, before)
    assert checkpointer._saver is not None
    assert checkpointer._saver.finish() is None
    ((_, commit),) = run.chain().refresh().commits
    assert state_digest(run.packs(), commit) == saved


def _in_place(training: Training) -> None:
    with torch.no_grad():
        training.model[0].weight.add_(1)


def _first_element(training: Training) -> None:
    with torch.no_grad():
        training.model[2].weight[7, 7] = 9.0


def _of_the_optimizer(training: Training) -> None:
    training.optimizer.state[training.model[0].weight]["exp_avg"].mul_(2)


def _through_data(training: Training) -> None:
    training.model[0].weight.data.add_(1)


CHANGES = [_in_place, _first_element, _of_the_optimizer, _through_data]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_before_optimizer_step_tears_the_copy(
    packs: Storage, training: Training, change: Callable[[Training], None]
) -> None:
    taken = snapshot(training.state, settled=training.settled)
    change(training)
    with pytest.raises(Torn):
        store(packs, taken)
    assert taken.is_copied  # nobody waits for it


@pytest.mark.parametrize("change", CHANGES)
def test_a_torn_copy_is_not_committed_and_the_next_one_is_eager(
    run: Run, tmp_path: Path, change: Callable[[Training], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    training, context = Training(), attempt(run, 1, tmp_path)
    checkpointer = Checkpointer(
        model=training.model, optimizer=training.optimizer, period_s=0, context=context
    )
    checkpointer.restore()
    populate = Arena.populate
    changed = threading.Event()

    def after_the_change(arena: Arena, end: int) -> None:
        assert changed.wait(PATIENCE_S)
        populate(arena, end)

    monkeypatch.setattr(Arena, "populate", after_the_change)
    checkpointer.step(1)
    change(training)
    changed.set()
    assert checkpointer._saver is not None
    assert isinstance(checkpointer._saver.finish(), Torn)
    assert run.chain().refresh().commits == []
    assert list(run.packs().walk("")) == []
    (warning,) = progress(context).warnings
    assert "copied at once from now on" in warning
    changed.clear()
    expected = weights_sha256(training.model)
    checkpointer.step(2)
    change(training)
    changed.set()
    assert checkpointer._saver.finish() is None
    ((_, commit),) = run.chain().refresh().commits
    assert (commit.step, state_digest(run.packs(), commit)) == (2, expected)


def test_torn_copies_leave_the_writers_at_work(run: Run, tmp_path: Path) -> None:
    training = Training()
    checkpointer = Checkpointer(
        model=training.model, optimizer=training.optimizer, context=attempt(run, 1, tmp_path)
    )
    checkpointer.restore()
    saver = checkpointer._saver
    assert saver is not None
    for step in range(1, 9):
        checkpointer.step(step)
        taken = checkpointer._snapshot(step)
        blocks = taken.blocks

        def torn(blocks: Callable[[], Iterator[Any]] = blocks) -> Iterator[Any]:
            yield from blocks()
            raise Torn

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(taken, "blocks", torn)
            saver.start(taken)
            assert isinstance(saver.finish(20), Torn)
    assert checkpointer.save()
    assert [commit.step for _, commit in run.chain().refresh().commits] == [8]


# -- in place -------------------------------------------------------------------------------


@pytest.fixture
def large() -> dict[str, torch.Tensor]:
    """Arrays of two packs and a bit, of one chunk, and of little."""
    sizes = {"two packs": (130 << 20) // 4, "a chunk": (9 << 20) // 4, "little": 1000}
    return {name: torch.randn(size) for name, size in sizes.items()}


def test_while_the_training_waits_large_arrays_are_stored_from_where_they_are(
    packs: Storage, large: dict[str, torch.Tensor]
) -> None:
    arena = Arena()
    taken = snapshot(large, arena=arena, in_place=True)
    from_where_it_is = sum(
        len(block.memory) for block in taken.blocks() if block.memory.obj is not arena._block._map
    )
    assert from_where_it_is == sum(large[n].nbytes for n in ("two packs", "a chunk"))
    assert arena.size_bytes <= 2 << 20
    assert taken.size_bytes >= sum(each.nbytes for each in large.values())
    commit = store(packs, snapshot(large, in_place=True))
    assert same(load(packs, commit), large)


def test_what_is_stored_in_place_has_the_same_chunks_as_what_is_copied(
    packs: Storage, large: dict[str, torch.Tensor]
) -> None:
    before = save(packs, large)
    large["a chunk"] += 1
    after = store(packs, snapshot(large, in_place=True), before=before)
    assert after.new_bytes == large["a chunk"].nbytes
    assert same(load(packs, after), large)


def test_only_a_storage_that_is_no_disk_is_stored_to_in_place(tmp_path: Path) -> None:
    training = Training()
    for place, in_place in (("memory://in-place", True), (str(tmp_path), False)):
        checkpointer = Checkpointer(model=training.model, storage=place)
        checkpointer.restore()
        assert checkpointer._saver is not None
        assert checkpointer._saver.stores_in_place == in_place


@pytest.mark.parametrize("through_data", [False, True])
def test_a_change_of_what_is_stored_in_place_is_not_committed(
    run: Run, tmp_path: Path, through_data: bool
) -> None:
    """It takes another thread: the one that trains is waiting."""
    weight = torch.nn.Parameter(torch.randn(3 << 20))
    model = torch.nn.ParameterList([weight])
    context = attempt(run, 1, tmp_path)
    checkpointer = Checkpointer(model=model, context=context)
    checkpointer.restore()
    checkpointer.step(1)
    close = PackWriter.close

    def change(writer: PackWriter) -> Any:
        with torch.no_grad():
            (weight.data if through_data else weight)[0] += 1
        return close(writer)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PackWriter, "close", change)
        with pytest.raises(Torn):
            checkpointer.save()
    assert run.chain().refresh().commits == []
    assert [name for name, _ in run.packs().walk("") if not name.endswith(".json")] == []
    assert checkpointer.save()
    ((_, saved),) = run.chain().refresh().commits
    assert state_digest(run.packs(), saved) == weights_sha256(model)


# -- what is copied at once -------------------------------------------------------------------


def test_buffers_and_small_tensors_are_copied_at_once(packs: Storage, training: Training) -> None:
    taken = snapshot(training.state, settled=training.settled)
    expected = {
        name: value.clone()
        for name, value in training.model.state_dict().items()
        if name.startswith("1.") or name.endswith("bias")
    }
    with torch.no_grad():
        for name, value in training.model.state_dict().items():
            if name in expected:
                value.fill_(5)
    loaded = load(packs, store(packs, taken))["model"]
    assert expected
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name


def test_nothing_is_settled_without_an_optimizer(training: Training) -> None:
    assert settled_until_step([training.model]) == frozenset()
    assert snapshot(training.state).is_copied


def test_a_copy_that_nobody_steps_is_not_settled(training: Training) -> None:
    average = Training().model
    settled = settled_until_step([training.model, average, training.optimizer])
    assert training.model[0].weight.data_ptr() in settled
    assert average[0].weight.data_ptr() not in settled


def test_a_frozen_backbone_is_settled_and_its_buffers_are_not(training: Training) -> None:
    head = training.model[2]
    settled = settled_until_step([training.model, torch.optim.SGD(head.parameters(), lr=0.1)])
    assert training.model[0].weight.data_ptr() in settled
    assert training.model[1].running_mean.data_ptr() not in settled


def test_a_parameter_that_shares_memory_with_a_buffer_is_not_settled(training: Training) -> None:
    training.model.register_buffer("alias", training.model[0].weight.detach())
    assert training.model[0].weight.data_ptr() not in training.settled


# -- every kind of tensor ---------------------------------------------------------------------


def _odd_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    wide = torch.randn(WIDE, WIDE)
    wave = torch.randn(WIDE, WIDE, dtype=torch.complex64)
    bits = torch.tensor(
        [0x7FC00001, 0x7F800000, -0x800000, 0x7F800001, -0x400000], dtype=torch.int64
    )
    nan = bits.to(torch.int32).view(torch.float32)
    return {
        "transposed": wide.t(), "strided": wide[::2, 1::3], "expanded": wide[:1].expand(WIDE, WIDE),
        "conj": wave.conj(), "complex": wave, "negative": wave.conj().imag, "tied": wide.t(),
        "empty": torch.empty(0, 3), "scalar": torch.tensor(3.5), "nan": nan,
        "nan32k": nan.repeat(80_000), "flags": wide > 0, "bfloat16": wide.bfloat16(),
        "float8": wide.to(torch.float8_e4m3fn), "int64": wide.long(), "wide": wide,
    }  # fmt: skip


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("memory_bytes", [None, 1])
def test_every_kind_of_tensor_is_kept_bit_for_bit(
    packs: Storage, lazy: bool, memory_bytes: int | None
) -> None:
    state = _odd_tensors()
    settled = frozenset(v.untyped_storage().data_ptr() for v in state.values()) if lazy else None
    commit = save(packs, state, settled=settled or frozenset(), memory_bytes=memory_bytes)
    loaded = load(packs, commit)
    for name, value in state.items():
        assert same(loaded[name], value.resolve_conj().resolve_neg().contiguous()), name
    assert loaded["tied"] is loaded["transposed"]


@given(
    sizes=st.lists(st.integers(0, 70), max_size=12),
    memory_bytes=st.none() | st.integers(1, 200),
    lazy=st.booleans(),
)
def test_whatever_the_sizes_every_byte_arrives(
    sizes: list[int], memory_bytes: int | None, lazy: bool
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        for module in ("snapshot", "packs"):
            patched.setattr(f"spotfirst.checkpoints.{module}.CHUNK_BYTES", 16)
            patched.setattr(f"spotfirst.checkpoints.{module}.PACK_BYTES", 40)
        patched.setattr(snapshot_module, "_LAZY_FROM_BYTES", 8)
        patched.setattr(snapshot_module, "_SAMPLE_BYTES", 2)
        patched.setattr(snapshot_module, "ALIGNMENT", 8)
        state = [
            torch.arange(size, dtype=torch.uint8) + number for number, size in enumerate(sizes)
        ]
        settled = frozenset(value.data_ptr() for value in state) if lazy else frozenset()
        taken = snapshot(state, settled=settled, memory_bytes=memory_bytes)
        copied = [bytearray(leaf.size_bytes) for leaf in taken.leaves]
        filled = [0] * len(copied)
        for block in taken.blocks():
            for leaf, (start, size) in zip(block.leaves, block.cuts, strict=True):
                copied[leaf][filled[leaf] : filled[leaf] + size] = block.memory[
                    start : start + size
                ]
                filled[leaf] += size
            block.free()
        assert copied == [bytearray(leaf.value.numpy().tobytes()) for leaf in taken.leaves]


def _quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (_quantised, "qint8"),
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse_csr"),
        (lambda: torch.empty(2, device="meta"), "meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_is_no_plain_tensor_is_refused_by_name_before_training(
    run: Run, tmp_path: Path, make: Callable[[], torch.Tensor], named: str
) -> None:
    class Holder:
        def state_dict(self) -> dict[str, Any]:
            return {"odd": make()}

        def load_state_dict(self, _: Any) -> None: ...

    checkpointer = Checkpointer(holder=Holder(), context=attempt(run, 1, tmp_path))
    with pytest.raises(UnsupportedState, match=rf"holder\['odd'\] is a tensor.*{named}"):
        checkpointer.restore()


def test_ten_thousand_small_tensors_take_a_few_calls(packs: Storage) -> None:
    state = {f"t{number}": torch.full((3,), float(number)) for number in range(10_000)}
    calls: list[str] = []
    watched = faulty(packs, before=lambda verb, path: calls.append(verb))
    start_s = time.process_time()
    commit = save(watched, state)
    assert same(load(watched, commit), state)
    assert time.process_time() - start_s < 10
    assert len(calls) < 10


# -- memory -----------------------------------------------------------------------------------


def test_a_state_larger_than_its_memory_is_saved_piece_by_piece_while_training_waits(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("snapshot", "packs"):
        monkeypatch.setattr(f"spotfirst.checkpoints.{module}.CHUNK_BYTES", 1 << 18)
        monkeypatch.setattr(f"spotfirst.checkpoints.{module}.PACK_BYTES", 1 << 20)
    model = torch.nn.ModuleList(torch.nn.Linear(600, 600) for _ in range(6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    context = attempt(run, 1, tmp_path)
    checkpointer = Checkpointer(
        model=model, optimizer=optimizer, context=context, memory_bytes=1 << 20
    )
    checkpointer.restore()
    checkpointer.step(1)
    expected = weights_sha256(model)
    assert checkpointer.save(wait=False)
    with torch.no_grad():  # at once: it waited until everything was copied
        for parameter in model.parameters():
            parameter.data.zero_()
    assert checkpointer._saver is not None
    assert checkpointer._saver.finish() is None
    ((_, commit),) = run.chain().refresh().commits
    assert state_digest(run.packs(), commit) == expected
    assert checkpointer._arena.size_bytes <= 2 << 20
    assert any("training waits" in warning for warning in progress(context).warnings)


def test_the_memory_is_kept_from_one_checkpoint_to_the_next(run: Run, tmp_path: Path) -> None:
    training = Training()
    checkpointer = Checkpointer(
        model=training.model, optimizer=training.optimizer, context=attempt(run, 1, tmp_path)
    )
    checkpointer.restore()
    addresses = set()
    for step in range(1, 4):
        training.train()
        checkpointer.step(step)
        checkpointer.save()
        addresses.add(checkpointer._arena.fit(1).address)
    assert len(addresses) == 1


def _ten_packs(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    for module in ("snapshot", "packs"):
        monkeypatch.setattr(f"spotfirst.checkpoints.{module}.CHUNK_BYTES", 1 << 20)
        monkeypatch.setattr(f"spotfirst.checkpoints.{module}.PACK_BYTES", 4 << 20)
    return {f"t{number}": torch.full((1 << 20,), float(number)) for number in range(10)}


def _settled(state: dict[str, torch.Tensor]) -> frozenset[int]:
    return frozenset(value.untyped_storage().data_ptr() for value in state.values())


def test_memory_is_lent_again_while_the_copy_is_in_time(
    packs: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, arena = _ten_packs(monkeypatch), Arena()
    arena.prepare(42 << 20, ready_bytes=8 << 20)
    arena.populate(8 << 20)
    taken = snapshot(
        state, settled=_settled(state), arena=arena, changes_in_s=60.0, monotonic=lambda: 0.1
    )
    commit = store(packs, taken)
    assert arena.populated_bytes == 8 << 20
    assert same(load(packs, commit), state)


def test_a_copy_that_would_be_late_takes_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    state, arena = _ten_packs(monkeypatch), Arena()
    now = 0.0
    taken = snapshot(
        state, settled=_settled(state), arena=arena, changes_in_s=60.0, monotonic=lambda: now
    )
    copied = []
    for block in taken.blocks():
        copied.append(block)  # the storage stores nothing
        now += 30.0
    assert sum(size for block in copied for _, size in block.cuts) == 40 << 20
    assert arena.populated_bytes >= 40 << 20


def test_a_copy_that_is_early_waits_for_memory_to_be_free(monkeypatch: pytest.MonkeyPatch) -> None:
    state, arena = _ten_packs(monkeypatch), Arena()
    arena.prepare(42 << 20, ready_bytes=8 << 20)
    arena.populate(8 << 20)
    now = 0.0
    taken = snapshot(
        state, settled=_settled(state), arena=arena, changes_in_s=6000.0, monotonic=lambda: now
    )
    copied: list[Any] = []

    def copy() -> None:
        for block in taken.blocks():
            copied.append(block)  # noqa: PERF402 - while the other thread looks at it

    copying = threading.Thread(target=copy)
    now = 0.1
    copying.start()
    freed = 0
    deadline = time.monotonic() + 120
    while copying.is_alive() and time.monotonic() < deadline:
        assert arena.populated_bytes == 8 << 20
        while freed < len(copied):
            copied[freed].free()
            freed += 1
        time.sleep(0.001)
    copying.join(1)
    assert taken.is_copied


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), max_size=40))
def test_no_byte_is_lent_twice_and_all_come_back(asked: list[tuple[int, int]]) -> None:
    lending = Lending(3, 203)
    lent: list[tuple[int, int]] = []
    for size, keep in asked:
        while len(lent) > keep:
            lending.give_back(*lent.pop(0))
        start = lending.take(size, lambda: (203, None))
        assert 3 <= start <= 203 - size
        assert all(start + size <= at or at + length <= start for at, length in lent)
        lent.append((start, size))
    for each in lent:
        lending.give_back(*each)
    assert lending.take(200, lambda: (203, None)) == 3


class _Rows(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((WIDE,), float(index) / 24)


def test_dataloader_workers_that_are_forked_beside_a_save_do_no_harm(
    run: Run, tmp_path: Path
) -> None:
    training = Training()
    checkpointer = Checkpointer(
        model=training.model, optimizer=training.optimizer, period_s=0,
        context=attempt(run, 1, tmp_path), retention=Retention(last=None),
    )  # fmt: skip
    expected = {}
    steps = checkpointer.steps(6)
    for step in steps:
        loader = torch.utils.data.DataLoader(  # a new pair of processes in each step
            _Rows(), batch_size=12, num_workers=1, multiprocessing_context="fork"
        )
        for batch in loader:
            training.optimizer.zero_grad()
            training.model(batch).square().mean().backward()
        training.optimizer.step()
        expected[step + 1] = weights_sha256(training.model)
    commits = run.chain().refresh().commits
    assert commits[-1][1].step == 6
    for _, commit in commits:
        assert state_digest(run.packs(), commit) == expected[commit.step]


def test_an_arena_grows_to_the_largest_state_and_starts_at_a_page() -> None:
    arena = Arena()
    small = arena.fit(10)
    assert small.address % 4096 == 0
    assert arena.fit(5) is small
    large = arena.fit(5 << 20)
    arena.populate(5 << 20)
    large.view[: 5 << 20] = bytes(5 << 20)
    assert arena.size_bytes >= 5 << 20
    assert hashlib.sha256(arena.fit(10).view[:10]).digest() == hashlib.sha256(bytes(10)).digest()
